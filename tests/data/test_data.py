"""Data: round trips, splits, and feeds that hand out every token exactly once, the same each time.

Tests that compare two ways to the same result also show that the comparison can fail.
"""

import gzip
import hashlib
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.data import (
    Batches,
    ByteTokenizer,
    DataError,
    StreamDecoder,
    bundled_corpus,
    check_tokens,
    eval_chunks,
    fingerprint,
    load_bytes,
    require_length,
    split,
)

BYTES = ByteTokenizer()
few = settings(deadline=None, max_examples=25)
many = settings(deadline=None, max_examples=200)


# Tokenizer.


@many
@given(st.text())
def test_text_round_trip(text):
    tokens = BYTES.encode(text)
    assert BYTES.decode(tokens) == text.encode()
    assert BYTES.decode_text(np.array(tokens, np.int64)) == text


@many
@given(st.binary())
def test_bytes_round_trip(data):
    assert BYTES.decode(BYTES.encode(data)) == data
    smuggled = data.decode(errors="surrogateescape")  # as os.fsdecode and sys.argv do
    assert BYTES.decode(BYTES.encode(smuggled)) == data


def test_byte_tokenizer_facts():
    assert (BYTES.name, BYTES.vocab_size, BYTES.start_id, BYTES.eos_id) == ("bytes", 256, 10, 0)
    assert BYTES.encode("é") == [0xC3, 0xA9]
    assert BYTES.decode([]) == b""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        BYTES.encode("\ud800")


# Bytes that often break in the middle of a character, and some that never were UTF-8.
messy_bytes = st.lists(
    st.sampled_from(["é", "—", "𝄞", "a", "\n"]).map(str.encode)
    | st.sampled_from([b"\xff", b"\xe2\x80", b"\x80", b"\xf0\x9d", b"\xed\xa0\x80", b"\xc0"])
    | st.binary(max_size=4)
).map(b"".join)


@many
@given(messy_bytes)
def test_stream_decoder_equals_decoding_at_once(data):
    decoder = StreamDecoder()
    for _ in range(2):  # after a flush it starts afresh
        text = "".join(map(decoder.push, data)) + decoder.flush()
        assert text == data.decode(errors="replace")


def test_stream_decoder_waits_for_the_last_byte():
    decoder = StreamDecoder()
    assert [decoder.push(b) for b in "a—b".encode()] == ["a", "", "", "—", "b"]
    assert decoder.push(0xE2) == "" and decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    # Token by token without memory, the same bytes are garbage.
    assert "".join(BYTES.decode_text([b]) for b in "a—b".encode()) != "a—b"


@pytest.mark.parametrize(("token", "position"), [(256, 2), (-1, 0), (1000, 1)])
def test_token_outside_the_vocabulary(token, position):
    tokens = [65, 66, 67]
    tokens[position] = token
    sentence = rf"token {token} at position {position} is outside .* 0 to 255"
    for form in (tokens, np.array(tokens, np.int16)):
        with pytest.raises(ValueError, match=sentence):
            BYTES.decode(form)
    decoder = StreamDecoder()
    with pytest.raises(ValueError, match=sentence):
        for token in tokens:
            decoder.push(token)


@pytest.mark.parametrize("tokens", [[0.5], [[1, 2]], ["a"], [True], 7])
def test_not_a_list_of_tokens(tokens):
    with pytest.raises(ValueError, match="flat sequence of whole numbers"):
        check_tokens(tokens, 256)


# Files and splits.


def test_load_plain_and_gzip(tmp_path):
    data = bytes(range(256)) * 3  # binary, NUL and all
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "a.gz").write_bytes(gzip.compress(data))
    for name in ("a.bin", "a.gz"):
        array = load_bytes(tmp_path / name)
        assert array.dtype == np.uint8 and array.shape == (768,) and array.tobytes() == data
        assert not array.flags.writeable
        assert fingerprint(array) == hashlib.sha256(data).hexdigest()
    assert isinstance(load_bytes(str(tmp_path / "a.bin")).base, np.memmap)  # mapped, not read


