"""Losses of tokens, summed by how much history they had, and what the far part brings to them."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

# Where the bins of positions begin: 0, 64, 128, 256, ...
BIN_STARTS = np.concatenate([[0], 64 << np.arange(48)])


BLOCK = 64  # tokens that are taken as one observation: what is next to each other is alike
LEAST_BLOCKS = 8  # for a standard error


@dataclass(frozen=True)
class Gain:
    """By how much the far part of a model lowers the loss of the same tokens, in nats per token."""

    nats: float
    error: float | None  # standard error, from blocks of `BLOCK` tokens; None for too few of them


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # nats per token
    tokens: int  # that were predicted, of those that count
    by_position: list[tuple[int, int, float]]  # (start, end, loss): with start <= history < end
    bytes_per_token: float = 1.0  # of the original data
    accuracy: float | None = None  # how often the likeliest token came; of `Source.counted` only
    far_gain: Gain | None = None  # with `far_gain`
    far_gain_by_position: list[Gain] | None = None  # one for each of `by_position`

    @property
    def bpb(self) -> float:
        """Bits per byte of the original data."""
        return self.loss / math.log(2.0) / self.bytes_per_token


class Scores(NamedTuple):
    """Of a chunk, `[rows, chunk_len]`, meaningless beyond the length of a row."""

    nll: jax.Array  # nats
    hits: jax.Array | None  # bool: the token was the likeliest; None if it was not asked


class Sums:
    """Sums of scores, and how many there are, by how much history they had."""

    def __init__(self) -> None:
        self._nll = np.zeros(len(BIN_STARTS))
        self._counts = np.zeros(len(BIN_STARTS), np.int64)
        self._hits: int | None = None

    @property
    def tokens(self) -> int:
        return int(self._counts.sum())

    def add(self, scores: Scores, history: np.ndarray, counted: np.ndarray) -> None:
        """Add the scores `[rows, width]` where they count, each with so much history."""
        bins = _bins(history[counted])
        nll = np.asarray(scores.nll, np.float64)[counted]
        self._nll += np.bincount(bins, nll, len(BIN_STARTS))
        self._counts += np.bincount(bins, minlength=len(BIN_STARTS))
        if scores.hits is not None:
            self._hits = (self._hits or 0) + int(np.asarray(scores.hits)[counted].sum())

    def result(self, longest: int, bytes_per_token: float) -> Evaluation:
        """The means; no history was longer than `longest`."""
        ends = np.minimum(BIN_STARTS[1:], longest)
        return Evaluation(
            loss=float(self._nll.sum() / self._counts.sum()),
            tokens=self.tokens,
            by_position=[
                (int(BIN_STARTS[i]), int(ends[i]), float(self._nll[i] / self._counts[i]))
                for i in np.flatnonzero(self._counts)
            ],
            bytes_per_token=bytes_per_token,
            accuracy=None if self._hits is None else self._hits / self.tokens,
        )


class Gains:
    """Differences of losses, of the same tokens with and without something, by blocks.

    A block is what is counted of up to `BLOCK` tokens in a row whose histories are between two
    multiples of it. The mean over all tokens of a bin is a ratio of sums over its blocks, and its
    standard error that of such a ratio, with blocks as what was drawn (not tokens: neighbours are
    alike).
    """

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[int, float, int]] = {}  # by place: history, sum, tokens

    def add(
        self, gain: np.ndarray, history: np.ndarray, counted: np.ndarray, positions: np.ndarray
    ) -> None:
        """Add differences `[rows, width]` where they count, of tokens at these positions."""
        history, places = history[counted], (positions - history % BLOCK)[counted]
        found, first, index = np.unique(places, return_index=True, return_inverse=True)
        sums, counts = np.bincount(index, gain[counted]), np.bincount(index)
        for place, i, total, count in zip(found.tolist(), first, sums, counts, strict=True):
            _, before, tokens = self._blocks.get(place, (0, 0.0, 0))
            self._blocks[place] = int(history[i]), before + float(total), tokens + int(count)

    def added_to(self, result: Evaluation) -> Evaluation:
        """The evaluation of the same tokens, with the gains."""
        history, sums, counts = map(np.array, zip(*self._blocks.values(), strict=True))
        bins = _bins(history)
        return replace(
            result,
            far_gain=_ratio(sums, counts),
            far_gain_by_position=[
                _ratio(sums[bins == i], counts[bins == i]) for i in np.unique(bins)
            ],
        )


def _bins(history: np.ndarray) -> np.ndarray:
    """In which bin of positions each history is."""
    return np.searchsorted(BIN_STARTS, history, side="right") - 1


def _ratio(sums: np.ndarray, counts: np.ndarray) -> Gain:
    """The mean per token of blocks `[n]` with these sums and numbers of tokens."""
    mean, n = float(sums.sum() / counts.sum()), len(sums)
    if n < LEAST_BLOCKS:
        return Gain(mean, None)
    spread = np.square(sums - mean * counts).sum() * n / (n - 1)
    return Gain(mean, float(np.sqrt(spread) / counts.sum()))
