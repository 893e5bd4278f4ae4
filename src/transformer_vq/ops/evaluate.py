"""Stateful evaluation: every token is predicted from the entire history before it."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from transformer_vq.config import ModelConfig
from transformer_vq.data import (
    EvalChunk,
    Source,
    as_source,
    check_tokens,
    eval_chunks,
    row_starts,
)
from transformer_vq.errors import UserError, require_kind
from transformer_vq.fields import require_count
from transformer_vq.nn.forward import forward
from transformer_vq.nn.model import Model, State, init_state
from transformer_vq.ops.loss import token_nll
from transformer_vq.sharding import replicated, rows_or_whole, traced_on
from transformer_vq.types import PerRow, Tokens

Scored = TypeVar("Scored")

# Where the bins of positions begin: 0, 64, 128, 256, ...
BIN_STARTS = np.concatenate([[0], 64 << np.arange(48)])


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # nats per token
    tokens: int  # that were predicted
    by_position: list[tuple[int, int, float]]  # (start, end, loss): with start <= history < end
    bytes_per_token: float = 1.0  # of the original data

    @property
    def bpb(self) -> float:
        """Bits per byte of the original data."""
        return self.loss / math.log(2.0) / self.bytes_per_token


def evaluate(
    model: Model,
    tokens: np.ndarray | Source,
    *,
    chunk_len: int = 2048,
    rows: int = 1,
    max_tokens: int | None = None,
    context_len: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `tokens`, a chunk at a time, with the state carried through all of them.

    Up to float rounding, the numbers depend neither on `chunk_len` nor on `config.block_len`.
    Where the model resets at documents, and for pictures in any case, a token's history begins
    with its document. The start tokens of pictures are given, and not predicted.

    Args:
      model: neither changed nor donated. If it lives on a mesh, so does the work: rows are spread
        over the devices if their number divides, and done by all alike if not.
      tokens: a source, or bare integers `[N]`; below `config.vocab_size`. The first of each row is
        not predicted.
      chunk_len: tokens of each row in one call: more need more memory.
      rows: streams that the tokens are cut into and that are scored side by side, each with a
        history of its own.
      max_tokens: how many to predict, from the beginning on; all by default.
      context_len: forget everything after so many tokens, again and again; a multiple of
        `chunk_len`. Never, by default; full attention must, for more tokens than it can hold.
      on_progress: called with the number of tokens scored, and of all. What it raises ends it.

    Raises:
      DataError: for fewer than two tokens in a row.
      ValueError: for a token outside of the vocabulary, and for sizes that make no sense.
    """
    require_kind("model", model, Model, "from init_model or of a run (load)")
    source = as_source(tokens)
    streams = Streams.of(source, rows, max_tokens)
    check_tokens(streams.tokens, model.config.vocab_size)
    if streams.alone:
        model = Model(model.params, model.codebook, model.config.replace(reset_at_document=True))
        if model.config.attention == "full":
            chunk_len = context_len = streams.longest_document
    chunks = streams.chunks(chunk_len)
    context_len = _check_context(model.config, context_len, chunk_len, streams.longest_row)
    losses = LossByPosition()

    def scored() -> Iterator[tuple[int, np.ndarray, jax.Array]]:
        """Where each chunk begins in its row, how much of it is real, and its losses."""
        resets = model.config.reset_at_document and (streams.alone or len(streams.documents) > 1)
        mesh = _mesh_of(model)
        new_state = _state_maker(model, rows, min(context_len, streams.longest_row), mesh)
        state = new_state()
        for i, chunk in enumerate(chunks):
            start = i * chunk_len
            if i and start % context_len == 0:
                state = new_state()
            ids = streams.document_ids(start, chunk.inputs.shape[1]) if resets else None
            nll, state = _score(model, state, *chunk, ids, mesh)
            yield start, chunk.lengths, nll

    for start, lengths, nll in _one_behind(scored()):
        history, counted = streams.look(start, lengths, nll.shape[1], context_len)
        losses.add(np.asarray(nll, np.float64), history, counted)
        if on_progress is not None:
            on_progress(losses.tokens, streams.total)
    return losses.result(min(context_len, streams.longest_history), source.bytes_per_token)


