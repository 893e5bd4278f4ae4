"""Feeds of fixed-shape arrays: rows to train on, contiguous chunks to evaluate on."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from transformer_vq.config import TrainConfig
from transformer_vq.data.source import Source
from transformer_vq.data.text import DataError, require_length
from transformer_vq.errors import ConfigError, UserError
from transformer_vq.fields import require_count

if TYPE_CHECKING:  # grain takes over half a second to import: only those who train pay for it
    import grain


UNASKED = -1  # in place of a target that is read later, but need not be foretold
SHORTEST, LONGEST = 8, 100  # tokens of a passage that comes again
UNFORESEEN = 4  # tokens that nobody can foretell, where the text leaps to another place


class Batch(NamedTuple):
    """Rows to train on."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]: the token after each input; UNASKED: it does not count
    loss_mask: np.ndarray  # bool [B, T]: which targets there are; the rest is padding
    document_ids: np.ndarray  # int32 [B, T]: which document of the data; never falling along a row
    starts: np.ndarray | None = None  # bool [B]: rows that do not go on where they were; None: all


class EvalChunk(NamedTuple):
    """The next chunk of every evaluation stream. Beyond its length a row is padding (zeros)."""

    inputs: np.ndarray  # int32 [rows, chunk_len]
    targets: np.ndarray  # int32 [rows, chunk_len]: the token after each input
    lengths: np.ndarray  # int32 [rows]: real tokens per row, 0 once a stream is used up


