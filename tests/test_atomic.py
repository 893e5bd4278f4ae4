"""Files that are whole at any moment."""

import errno
import os

import pytest

from transformer_vq.atomic import write_whole


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*file'"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to(tmp_path):
    write_whole(tmp_path / "null", b"")
    os.remove(tmp_path / "null")
    os.mkfifo(tmp_path / "null")
    reader = os.open(tmp_path / "null", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "null", b"text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
