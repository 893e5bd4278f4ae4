"""Feeds of fixed-shape arrays: shuffled windows to train on, contiguous chunks to evaluate on."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from transformer_vq.data.text import DataError, require_length

if TYPE_CHECKING:  # grain takes over half a second to import: only those who train pay for it
    import grain


class Batch(NamedTuple):
    """Rows to train on."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]: the token after each input
    loss_mask: np.ndarray  # bool [B, T]: which targets count
    document_ids: np.ndarray  # int32 [B, T]: never falling along a row
    starts: np.ndarray | None = None  # bool [B]: rows that do not go on where they were; None: all


class EvalChunk(NamedTuple):
    """The next piece of every evaluation stream. Beyond its length a row is padding (zeros)."""

    inputs: np.ndarray  # int32 [rows, chunk_len]
    targets: np.ndarray  # int32 [rows, chunk_len]: the token after each input
    lengths: np.ndarray  # int32 [rows]: real tokens per row, 0 once a stream is used up


@dataclass(frozen=True, eq=False)
class Batches:
    """An endless, shuffled sequence of training batches, addressed by index.

    Batch i is a pure function of the fields and i, in any process and at any time, so an index
    is all that a checkpoint needs. The text is cut into windows of `sequence_len` targets. Every
    epoch cuts at a new random offset and takes every window once, in a new order; a batch may
    span epochs, so none is dropped.

    `tokens` is an integer array `[N]`, memory-mapped or not. `batch_size` is global: of several
    processes, each gets its own share of the rows. Raises `DataError` if the text is shorter
    than one window, `ValueError` for sizes that make no sense.
    """

    tokens: np.ndarray
    _: KW_ONLY
    batch_size: int
    sequence_len: int
    seed: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        _require_flat(self.tokens)
        for name, low in _AT_LEAST.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {low}")
        if self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size is {self.batch_size}: "
                f"it must be a multiple of the number of processes, {self.process_count}"
            )
        if self.process_index >= self.process_count:
            raise ValueError(
                f"process_index is {self.process_index}: it must be below {self.process_count}"
            )
        require_length(self.tokens, self.sequence_len)

    @property
    def num_windows(self) -> int:
        """Windows in an epoch: as many as fit, wherever in the first window the cutting starts."""
        return max(1, len(self.tokens) // self.sequence_len - 1)

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`, [batch_size / process_count, sequence_len]."""
        if index < 0:
            raise ValueError(f"the batch index is {index}: it must be at least 0")
        rows = self.batch_size // self.process_count
        first = index * self.batch_size + self.process_index * rows
        windows = np.stack([self._window(first + row) for row in range(rows)])
        inputs = windows[:, :-1].astype(np.int32)
        return Batch(
            inputs=inputs,
            targets=windows[:, 1:].astype(np.int32),
            loss_mask=np.ones(inputs.shape, np.bool_),
            document_ids=np.zeros_like(inputs),
            starts=np.ones(rows, np.bool_),
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

    def _window(self, position: int) -> np.ndarray:
        """The tokens `[T + 1]` at a position in the endless sequence of windows."""
        epoch = position // self.num_windows
        slack = len(self.tokens) - 1 - self.num_windows * self.sequence_len
        offset = _draw(self.seed, slack + 1, epoch)
        window = self._order[position]
        assert window is not None  # grain gives None for what a filter drops: there is no filter
        start = offset + window * self.sequence_len
        return self.tokens[start : start + self.sequence_len + 1]


def eval_chunks(tokens: np.ndarray, chunk_len: int, rows: int = 1) -> Iterator[EvalChunk]:
    """`tokens` `[N]` as `rows` contiguous streams, a chunk of each at a time, in order.

    Row r of a chunk continues row r of the one before: carry the state across, and with one row
    the context of a token is the entire history. Every token but the first of each stream is a
    target exactly once, N - rows in all. Raises `DataError` if a stream has nothing to predict.
    """
    _require_flat(tokens)
    for name, value in (("chunk_len", chunk_len), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if len(tokens) < 2 * rows:
        raise DataError(
            f"there are {len(tokens):,} of the {2 * rows:,} tokens that evaluation needs, "
            f"two for each of {rows:,} rows: use a larger file"
        )
    return _chunks(tokens, chunk_len, rows)  # apart, so that errors come now and not at first use


def _chunks(tokens: np.ndarray, chunk_len: int, rows: int) -> Iterator[EvalChunk]:
    streams = np.array_split(tokens, rows)  # views, the longer ones first
    for start in range(0, len(streams[0]) - 1, chunk_len):
        inputs = np.zeros((rows, chunk_len), np.int32)
        targets = np.zeros_like(inputs)
        lengths = np.zeros(rows, np.int32)
        for row, stream in enumerate(streams):
            piece = stream[start : start + chunk_len + 1]
            lengths[row] = max(len(piece) - 1, 0)
            inputs[row, : lengths[row]] = piece[:-1]
            targets[row, : lengths[row]] = piece[1:]
        yield EvalChunk(inputs, targets, lengths)


def _draw(seed: int, below: int, *counters: int) -> int:
    """A number in [0, `below`), a fixed function of its arguments in every version of NumPy."""
    words = np.random.SeedSequence((seed, *counters)).generate_state(1, np.uint64)
    return int(words[0]) % below


def _require_flat(tokens: np.ndarray) -> None:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be a flat array of whole numbers, "
            f"not {tokens.dtype} of shape {tokens.shape}"
        )


_AT_LEAST = {"batch_size": 1, "sequence_len": 1, "seed": 0, "process_index": 0, "process_count": 1}