def _broken_files(folder: Path) -> dict[str, str]:
    """Paths that cannot be loaded -> the sentence that each must give."""
    (folder / "empty").touch()
    (folder / "empty.gz").write_bytes(gzip.compress(b""))
    (folder / "text.gz").write_bytes(b"not compressed")
    whole = gzip.compress(os.urandom(1000))
    (folder / "cut.gz").write_bytes(whole[:500])
    (folder / "damaged.gz").write_bytes(whole[:500] + b"\xff" * 20 + whole[520:])
    os.mkfifo(folder / "pipe")
    return {
        "missing": "there is no file .*missing$",
        "empty": "empty is empty: give",
        "empty.gz": "empty.gz is empty: give",
        ".": "is a directory: give a file$",
        "empty/x": "cannot read .*: Not a directory$",
        "n" * 300: "cannot read .*: File name too long$",
        "text.gz": "cannot read .*text.gz: Not a gzipped file",
        "cut.gz": "cannot read .*cut.gz: Compressed file ended",
        "damaged.gz": "cannot read .*damaged.gz: ",
        "pipe": "pipe is not a regular file",
    }


def test_files_that_cannot_be_loaded(tmp_path):
    for name, sentence in _broken_files(tmp_path).items():
        with pytest.raises(DataError, match=sentence) as caught:
            load_bytes(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "secret"
    path.write_bytes(b"x")

    def refuse(*args, **kwargs):  # root may read anything, so chmod would prove nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(DataError, match=r"cannot read .*secret: Permission denied$"):
        load_bytes(path)


@many
@given(st.integers(0, 1000))
def test_splits_partition_the_tokens(size):
    tokens = np.arange(size)
    parts = [split(tokens, name) for name in ("train", "validation", "test")]
    np.testing.assert_array_equal(np.concatenate(parts), tokens)
    assert len(split(tokens, "all")) == size


def test_split_sizes():
    enwik8 = np.broadcast_to(np.uint8(0), 100_000_000)  # its size, one byte of memory
    sizes = [len(split(enwik8, name)) for name in ("train", "validation", "test")]
    assert sizes == [90_000_000, 5_000_000, 5_000_000]
    with pytest.raises(DataError, match=r"unknown split 'dev': .*train, validation, test, all"):
        split(enwik8, "dev")


def test_require_length():
    require_length(np.zeros(2), 8)  # what is missing is padded
    with pytest.raises(DataError, match=r"has 1 of the 9 tokens .* 8 needs, and two are the least"):
        require_length(np.zeros(1), 8)
    one_byte = split(np.zeros(1, np.uint8), "train")
    with pytest.raises(DataError, match=r"^the train split of x has 0 of .*: use a larger file$"):
        require_length(one_byte, 512, "the train split of x")
    with pytest.raises(DataError, match="the data has 0 of the 513"):
        Batches(one_byte, batch_size=1, sequence_len=512, seed=0)


# Training batches. Tokens that are their own positions show where each row was cut.


def _batches(size: int = 100, **fields) -> Batches:
    fields = {"batch_size": 4, "sequence_len": 7, "seed": 3} | fields
    return Batches(np.arange(size), **fields)


def _same(a, b) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _starts(batches: Batches, epoch: int) -> np.ndarray:
    """Where the rows of one epoch begin in the text, in the order they are handed out."""
    first, last = epoch * batches.num_windows, (epoch + 1) * batches.num_windows
    size = batches.batch_size
    rows = [batches.batch(i).inputs[:, 0] for i in range(first // size, -(-last // size))]
    return np.concatenate(rows)[first % size :][: last - first]


def _covers_once(starts: np.ndarray, batches: Batches) -> bool:
    """Do these rows tile a stretch of the text, all but less than a window at either end?"""
    length, size = batches.sequence_len, len(batches.tokens)
    starts = np.sort(starts)
    end = starts[-1] + length  # the last target
    return bool(
        np.all(np.diff(starts) == length) and end < size and end - starts[0] > size - 3 * length
    )


def test_batch_shapes_and_types():
    batch = _batches().batch(5)
    assert [a.shape for a in batch] == [(4, 7)] * 4 + [(4,)]
    assert [a.dtype.name for a in batch] == ["int32", "int32", "bool", "int32", "bool"]
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)  # the next position
    np.testing.assert_array_equal(batch.inputs[:, :1] + np.arange(7), batch.inputs)  # unbroken
    assert batch.loss_mask.all() and not batch.document_ids.any() and batch.starts.all()
    assert all(a.flags.c_contiguous for a in batch)


@few
@given(
    size=st.integers(40, 400),
    batch_size=st.integers(1, 9),
    sequence_len=st.integers(1, 20),
    seed=st.integers(0, 2**40),
)
def test_every_epoch_takes_every_window_once(size, batch_size, sequence_len, seed):
    batches = _batches(size, batch_size=batch_size, sequence_len=sequence_len, seed=seed)
    for epoch in range(3):
        starts = _starts(batches, epoch)
        assert _covers_once(starts, batches)
    doubled = np.append(starts[1:], starts[-1])
    if len(starts) > 1:
        assert not _covers_once(doubled, batches)


@pytest.mark.parametrize("size", [8, 9, 14, 15, 16, 21, 22])
def test_few_windows(size):
    batches = _batches(size)
    for epoch in range(5):
        assert _covers_once(_starts(batches, epoch), batches)


def test_epochs_and_seeds_differ():
    def orders(seed):
        batches = _batches(1000, seed=seed)
        starts = (_starts(batches, epoch) for epoch in range(4))
        return [tuple((s - s.min()) // 7) for s in starts]

    seen = orders(0) + orders(1)
    assert len(set(seen)) == len(seen)  # no order twice, not even an epoch later
    offsets = {_starts(_batches(1000), epoch).min() for epoch in range(8)}
    assert len(offsets) > 3


@few
@given(st.integers(0, 2**45), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_batch_depends_on_seed_and_index_only(index, other, seed):
    batches = _batches(2000, seed=seed)
    fresh = _batches(2000, seed=seed)
    fresh.batch(other)  # what was read before makes no difference
    assert _same(batches.batch(index), fresh.batch(index))
    assert not _same(batches.batch(index), fresh.batch(index + 1))
    assert not _same(batches.batch(index), _batches(2000, seed=seed + 1).batch(index))


def test_same_batch_in_another_process_and_version():
    script = (
        "import numpy as np; from transformer_vq.data import Batches;"
        "b = Batches(np.arange(100), batch_size=4, sequence_len=7, seed=3);"
        "print(b.batch(1000).inputs[:, 0].tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    starts = _batches().batch(1000).inputs[:, 0].tolist()
    assert printed.stdout.decode().strip() == str(starts)
    # Written down: if a new version of a library changes it, old runs no longer resume.
    assert starts == GOLDEN_STARTS


GOLDEN_STARTS = [78, 85, 50, 36]


def test_iterate_is_batch_from_any_start():
    batches = _batches()
    for start in (0, 17):
        stream = batches.iterate(start)
        got = list(islice(stream, 5))
        stream.close()
        assert all(_same(b, batches.batch(start + i)) for i, b in enumerate(got))
        assert not _same(got[0], batches.batch(start + 1))


def test_iterate_stops_its_thread():
    before = threading.active_count()
    stream = _batches().iterate()
    next(stream)
    assert threading.active_count() > before
    workers = [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]
    stream.close()
    for worker in workers:
        worker.join(timeout=10)
    assert threading.active_count() == before


@few
@given(count=st.sampled_from([1, 2, 3, 4]), rows=st.integers(1, 3), index=st.integers(0, 1000))
def test_process_slices_make_up_the_global_batch(count, rows, index):
    def share(process_index):
        return _batches(
            300, batch_size=rows * count, process_index=process_index, process_count=count
        ).batch(index)

    whole = _batches(300, batch_size=rows * count).batch(index)
    shares = [share(p) for p in range(count)]
    assert _same(map(np.concatenate, zip(*shares, strict=True)), whole)
    if count > 1:
        assert not _same(map(np.concatenate, zip(*shares[::-1], strict=True)), whole)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"sequence_len": 0}, "sequence_len is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"process_count": 3}, "batch_size is 4: .* multiple of the number of processes, 3"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2: it must be below 2"),
        ({"size": 1}, "has 1 of the 8 tokens"),
    ],
)
def test_batches_refuse_wrong_sizes(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        _batches(**fields)


def test_wrong_arrays_and_indices_are_refused():
    with pytest.raises(ValueError, match="flat array of whole numbers, not float64"):
        Batches(np.zeros(100), batch_size=4, sequence_len=7, seed=3)
    with pytest.raises(ValueError, match=r"whole numbers, not int64 of shape \(2, 50\)"):
        eval_chunks(np.arange(100).reshape(2, 50), 7)
    with pytest.raises(ValueError, match="batch index is -1"):
        _batches().batch(-1)


# Evaluation chunks.


def _replay(chunks, rows: int) -> list[np.ndarray]:
    """Every stream put together again: its first token, then its targets."""
    streams: list[list[int]] = [[] for _ in range(rows)]
    for inputs, targets, lengths in chunks:
        for row, (stream, n) in enumerate(zip(streams, lengths, strict=True)):
            if n and not stream:
                stream.append(inputs[row, 0])
            if n:
                assert inputs[row, 0] == stream[-1]  # it continues where it stopped
            np.testing.assert_array_equal(inputs[row, 1:n], targets[row, : max(n - 1, 0)])
            stream.extend(targets[row, :n])
            assert not inputs[row, n:].any() and not targets[row, n:].any()
    return [np.array(stream) for stream in streams]


@many
@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 120))
def test_eval_scores_every_token_once(rows, chunk_len, extra):
    tokens = np.arange(1, 2 * rows + extra + 1)
    chunks = list(eval_chunks(tokens, chunk_len, rows))
    for chunk in chunks:
        assert chunk.inputs.shape == chunk.targets.shape == (rows, chunk_len)
        assert chunk.lengths.shape == (rows,)
        assert {a.dtype.name for a in chunk} == {"int32"}
    np.testing.assert_array_equal(np.concatenate(_replay(chunks, rows)), tokens)
    assert sum(int(c.lengths.sum()) for c in chunks) == len(tokens) - rows
    assert all(c.lengths.any() for c in chunks)  # none is all padding
    if len(chunks) > 1:
        with pytest.raises(AssertionError):
            _replay(chunks[1::-1], rows)


def test_eval_refuses_at_once():
    with pytest.raises(DataError, match=r"there are 1 of the 2 tokens .*: use a larger file"):
        eval_chunks(np.zeros(1, np.uint8), 8)  # and not only when first drawn from
    with pytest.raises(DataError, match="5 of the 6 tokens that evaluation needs, two for each"):
        eval_chunks(np.arange(5), 8, rows=3)
    with pytest.raises(ValueError, match="chunk_len is 0"):
        eval_chunks(np.arange(5), 0)


# The world outside.


def test_import_leaves_grain_for_later():
    script = "import sys, transformer_vq.data; print('grain' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert printed.stdout.strip() == b"False"


def test_a_book():
    tokens = load_bytes(bundled_corpus())
    decoder = StreamDecoder()
    head = tokens[:20_000]
    assert "".join(decoder.push(t) for t in head) + decoder.flush() == BYTES.decode_text(head)
    train = split(tokens, "train")
    batch = Batches(train, batch_size=2, sequence_len=512, seed=0).batch(12345)
    for row in batch.inputs:
        assert row.astype(np.uint8).tobytes() in train.tobytes()
    test = split(tokens, "test")
    chunks = eval_chunks(test, 1000, rows=2)
    assert sum(int(c.lengths.sum()) for c in chunks) == len(test) - 2


def test_enwik8(shared_data):
    tokens = load_bytes(shared_data / "enwik8.gz")
    assert tokens.shape == (100_000_000,)
    assert fingerprint(tokens) == "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
    assert len(split(tokens, "test")) == 5_000_000
