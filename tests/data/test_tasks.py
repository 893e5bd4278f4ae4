"""Tasks: what an episode tells and asks, what counts, and names that are none."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_vq.config import TrainConfig
from transformer_vq.data import (
    Batches,
    ByteTokenizer,
    DataError,
    Source,
    Task,
    bundled_corpus,
    load_bytes,
    open_source,
    split,
)
from transformer_vq.data.loader import UNASKED
from transformer_vq.data.tasks import NEAREST, QUESTION, TOLD
from transformer_vq.errors import UserError

EPISODES = 20


def episodes(task: Task, part: str = "all") -> list[tuple[bytes, bytes, np.ndarray]]:
    """The text of each, its answers, and where those are."""
    source = task.source().split(part)
    found = []
    for start in source.starts:
        text = source.tokens[start : start + task.length + 1]
        places = np.flatnonzero(source.counted[start : start + task.length + 1])
        assert text[0] == ByteTokenizer().eos_id and not source.counted[start]
        found.append((text[1:].tobytes(), text[places].tobytes(), places - 1))
    return found


@given(
    kind=st.sampled_from(["far", "updates"]),
    letters=st.integers(2, 26),
    pairs=st.integers(1, 26),
    filler=st.integers(0, 9),
    writes=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_answer_is_the_value_last_written(kind, letters, pairs, filler, writes, seed):
    pairs = min(letters, pairs)
    task = Task(kind, pairs, letters, filler, writes, EPISODES, seed)
    told = 2 * pairs * (writes if kind == "updates" else 1)
    for text, answers, places in episodes(task):
        assert text[told : told + filler].isdigit() or not filler
        written, times = {}, {}
        for key, value in zip(text[:told:2], text[1:told:2], strict=True):
            written[key], times[key] = value, times.get(key, 0) + 1
        asked = text[told + filler :: 2]
        assert bytes(written).isupper() and bytes(written.values()).islower()
        assert sorted(asked) == sorted(written) and set(times.values()) == {told // pairs // 2}
        assert answers == bytes(written[key] for key in asked) and len(answers) == pairs
        assert places.tolist() == list(range(told + filler + 1, task.length, 2))
        # What was told of a key is at least as far back as the filler is long.
        last = [max(i for i in range(0, told, 2) if text[i] == key) for key in asked]
        assert all(place - at > filler for place, at in zip(places, last, strict=True))


def test_orders_and_values_are_drawn():
    """Control for the test above: what is asked first, and what it is worth, nobody can know."""
    found = episodes(Task("updates", pairs=3, filler=0, episodes=400))
    last = [text[:12].rindex(text[12]) // 2 for text, *_ in found]
    assert set(last) == set(range(1, 6))  # of six writes, any but the first
    first = {text[12] for text, *_ in found}
    assert len(first) == 16 and len({answers for _, answers, _ in found}) > 350


@given(pairs=st.integers(1, 26), letters=st.integers(2, 26), filler=st.integers(0, 9))
def test_copy(pairs, letters, filler):
    pairs = min(pairs, letters)
    for text, answers, places in episodes(Task("copy", pairs, letters, filler, episodes=EPISODES)):
        assert len(set(answers)) == pairs  # so each is known from the one before
        assert answers == text[:pairs] and answers.islower() and max(answers) < ord("a") + letters
        assert text[pairs:].startswith(text[pairs : pairs + filler] + b"=")
        assert places.tolist() == list(range(pairs + filler + 1, len(text)))


@pytest.mark.parametrize("kind", ["far", "updates", "copy"])
def test_what_is_told_comes_amid_the_filler(kind):
    """Anywhere in it, if at least `nearest` bytes come between it and what is asked; where all of
    it must, the episodes are those of a task without this field."""
    task = Task(kind, pairs=3, filler=9, episodes=200, nearest=2)
    behind = []
    for text, answers, places in episodes(task):
        [(before, told, after, asked)] = re.findall(rb"^(\d*)([A-Za-z]+)(\d*)=?([A-Za-z]+)$", text)
        assert len(before + after) == 9 and asked.endswith(answers[-1:])
        assert places.tolist() == list(range(len(text) - 3, len(text)) if kind == "copy"
                                       else range(len(text) - 5, len(text), 2))  # fmt: skip
        if kind == "copy":
            assert told == asked == answers
        else:  # the last value of each key
            written = dict(zip(told[::2], told[1::2], strict=True))
            assert answers == bytes(written[key] for key in asked[::2])
        behind.append(len(after))
    assert set(behind) == set(range(2, 10)) and max(np.bincount(behind)) < 50
    usual = dataclasses.replace(task, nearest=-1)
    assert usual.source().fingerprint == dataclasses.replace(task, nearest=9).source().fingerprint
    assert usual.source().fingerprint != task.source().fingerprint
    longer = dataclasses.replace(usual, filler=30)
    assert longer.least_between == 30 and str(usual).count("nearest") == 0
    assert Task.named(str(task)) == task and "nearest=2" in str(task)


@pytest.mark.parametrize(
    ("filler", "given", "nearest"), [(1800, -1, NEAREST), (40, -1, 40), (1800, 7, 7)]
)
def test_passkey(filler, given, nearest):
    book = bundled_corpus().read_bytes()
    task, distances = Task("passkey", 5, filler=filler, episodes=100, nearest=given), []
    for name, (low, high) in (("train", (0, 0.9)), ("test", (0.95, 1))):
        for text, answers, places in episodes(task, name):
            before, _, rest = text.partition(TOLD)
            assert rest[:7] == answers + b". " and answers.isdigit() and text.endswith(answers)
            after = rest[7 : -len(QUESTION) - 5]
            at = book.index(before + after)
            assert low * len(book) - 1 <= at < high * len(book)  # of the same split of the text
            assert places.tolist() == list(range(len(text) - 5, len(text)))
            distances.append(len(after))
    assert nearest <= min(distances) <= max(distances) <= filler
    assert given != 7 or min(distances) < NEAREST
    assert (len(set(distances)) > 50) == (filler > nearest)


def reading_sizes(text: bytes, source: bytes) -> tuple[int, int]:
    """Of a passage of 8 to 20 bytes and of what is in between: of a reading that is as it should
    be, with a passage of the source, and other text that goes on from gap to gap."""
    for period in range(8, 61):
        for size in range(8, min(period, 20) + 1):
            turns = [text[i : i + period] for i in range(0, len(text), period)]
            same = all(text[:size].startswith(turn[:size]) for turn in turns)
            if same and text[:size] in source and b"".join(t[size:] for t in turns) in source:
                return size, period - size
    raise AssertionError(text)


def test_reading():
    task, seen = Task("reading", 20, filler=40, episodes=160), []
    for name in ("train", "test"):
        part = split(load_bytes(bundled_corpus()), name).tobytes()
        for text, counted, places in episodes(task, name):
            assert counted == text and places.tolist() == list(range(80))  # all of it counts
            seen.append(reading_sizes(text, part))
    sizes, gaps = np.transpose(seen)
    assert sizes.min() == 8 and sizes.max() == 20 and np.mean(sizes < 14) > 0.6
    assert gaps.min() == 0 and gaps.max() > 20 and (gaps <= 2 * sizes).all()
    assert len({text for text, *_ in episodes(task)}) == 160
    usual = Task("reading")
    assert (usual.pairs, usual.filler, usual.length) == (100, 200, 400)
    assert Task("reading", 3, filler=0, episodes=20).source().sequence_len == 6


def test_a_task_is_its_fields():
    task = Task(pairs=3, filler=4, episodes=EPISODES)
    assert str(task) == "recall:pairs=3,letters=16,filler=4,episodes=20,seed=0"
    assert Task.named(str(task)) == task and Task.named("recall:").episodes == 100_000
    assert Task.named("passkey:pairs=5").filler == 1800
    assert Task.named("far:pairs=3,filler=4,episodes=20") == task  # as `Task` calls it
    source, again = task.source(), open_source([str(task)])
    assert source.fingerprint == again.fingerprint and again.path == str(task)
    prints = {dataclasses.replace(task, seed=seed).source().fingerprint for seed in range(3)}
    assert len(prints) == 3 and source.fingerprint in prints
    # Of raw bits, so that a NumPy that draws otherwise changes no run.
    assert source.tokens[:17].tobytes() == b"\0DhNcLp6962DhNcLp"
    parts = [source.split(name) for name in ("train", "validation", "test")]
    assert [len(part.starts) for part in parts] == [18, 1, 1]
    assert [part.num_bytes for part in parts] == [18 * 16, 16, 16]
    assert {part.bytes_per_token for part in parts} == {1.0} and source.sequence_len == 16


def test_a_row_is_an_episode_of_which_the_answers_are_asked():
    task = Task(pairs=2, filler=5, episodes=EPISODES)
    source = task.source().split("train")
    train = TrainConfig(batch_size=6, sequence_len=16, seed=1)
    rows = [Batches.of(source, train).batch(i) for i in range(3)]  # an epoch
    known = {text: answers for text, answers, _ in episodes(task, "train")}
    for batch in rows:
        assert batch.loss_mask.tolist() == [[True] * 13 + [False] * 3] * 6  # the rest is padding
        assert (batch.targets[:, 13:] == 0).all()
        for inputs, targets in zip(batch.inputs, batch.targets[:, :13], strict=True):
            asked = targets != UNASKED
            text = inputs[1:14].copy()
            assert asked.sum() == 2 and (text[asked] == targets[asked])[:-1].all()
            text[-1] = targets[-1]  # the last one is asked, and read by nobody
            answers = targets[asked].astype(np.uint8).tobytes()
            assert known.pop(text.astype(np.uint8).tobytes()) == answers
    assert not known
    other = Batches.of(source, dataclasses.replace(train, seed=2)).batch(0)
    assert (other.inputs != rows[0].inputs).any()
    shares = [Batches.of(source, train, i, 2) for i in (0, 1)]
    targets = np.concatenate([share.batch(2).targets for share in shares])
    np.testing.assert_array_equal(targets, rows[2].targets)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("recall:pairs=0", r"pairs is 0: it must be a whole number from 1 to 1024 \(the fields"),
        ("riddle:", "'riddle' is no task: the tasks are recall, updates, copy, passkey, reading"),
        ("recall:rows=3", "has 'rows=3': give FIELD=NUMBER, once for each of the fields of recall, "
         "pairs .1 to 26., letters .2 to 26., filler"),
        ("reading:pairs=0", "pairs is 0: it must be a whole number from 1 to 1024"),
        ("recall:episodes=0", "episodes is 0: it must be a whole number from 20"),
        ("reading:letters=3", "has 'letters=3'.*the fields of reading, pairs .1 to 1,024., filler"),
        ("passkey:pears=3", "filler .0 to 50,000."),
        ("recall:pairs", "has 'pairs': give FIELD=NUMBER"),
        ("copy:writes=2", "has 'writes=2'.*the fields of copy, pairs"),
        ("recall:pairs=1,pairs=2", "has 'pairs=2'.*once for each"),
        ("recall:pairs=17", "pairs is 17, and there are 16 letters to choose from, each once: "
         "lower pairs, or raise letters"),
        ("recall:letters=27", "letters is 27: it must be a whole number from 2 to 26"),
        ("passkey:filler=50001", "filler is 50,001: of passkey it must be at most 50,000"),
        ("reading:filler=50001", "filler is 50,001: of reading it must be at most 50,000"),
        ("copy:filler=8,nearest=9", "nearest is 9, and filler 8: it is a part of the filler"),
        ("reading:nearest=9", "has 'nearest=9'.*the fields of reading, pairs"),
        ("copy:filler=1000000,episodes=2000", "episodes is 2,000, .* 1.9 GiB, and 1 GiB is the"),
    ],
)  # fmt: skip
def test_names_that_are_no_task(name, says):
    with pytest.raises(UserError, match=says):
        Task.named(name)


def test_a_task_stands_alone(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="recall: is a task, and stands alone"):
        open_source(["recall:", tmp_path])
    with pytest.raises(DataError, match="--image-size is for pictures"):
        open_source(["recall:"], image_size=8)
    with pytest.raises(UserError, match="there is no file 'recal:pairs=3', and 'recal' is no task"):
        open_source(["recal:pairs=3"])
    (tmp_path / "recall:x").write_bytes(b"a file of that name")
    assert len(open_source([tmp_path / "recall:x"]).tokens) == 19
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes:day=3").write_bytes(b"no task, as it is there")
    assert len(open_source(["notes:day=3"]).tokens) == 23


def test_what_counts_must_fit_the_tokens():
    with pytest.raises(DataError, match=r"counted has shape \(3,\): it must be \(4,\)"):
        Source(np.zeros(4, np.uint8), np.zeros(1, np.int64), 4, counted=np.ones(3, bool))
