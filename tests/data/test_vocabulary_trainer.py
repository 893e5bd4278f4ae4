"""Making vocabularies (that they are right: `tests/cli/test_tokenizer.py`)."""

import errno
import os

import pytest

from transformer_vq.data import open_source, train_tokenizer


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
