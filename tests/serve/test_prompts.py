"""States after known prompts as files: used again by whoever comes later, and never too many."""

import os
import threading

import pytest

pytest.importorskip("pydantic", reason="NOT TESTED: the extra serve is not installed")

from tests.serve.fakes import ROW, known, snapshot, unpack
from transformer_vq.serve import prompts
from transformer_vq.serve.prompts import PromptFiles
from transformer_vq.serve.states import StateStore


def pack(one):
    return str(one.position).encode().rjust(ROW, b"0")


def make_store(folder, most=2 * ROW, files=5 * ROW, kind="0f-4"):
    shelf = PromptFiles(folder, kind, files, pack=pack, unpack=unpack)
    return StateStore(ROW, most, None, grid=4, pack=pack, unpack=unpack, prompts=shelf), shelf


def fetched(store, tokens, mode="any", owner=""):
    store.fetch(owner, tokens, mode)
    return known(store, tokens, mode, owner)


def test_what_memory_has_no_room_for(tmp_path, monkeypatch):
    """It is read from its file, by another server too, and only by its owner and its model."""
    store, shelf = make_store(tmp_path)
    for first in range(4):
        store.keep("", [first, 1, 2, 3], snapshot(4), exact=True)
    store.keep("x", [7, 7], snapshot(2), exact=False)
    shelf.wait()
    assert store.num_bytes == store.most_bytes and len(list(tmp_path.iterdir())) == 3
    assert known(store, [0, 1, 2, 3]) == 0  # not in memory
    assert fetched(store, [0, 1, 2, 3, 4]) == 4 and known(store, [0, 1, 2, 3]) == 4
    store.close()
    other, _ = make_store(tmp_path)
    assert fetched(other, [1, 1, 2, 3, 4], "exact") == 4
    assert fetched(other, [1, 1, 2, 3, 4], owner="x") == 0
    assert fetched(other, [7, 7, 7], owner="x") == 2 and fetched(other, [7, 7], "exact", "x") == 0
    assert fetched(other, [1, 1, 2, 3], "off") == 0
    assert fetched(make_store(tmp_path, kind="0e-4")[0], [1, 1, 2, 3]) == 0
    # A longer one, written by another process, is seen after a moment.
    monkeypatch.setattr(prompts, "LOOK_AGAIN", 0.0)
    store.keep("", [1, 1, 2, 3, 4, 5], snapshot(6), exact=False)
    store.close()
    assert fetched(other, [1, 1, 2, 3, 4, 5, 6]) == 6
    assert fetched(other, [1, 1, 2, 3, 4, 5, 6], "exact") == 4


def test_never_above_its_bytes(tmp_path):
    """What was used least recently goes; those of other models count."""
    store, shelf = make_store(tmp_path, most=0)
    for i in range(20):
        shelf.write(prompts.Key("", 1, bytes([i]) * 16), snapshot(i), True)
        path = max(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)
        os.utime(path, ns=(i + 1, i + 1))
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 5 * ROW
        if i > 3:
            assert shelf.read(prompts.Key("", 1, bytes([3]) * 16)).position == 3
            newest = max(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)
            os.utime(newest, ns=(i + 1, i + 1))
    other = PromptFiles(tmp_path, "0e-4", 5 * ROW, pack=pack, unpack=unpack)
    for i in range(5):
        other.write(prompts.Key("", 1, bytes([i]) * 16), snapshot(i), True)
    assert len(list(tmp_path.iterdir())) == 5
    assert all(path.name.startswith("0e-4-all-1-") for path in tmp_path.iterdir())
    PromptFiles(tmp_path / "none", "0e-4", 5, pack=pack, unpack=unpack).write(
        prompts.Key("", 1, bytes(16)), snapshot(1), True
    )
    assert not (tmp_path / "none").exists()


def test_files_that_cannot_be_used(tmp_path):
    """A prompt is read then, and nobody is told."""
    store, shelf = make_store(tmp_path)
    keys = [prompts.Key("", 1, bytes([i]) * 16) for i in range(3)]
    for key in keys:
        shelf.write(key, snapshot(1), True)
    assert shelf.lengths("") == [1]
    damaged, gone, whole = (next(tmp_path.glob(f"*{key.digest.hex()}*")) for key in keys)
    damaged.write_bytes(b"x")
    gone.unlink()
    assert shelf.read(keys[0]) is None and shelf.read(keys[1]) is None
    assert not damaged.exists() and shelf.read(keys[2]).position == 1
    whole.unlink()
    blocked = tmp_path / "file"
    blocked.touch()
    nowhere = PromptFiles(blocked / "x", "0e-4", 50, pack=pack, unpack=unpack)
    nowhere.write(keys[0], snapshot(1), True)
    assert nowhere.lengths("") == []


def test_what_waits_is_bounded(tmp_path):
    """A disk that is slow does not hold states: they are let go."""
    go, written = threading.Event(), []

    def slow(one):
        go.wait(30)
        written.append(one.position)
        return pack(one)

    shelf = PromptFiles(tmp_path, "0e-4", 500, pack=slow, unpack=unpack)
    for i in range(20):
        shelf.put(prompts.Key("", 1, bytes([i]) * 16), snapshot(i), True)
    go.set()
    shelf.wait()
    assert prompts.MOST_WAITING <= len(written) <= prompts.MOST_WAITING + 1
