"""States that are kept: never above their bytes, what was used least recently goes."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="NOT TESTED: the extra serve is not installed")

from tests.serve.fakes import ROW, known, make_store, snapshot
from transformer_vq.errors import UserError
from transformer_vq.serve import states
from transformer_vq.serve.states import StateStore, StoreFull


def test_the_longest_prefix():
    store = make_store()
    for length in (3, 8, 5):
        store.keep("", range(length), snapshot(length), exact=True)
    assert known(store, range(20)) == 8 and known(store, range(7)) == 5
    assert store.find("", range(6), "any").snapshot.position == 5
    assert known(store, range(2)) == 0 and known(store, [9, *range(1, 20)]) == 0
    assert known(store, range(20), "off") == 0 and known(store, range(20), owner="x") == 0
    # Of the others, reading the prompt itself would make another state, up to rounding.
    assert known(store, range(20), "exact") == 8  # the end of a chunk
    assert known(store, range(7), "exact") == 0 and known(store, range(5), "exact") == 5
    store.keep("", range(12), snapshot(12), exact=False)  # the end of an answer
    assert (known(store, range(20)), known(store, range(20), "exact")) == (12, 8)


def test_what_is_worth_keeping():
    """The end, the last chunk, and where prompts part."""
    store = make_store()
    assert store.worth_keeping("", range(10), 0) == {10, 8}
    assert store.worth_keeping("", [*range(5), *range(50, 70)], 0) == {25, 24, 4}
    assert store.worth_keeping("", range(10), 3) == {10}
    assert store.worth_keeping("x", range(10), 0) == {10, 8}


def test_never_above_its_bytes():
    store, rng = make_store(), random.Random(0)
    recent = []
    for i in range(1000):
        tokens = (i, rng.randrange(5))
        store.keep("", tokens, snapshot(2), exact=True)
        recent = [*recent, tokens][-5:]
        assert store.num_bytes <= store.most_bytes
        if i > 5:  # used, so it stays
            assert known(store, recent[0]) == 2
            recent = [*recent[1:], recent[0]]
    assert store.num_bytes == 5 * ROW and all(known(store, tokens) == 2 for tokens in recent)
    assert make_store(most=ROW - 1).keep("", [1], snapshot(1), exact=True) is None


def test_names_stay_and_prompts_go():
    store = make_store()
    for i in range(5):
        store.keep("", [i], snapshot(1), exact=True)
    for name in "abcde":
        store.save("", name, snapshot(7))
    assert store.num_bytes == 5 * ROW and known(store, [4]) == 0
    with pytest.raises(StoreFull, match="take 50 of 50 bytes of memory: delete some"):
        store.save("", "f", snapshot(7))
    store.save("", "a", snapshot(8))  # in place of the older one
    assert store.load("", "a").position == 8 and store.names("") == list("abcde")
    assert store.delete("", "a") and not store.delete("", "a") and store.load("", "a") is None
    assert store.names("x") == [] and store.load("x", "b") is None


def test_files_are_shared(tmp_path):
    """Another process, another owner, a file that was replaced, damaged or deleted."""
    one, two = make_store(tmp_path), make_store(tmp_path)
    for i in range(20):
        one.save("", f"s{i}", snapshot(i))
    assert one.num_bytes <= one.most_bytes and len(one.names("")) == 20
    assert [two.load("", f"s{i}").position for i in range(20)] == list(range(20))
    assert two.load("x", "s1") is None
    one.save("", "s19", snapshot(99))
    assert two.load("", "s19").position == 99
    assert two.data("", "s19") == b"99"
    one.delete("", "s19")
    assert two.load("", "s19") is None and two.data("", "s19") is None
    next(tmp_path.rglob("s3.tvq")).write_bytes(b"x")
    with pytest.raises(UserError, match="the state s3 is damaged"):
        two.load("", "s3")
    with pytest.raises(UserError, match="the name of a state is"):
        two.load("", "../s3")


def test_two_writers_of_a_name(tmp_path, monkeypatch):
    """Another process saves between our writing and our looking: what it wrote is what is there."""
    one, two = make_store(tmp_path), make_store(tmp_path)
    one.save("", "a", snapshot(1))
    real = states.write_whole

    def overtaken(*given, **options):
        found = real(*given, **options)
        monkeypatch.setattr(states, "write_whole", real)
        two.save("", "a", snapshot(3))
        return found

    monkeypatch.setattr(states, "write_whole", overtaken)
    one.save("", "a", snapshot(2))
    assert one.load("", "a").position == two.load("", "a").position == 3
    # And deletes it while we read.
    monkeypatch.setattr(states, "_found", lambda path: os.stat(tmp_path))
    two.delete("", "a")
    assert one.load("", "a") is None and one.data("", "a") is None


def test_drafts_of_the_killed_go(tmp_path):
    (tmp_path / "all").mkdir()
    for name, age in ((".a.tvq.0f.new", 7200), (".b.tvq.0f.new", 60), ("c.tvq", 7200)):
        (tmp_path / "all" / name).touch()
        os.utime(tmp_path / "all" / name, times=(time.time() - age,) * 2)
    make_store(tmp_path)
    assert {path.name for path in (tmp_path / "all").iterdir()} == {".b.tvq.0f.new", "c.tvq"}


WRITER = """
import pathlib, sys
from tests.serve.test_states import make_large_store, snapshot
store, number = make_large_store(pathlib.Path(sys.argv[1])), int(sys.argv[2])
while True:
    number += 1
    store.save("", "name", snapshot(number))
    print(number, flush=True)
"""


def make_large_store(folder):
    """Of states whose files take a while to write: one number, many times."""

    def unpack(data, name):
        numbers = set(np.frombuffer(data, np.int64)) if len(data) == 8 << 20 else ()
        if len(numbers) != 1:
            raise UserError(f"{name} is damaged")
        return snapshot(int(*numbers))

    pack = lambda s: np.full(1 << 20, s.position, np.int64).tobytes()  # noqa: E731
    return StateStore(8 << 20, 8 << 20, folder, grid=4, pack=pack, unpack=unpack)


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """kill -9, 25 times: the state is whole, and the last one that was saved or the one after."""
    dice, saved, torn = random.Random(0), 0, 0
    for _ in range(25):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(saved)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            said = [process.stdout.readline()]
            time.sleep(dice.uniform(0, 0.05))
            process.kill()
            said += process.stdout.readlines()
        drafts = list((tmp_path / "all").glob(".*.new"))
        torn += any(draft.stat().st_size < 8 << 20 for draft in drafts)
        found = make_large_store(tmp_path).load("", "name").position
        assert found - int(said[-1]) in (0, 1)
        saved = found
        for draft in drafts:
            draft.unlink()
    assert torn  # it was killed in the middle of writing, at least once
