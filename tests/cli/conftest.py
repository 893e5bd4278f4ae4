"""What tests of the command line share: a book, and a run trained on it."""

import fcntl
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import SIZES, STEPS, train_on_one_device
from transformer_vq.cli import main
from transformer_vq.data import bundled_corpus


@pytest.fixture(autouse=True)
def no_cache_and_one_device(monkeypatch, one_device):
    monkeypatch.setenv("TVQ_CACHE", "")


@pytest.fixture(scope="session")
def content() -> bytes:
    """Text, and bytes that are none."""
    return bundled_corpus().read_bytes()[:40_000] + np.random.default_rng(0).bytes(20_000)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, content) -> Path:
    """A folder with a book and a run trained on it, made by the first of pytest's processes that
    wants it, for all of them."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "trained"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            (folder / "book.bin").write_bytes(content)
            patch.setenv("TVQ_CACHE", "")
            train_on_one_device(patch)
            arguments = ["--data", f"{folder}/book.bin", "--out", f"{folder}/run", *SIZES]
            assert main(["train", *arguments, "--steps", str(STEPS)]) == 0
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def data(trained) -> Path:
    return trained / "book.bin"


@pytest.fixture(scope="session")
def run(tmp_path_factory, trained) -> str:
    """A trained run, a copy for each process. Look, don't touch."""
    return str(shutil.copytree(trained / "run", tmp_path_factory.mktemp("runs") / "run"))
