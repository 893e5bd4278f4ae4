"""Making vocabularies (that they are right: `tests/cli/test_tokenizer.py`)."""

import errno
import os

import pytest

from transformer_vq.data import open_source, train_tokenizer
from transformer_vq.errors import UserError


@pytest.mark.parametrize("name", ["t.json", "t.model"])
def test_a_disk_that_is_full_leaves_no_half_vocabulary(tmp_path, monkeypatch, name):
    (tmp_path / "text").write_text("Call me Ishmael. " * 100)
    source = open_source([tmp_path / "text"])

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=name):
        train_tokenizer(source, tmp_path / name, 270)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(
    ("path", "size", "sentence"),
    [
        (None, 300, "the file of the vocabulary is None: it must be a path"),
        ("t.json", "300", "the vocabulary size is '300': it must be a whole number"),
        ("t.json", 0, "the vocabulary size is 0: it must be at least 1"),
        ("t.txt", 300, "t.txt must end with .json"),
    ],
)
def test_arguments_that_are_none_are_named(tmp_path, path, size, sentence):
    (tmp_path / "text").write_text("Call me Ishmael. " * 100)
    with pytest.raises(UserError, match=sentence):
        train_tokenizer(open_source(tmp_path / "text"), path, size)
