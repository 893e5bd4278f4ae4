"""Kept tokens: whatever happens to them on the disk, they are never trained on damaged."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from transformer_vq.data import DataError, Source, cache, open_source


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGES = {
    "half of the tokens": lambda f: os.truncate(f / "tokens.bin", 40),
    "no tokens": lambda f: os.truncate(f / "tokens.bin", 0),
    "a bit of the tokens": lambda f: flip(f / "tokens.bin", 7),
    "zeros": lambda f: (f / "tokens.bin").write_bytes(bytes((f / "tokens.bin").stat().st_size)),
    "more tokens": lambda f: (f / "tokens.bin").write_bytes((f / "tokens.bin").read_bytes() * 2),
    "tokens are gone": lambda f: (f / "tokens.bin").unlink(),
    "a bit of the starts": lambda f: flip(f / "starts.npy"),
    "half of the starts": lambda f: os.truncate(f / "starts.npy", 140),
    "starts are gone": lambda f: (f / "starts.npy").unlink(),
    "half of the description": lambda f: os.truncate(f / "source.json", 50),
    "no description": lambda f: os.truncate(f / "source.json", 0),
    "description is gone": lambda f: (f / "source.json").unlink(),
    "a changed description": lambda f: change(f / "source.json", notes=["other"]),
    "another description": lambda f: (f / "source.json").write_text("[1, 2]"),
    "no UTF-8": lambda f: (f / "source.json").write_bytes(b"\xff\xfe{}"),
}


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i} " * 3}) + "\n" for i in range(9)))
    return path


def opened(data: Path, **options) -> Source:
    return open_source([data], cache=data.parent / "cache", **options)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokens_are_made_anew_with_a_word(data, damage):
    good = opened(data)
    tokens, starts, fingerprint = good.tokens.copy(), good.starts.copy(), good.fingerprint
    (folder,) = (data.parent / "cache").iterdir()
    DAMAGES[damage](folder)
    anew = opened(data)
    np.testing.assert_array_equal(anew.tokens, tokens)
    np.testing.assert_array_equal(anew.starts, starts)
    assert anew.fingerprint == fingerprint
    assert "the tokens that were kept are damaged (" in anew.notes[0]
    assert opened(data).notes == ()  # they are whole again
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_tokens_are_on_the_disk_before_they_have_their_name(data, monkeypatch):
    order, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("sync") or sync(handle))
    monkeypatch.setattr(os, "rename", lambda a, b: order.append("rename") or rename(a, b))
    opened(data)
    assert order == ["sync"] * 4 + ["rename", "sync"]  # three files, their folder; the cache


def test_a_full_disk_is_named_with_a_way_out(data, monkeypatch):
    def full(_file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "_sync", full)
    for folder, way in ((data.parent / "cache", "TVQ_CACHE"), (None, "TMPDIR")):
        sentence = rf"cannot be written to .* \(No space left on device\): make room .*set {way}"
        with pytest.raises(DataError, match=sentence):
            open_source([data], cache=folder)
    assert not list((data.parent / "cache").iterdir())


def test_what_a_dead_process_left_is_removed(data):
    good = opened(data)
    (folder,) = (data.parent / "cache").iterdir()
    (folder / "tokens.bin").unlink()
    left = folder.with_name(f".making-{folder.name}-1234")
    other = folder.with_name(".making-other-1234")
    left.mkdir()
    other.mkdir()
    assert opened(data).fingerprint == good.fingerprint
    assert other.exists() and not left.exists()


def test_a_cache_that_cannot_be_written_is_read(data, monkeypatch):
    opened(data)
    monkeypatch.setattr(cache, "_can_write", lambda folder: False)
    assert isinstance(opened(data).tokens.base, np.memmap)
    monkeypatch.setattr(cache, "scratch_tokens", lambda build: pytest.fail("made again"))
    opened(data)
