"""What tests of the command line share: a book, and a run trained on it."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import SIZES, STEPS
from transformer_vq.cli import main
from transformer_vq.data import bundled_corpus


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
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
    os.environ["TVQ_CACHE"] = ""
    assert main(["train", "--data", str(data), "--out", out, "--steps", str(STEPS), *SIZES]) == 0
    return out
