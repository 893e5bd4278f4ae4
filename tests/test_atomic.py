"""Files that are whole at any moment."""

import errno
import os

import pytest

from transformer_vq.atomic import whole_folder, write_whole


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*file'"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_ctrl_c_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def interrupted(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new", shared=True)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to(tmp_path):
    write_whole(tmp_path / "null", b"")
    os.remove(tmp_path / "null")
    os.mkfifo(tmp_path / "null")
    reader = os.open(tmp_path / "null", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "null", b"text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)


def fill(path, content, **options):
    with whole_folder(path, **options) as draft:
        (draft / "file").write_bytes(content)
        assert not (path / "file").exists() or (path / "file").read_bytes() != content


def test_a_folder_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "above" / "folder"
    fill(path, b"first")
    assert (path / "file").read_bytes() == b"first"
    with pytest.raises(OSError, match="not empty"):
        fill(path, b"second")
    assert (path / "file").read_bytes() == b"first"
    fill(path, b"second", replace=True)
    assert (path / "file").read_bytes() == b"second"
    (path / "file").unlink()
    fill(path, b"third")  # it was empty
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, step, error):
    path = tmp_path / "folder"
    fill(path, b"old")
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        if step == "fsync" or len(calls) == 2:  # the old one has made room by then
            raise error
        return real(*arguments)

    real = os.rename
    monkeypatch.setattr(os, step, fails)
    with pytest.raises(type(error)):
        fill(path, b"new", replace=True)
    assert calls and (path / "file").read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once(tmp_path, monkeypatch):
    """The one who ends last wins, and nothing of the other is in it."""
    path, real = tmp_path / "file", os.fsync

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", real)
        found.append(write_whole(path, b"second", shared=True))
        assert path.read_bytes() == b"second"
        real(descriptor)

    found = []
    monkeypatch.setattr(os, "fsync", meanwhile)
    found.append(write_whole(path, b"first", shared=True))
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    assert found[1].st_ino == path.stat().st_ino != found[0].st_ino