@dataclass(frozen=True)
class Streams:
    """Tokens as rows that are scored side by side, and the documents that they are of."""

    tokens: np.ndarray  # [N]
    documents: np.ndarray  # [documents]: where each begins
    rows: np.ndarray  # [rows]: where each begins
    alone: bool  # a history begins with each document, whose first token is given (pictures)

    @classmethod
    def of(cls, source: Source, rows: int, max_tokens: int | None) -> "Streams":
        """`rows` streams of a source, or of its first tokens, of which `max_tokens` are predicted.

        Raises `UserError` for `rows` or `max_tokens` below 1.
        """
        require_count("rows", rows)
        tokens, documents = source.tokens, source.starts
        alone = source.image_shape is not None
        if max_tokens is not None:
            require_count("max_tokens", max_tokens)
            tokens = tokens[: max_tokens + rows]
            documents = documents[documents < len(tokens)]
        # Rows of text are cut anywhere.
        first = row_starts(len(tokens), rows, documents if alone else None)
        return cls(tokens, documents, first, alone)

    @property
    def total(self) -> int:
        """How many tokens are predicted."""
        return len(self.tokens) - len(self.documents if self.alone else self.rows)

    @property
    def longest_row(self) -> int:
        """The tokens of the longest row that are predicted, 1 at least."""
        return max(self._longest(self.rows) - 1, 1)

    @property
    def longest_document(self) -> int:
        return self._longest(self.documents)

    @property
    def longest_history(self) -> int:
        return self.longest_document - 1 if self.alone else self.longest_row

    def _longest(self, starts: np.ndarray) -> int:
        return int(np.diff(starts, append=len(self.tokens)).max())

    def chunks(self, chunk_len: int) -> Iterator[EvalChunk]:
        """All rows, so many tokens of each at a time: fewer if the rows are shorter."""
        require_count("chunk_len", chunk_len)
        size = min(chunk_len, self.longest_row)  # padding costs as tokens do
        cuts = self.documents if self.alone else None
        return eval_chunks(self.tokens, size, len(self.rows), cuts)

    def document_ids(self, start: int, width: int) -> np.ndarray:
        """Which document each token is of, `[rows, width]`, of the chunk that begins at `start`."""
        return self._document_of(self._positions(start, width)).astype(np.int32)

    def look(
        self, start: int, lengths: np.ndarray, width: int, context_len: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The history of each prediction of a chunk, in tokens, and whether it counts.

        Both are `[rows, width]`; `lengths` `[rows]` says how much of each row is real.
        """
        columns = np.arange(width)
        real = columns < lengths[:, None]
        if not self.alone:
            return np.broadcast_to(start % context_len + columns, real.shape), real
        positions = self._positions(start, width)
        document = self._document_of(positions)
        inside = document == self._document_of(positions + 1)  # the next one is not a given token
        return positions - self.documents[document], real & inside

    def _positions(self, start: int, width: int) -> np.ndarray:
        return self.rows[:, None] + start + np.arange(width)

    def _document_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.documents, positions, side="right") - 1


class LossByPosition:
    """Sums of losses, and how many there are, by how much history they had."""

    def __init__(self) -> None:
        self._sums = np.zeros(len(BIN_STARTS))
        self._counts = np.zeros(len(BIN_STARTS), np.int64)

    @property
    def tokens(self) -> int:
        return int(self._counts.sum())

    def add(self, nll: np.ndarray, history: np.ndarray, counted: np.ndarray) -> None:
        """Add the losses `[rows, width]` where they count, each with so much history."""
        bins = (np.searchsorted(BIN_STARTS, history, side="right") - 1)[counted]
        self._sums += np.bincount(bins, nll[counted], len(BIN_STARTS))
        self._counts += np.bincount(bins, minlength=len(BIN_STARTS))

    def result(self, longest: int, bytes_per_token: float) -> Evaluation:
        """The means; no history was longer than `longest`."""
        ends = np.minimum(BIN_STARTS[1:], longest)
        return Evaluation(
            loss=float(self._sums.sum() / self._counts.sum()),
            tokens=self.tokens,
            by_position=[
                (int(BIN_STARTS[i]), int(ends[i]), float(self._sums[i] / self._counts[i]))
                for i in np.flatnonzero(self._counts)
            ],
            bytes_per_token=bytes_per_token,
        )


def _one_behind(items: Iterable[Scored]) -> Iterator[Scored]:
    """The same items, each when the next one is made: the device is then busy with that one."""
    last: list[Scored] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


def _mesh_of(model: Model) -> Mesh | None:
    """The mesh that the model lives on; None for one device."""
    where = getattr(model.params["embedding"], "sharding", None)
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) and where.mesh.size > 1:
        return where.mesh
    return None


@functools.partial(jax.jit, donate_argnames="state", static_argnames="mesh")
def _score(
    model: Model,
    state: State,
    inputs: Tokens,
    targets: Tokens,
    lengths: PerRow,
    document_ids: Tokens | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, State]:
    """Losses `[rows, chunk_len]` in nats, meaningless beyond the length of a row; the new state."""
    with traced_on(mesh):
        out = forward(model, state, inputs, lengths=lengths, document_ids=document_ids)
        nll = token_nll(model, out.features, targets)
    if mesh is None:
        return nll, out.state
    shardings = (replicated(mesh), rows_or_whole(mesh, len(inputs)))
    return jax.lax.with_sharding_constraint((nll, out.state), shardings)


def _check_context(
    config: ModelConfig, context_len: int | None, chunk_len: int, longest: int
) -> int:
    """The number of tokens after which the state starts anew."""
    if context_len is None:
        most = config.default_capacity
        if most is not None and longest > most:
            raise UserError(
                f"a row has {longest:,} tokens, too many for full attention: "
                f"give a context_len of {most:,} or less"
            )
        return chunk_len * -(-longest // chunk_len)
    if context_len < 1 or context_len % chunk_len:
        raise UserError(
            f"context_len is {context_len}: it must be a multiple of chunk_len, {chunk_len}"
        )
    return context_len


def _state_maker(model: Model, rows: int, room: int, mesh: Mesh | None) -> Callable[[], State]:
    """A function that makes fresh states with room for so many tokens, where the model is."""
    make = init_state
    if mesh is not None:
        place = rows_or_whole(mesh, rows)
        make = jax.jit(
            init_state, static_argnums=(0, 1), static_argnames="room", out_shardings=place
        )
    return functools.partial(make, model.config, rows, room=room)