@dataclass(frozen=True, eq=False)
class Batches:
    """An endless sequence of training batches, addressed by index.

    Batch i is a pure function of the fields and i, in any process and at any time, so an index
    is all that a checkpoint needs. There are three ways to make rows:

    - The text is cut into windows of `sequence_len` targets, whatever documents are in them. Every
      epoch cuts at a new random offset and takes every window once, in a new order; a batch may
      span epochs, so none is dropped.
    - `streaming`: the text is cut evenly into `batch_size` streams, and row r of a batch continues
      row r of the one before, but at the end of its stream, where it begins anew (`starts`).
    - `whole_documents`: a row is a document (a picture, an episode of a task), each once an epoch,
      in a new order.

    A row that is shorter than `sequence_len` is padded with zeros, which the loss mask leaves out.
    Of targets that are not `counted` (bool `[N]`; by default all are), UNASKED stands in place.

    In a share `repeat_passages` of the rows, chosen at random, passages come again in place of
    later text of the same document: a model that sees such text learns to copy from its past. What
    nobody can foretell there, as a passage begins and ends, is UNASKED. Batches from index
    `repeats_end` on have none: a run ends with text as it is.

    `tokens` is an integer array `[N]`, memory-mapped or not; `starts`, integers `[documents]`, says
    where documents begin in it, the first at 0. `batch_size` is global: of several processes, each
    gets its own share of the rows. Raises `DataError` if there are fewer than two tokens (when
    streaming, two for each row), or a document is too long for a row; `ValueError` for sizes that
    make no sense, and for whole documents in which passages are to come again.
    """

    tokens: np.ndarray
    _: KW_ONLY
    batch_size: int
    sequence_len: int
    seed: int
    starts: np.ndarray | None = None
    counted: np.ndarray | None = None
    streaming: bool = False
    whole_documents: bool = False
    repeat_passages: float = 0.0
    repeats_end: int | None = None  # None: never
    process_index: int = 0
    process_count: int = 1

    @classmethod
    def of(
        cls, source: Source, train: TrainConfig, process_index: int = 0, process_count: int = 1
    ) -> Self:
        """Those of a source, as a recipe wants them."""
        return cls(
            source.tokens,
            starts=source.starts,
            counted=source.counted,
            whole_documents=source.whole_documents,
            streaming=train.streaming,
            repeat_passages=train.repeat_passages,
            repeats_end=train.steps * 3 // 4,
            batch_size=train.batch_size,
            sequence_len=train.sequence_len,
            seed=train.seed,
            process_index=process_index,
            process_count=process_count,
        )

    def __post_init__(self) -> None:
        _require_flat(self.tokens)
        for name, low in _AT_LEAST.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {low}")
        if self.batch_size % self.process_count:
            raise UserError(
                f"batch_size is {self.batch_size}: "
                f"it must be a multiple of the number of processes, {self.process_count}"
            )
        if self.process_index >= self.process_count:
            raise UserError(
                f"process_index is {self.process_index}: it must be below {self.process_count}"
            )
        require_length(self.tokens, self.sequence_len)
        if self.streaming and self.whole_documents:
            raise ConfigError(
                "streaming is for text: whole documents do not go on in the next row", "streaming"
            )
        if self.repeat_passages and self.whole_documents:
            raise UserError(
                f"repeat_passages is {self.repeat_passages:g}, but a row is a whole document here "
                f"(a picture, an episode), which stays as it is: use 0"
            )
        if self.streaming and not self._stream_len:
            raise DataError(
                f"there are {len(self.tokens):,} of the {self.batch_size + 1:,} tokens that "
                f"{self.batch_size:,} streams need: use a smaller batch or a larger file"
            )
        if self.whole_documents and (longest := int(self._lengths.max())) > self.sequence_len + 1:
            raise DataError(
                f"a document has {longest - 1:,} tokens to predict: sequence_len is "
                f"{self.sequence_len}, and must be as long"
            )

    @property
    def num_windows(self) -> int:
        """Rows in an epoch; of one stream, if there are streams.

        Of text, as many as fit, wherever in the first window the cutting starts.
        """
        if self.whole_documents:
            return len(self._starts)
        if self.streaming:
            return max(1, self._stream_len // self.sequence_len)
        return max(1, len(self.tokens) // self.sequence_len - 1)

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`, [batch_size / process_count, sequence_len]."""
        if index < 0:
            raise UserError(f"the batch index is {index}: it must be at least 0")
        count = self.batch_size // self.process_count
        first = self.process_index * count
        numbers = range(first, first + count)
        rows = [self._row(index, row) for row in numbers]
        windows = np.zeros((count, self.sequence_len + 1), np.int32)
        targets = np.zeros((count, self.sequence_len), np.int32)
        for row, window, target, (start, stop) in zip(numbers, windows, targets, rows, strict=True):
            size = stop - start
            window[:size] = self.tokens[start:stop]
            asked = np.ones(size, bool) if self.counted is None else self.counted[start:stop].copy()
            if bits := self._repeats(index, row):
                end = self._document_end(start, stop) - start
                repeat(window[:end], asked[:end], bits)
            target[: size - 1] = np.where(asked[1:], window[1:size], UNASKED)
        places = np.arange(self.sequence_len)
        starts, stops = np.array(rows)[:, :, None].transpose(1, 0, 2)
        documents = np.searchsorted(self._starts, starts + places, side="right") - 1
        return Batch(
            inputs=np.ascontiguousarray(windows[:, :-1]),
            targets=targets,
            loss_mask=places + 1 < stops - starts,
            document_ids=documents.astype(np.int32),
            starts=np.full(count, not self.streaming or index % self.num_windows == 0),
        )

    def iterate(self, start_index: int = 0) -> Iterator[Batch]:
        """Batches `start_index`, `start_index` + 1, ... for ever, made ahead in a thread."""
        import grain

        batches = grain.MapDataset.range(start_index, 2**62).map(self.batch)
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        stream = iter(batches.to_iter_dataset(ahead))
        try:
            yield from stream
        finally:
            stream.close()

    @cached_property
    def _order(self) -> "grain.MapDataset[int]":
        """Position in the endless sequence of windows -> window of that epoch."""
        import grain

        # grain reshuffles every epoch of a repeated shuffle, with the seed plus the epoch. The
        # seed is hashed first, or epoch 1 of seed 0 would have the order of epoch 0 of seed 1.
        return grain.MapDataset.range(self.num_windows).shuffle(_draw(self.seed, 2**32)).repeat()

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.zeros(1, np.int64) if self.starts is None else np.asarray(self.starts)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.diff(self._starts, append=len(self.tokens))

    @property
    def _stream_len(self) -> int:
        """Targets of each stream."""
        return (len(self.tokens) - 1) // self.batch_size

    def _row(self, index: int, row: int) -> tuple[int, int]:
        """Where a row of the global batch is in the tokens, from start to stop."""
        if self.streaming:
            lap, window = divmod(index, self.num_windows)
            base, end = row * self._stream_len, (row + 1) * self._stream_len
            start = base + self._offset(self._stream_len, lap) + window * self.sequence_len
            return start, min(start + self.sequence_len, end) + 1
        position = index * self.batch_size + row
        window = self._order[position]
        assert window is not None  # grain gives None for what a filter drops: there is no filter
        if self.whole_documents:
            start = int(self._starts[window])
            return start, start + int(self._lengths[window])
        offset = self._offset(len(self.tokens) - 1, position // self.num_windows)
        start = offset + window * self.sequence_len
        return start, min(start + self.sequence_len + 1, len(self.tokens))

    def _repeats(self, index: int, row: int) -> np.random.PCG64 | None:
        """The random bits of a row in which passages come again; None for any other row."""
        if not self.repeat_passages or (self.repeats_end is not None and index >= self.repeats_end):
            return None
        position = index * self.batch_size + row
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, position, 1)))
        return bits if bits.random_raw() < self.repeat_passages * 2**64 else None

    def _document_end(self, start: int, stop: int) -> int:
        """Where the document that has token `start` ends, `stop` at most."""
        following = np.searchsorted(self._starts, start, side="right")
        return min(stop, int(self._starts[following])) if following < len(self._starts) else stop

    def _offset(self, targets: int, epoch: int) -> int:
        """Where the cutting of so many targets into windows begins, of those that leave room."""
        slack = max(0, targets - self.num_windows * self.sequence_len)
        return _draw(self.seed, slack + 1, epoch)


def repeat(text: np.ndarray, asked: np.ndarray, bits: np.random.PCG64) -> None:
    """Put passages of `text` in place of later ones.

    Half of it, about, is new and half has been there before. Short passages and short ways back
    are likelier than long ones: copying is learned from those first (docs/log.md). Tokens of
    which no past tells that they come are not `asked`: the first ones of a passage, and those
    after the first token that does not go on with it.
    """

    def below(limit: int) -> int:  # small numbers are likelier than large ones
        first, second = bits.random_raw(2)
        return int(second) % (1 + int(first) % limit)

    place = 0
    while True:
        place += SHORTEST + below(LONGEST - SHORTEST + 1)
        size = SHORTEST + below(LONGEST - SHORTEST + 1)
        if place >= len(text):
            return
        size = min(size, place, len(text) - place)
        start = place - size - below(place - size + 1)
        text[place : place + size] = text[start : start + size]
        asked[place : place + UNFORESEEN] = False
        place += size
        asked[place + 1 : place + UNFORESEEN] = False


def eval_chunks(
    tokens: np.ndarray, chunk_len: int, rows: int = 1, starts: np.ndarray | None = None
) -> Iterator[EvalChunk]:
    """`tokens` `[N]` as `rows` contiguous streams, a chunk of each at a time, in order.

    Row r of a chunk continues row r of the one before: carry the state across, and with one row
    the context of a token is the entire history. Every token but the first of each stream is a
    target exactly once, N - rows in all. The streams begin at `row_starts(N, rows, starts)`.
    Raises `DataError` if a stream has nothing to predict.
    """
    _require_flat(tokens)
    for name, value in (("chunk_len", chunk_len), ("rows", rows)):
        require_count(name, value)
    if len(tokens) < 2 * rows:
        raise DataError(
            f"there are {len(tokens):,} of the {2 * rows:,} tokens that evaluation needs, "
            f"two for each of {rows:,} rows: use a larger file"
        )
    streams = np.split(tokens, row_starts(len(tokens), rows, starts)[1:])
    return _chunks(streams, chunk_len)  # apart, so that errors come now and not at first use


def row_starts(size: int, rows: int, starts: np.ndarray | None = None) -> np.ndarray:
    """Where `rows` even parts of `size` tokens begin; with `starts`, each where a document does.

    Raises `DataError` if there are fewer documents than rows.
    """
    if starts is None:
        return np.arange(rows) * (size // rows) + np.minimum(np.arange(rows), size % rows)
    if len(starts) < rows:
        raise DataError(f"there are {len(starts):,} documents for {rows:,} rows: use fewer rows")
    return np.asarray(starts)[np.arange(rows) * len(starts) // rows]


def _chunks(streams: list[np.ndarray], chunk_len: int) -> Iterator[EvalChunk]:
    rows = len(streams)
    for start in range(0, max(map(len, streams)) - 1, chunk_len):
        inputs = np.zeros((rows, chunk_len), np.int32)
        targets = np.zeros_like(inputs)
        lengths = np.zeros(rows, np.int32)
        for row, stream in enumerate(streams):
            chunk = stream[start : start + chunk_len + 1]
            lengths[row] = max(len(chunk) - 1, 0)
            inputs[row, : lengths[row]] = chunk[:-1]
            targets[row, : lengths[row]] = chunk[1:]
        yield EvalChunk(inputs, targets, lengths)


def _draw(seed: int, below: int, *counters: int) -> int:
    """A number in [0, `below`), a fixed function of its arguments in every version of NumPy."""
    words = np.random.SeedSequence((seed, *counters)).generate_state(1, np.uint64)
    return int(words[0]) % below


def _require_flat(tokens: np.ndarray) -> None:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(
            f"tokens must be a flat array of whole numbers, "
            f"not {tokens.dtype} of shape {tokens.shape}"
        )


_AT_LEAST = {"batch_size": 1, "sequence_len": 1, "seed": 0, "process_index": 0, "process_count": 1}
