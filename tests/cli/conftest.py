"""What tests of the command line share: a book, and a run trained on it."""

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
def data(tmp_path_factory, content) -> Path:
    path = tmp_path_factory.mktemp("data") / "book.bin"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, data) -> str:
    """A trained run. Look, don't touch."""
    out = str(tmp_path_factory.mktemp("runs") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVQ_CACHE", "")
        train_on_one_device(patch)
        arguments = ["--data", str(data), "--out", out, "--steps", str(STEPS), *SIZES]
        assert main(["train", *arguments]) == 0
    return out
