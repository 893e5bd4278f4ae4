"""Stateful evaluation: every token is predicted from the entire history before it."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from transformer_vq.config import ModelConfig
from transformer_vq.data import Source, as_source, check_tokens, eval_chunks, row_starts
from transformer_vq.errors import UserError
from transformer_vq.nn.model import DEFAULT_CAPACITY, Model, State, forward, init_state
from transformer_vq.ops.loss import token_nll
from transformer_vq.sharding import replicated, rows_or_whole, traced_on
from transformer_vq.types import PerRow, Tokens

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
    source = as_source(tokens)
    tokens, starts, pictures = source.tokens, source.starts, source.image_shape is not None
    if pictures:
        config = model.config.replace(reset_at_document=True)
        model = Model(model.params, model.codebook, config)
        if config.attention == "full":
            chunk_len = context_len = int(np.diff(starts, append=len(tokens)).max())
    if max_tokens is not None:
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}: it must be at least 1")
        tokens = tokens[: max_tokens + rows]
        starts = starts[starts < len(tokens)]
    resets = model.config.reset_at_document and (pictures or len(starts) > 1)
    check_tokens(tokens, model.config.vocab_size)
    cuts = starts if pictures else None  # rows of text are cut anywhere
    first = row_starts(len(tokens), max(rows, 1), cuts)[:, None]
    longest = max(int(np.diff(first[:, 0], append=len(tokens)).max()) - 1, 1)
    total = len(tokens) - (len(starts) if pictures else rows)
    chunks = eval_chunks(tokens, min(chunk_len, longest), rows, cuts)  # padding costs as tokens do
    context_len = _check_context(model.config, context_len, chunk_len, longest)
    where = getattr(model.params["embedding"], "sharding", None)
    mesh = None
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) and where.mesh.size > 1:
        mesh = where.mesh
    new_state = _state_maker(model, rows, min(context_len, longest), mesh)
    sums, counts = np.zeros(len(BIN_STARTS)), np.zeros(len(BIN_STARTS), np.int64)

    def documents(places: np.ndarray) -> np.ndarray:
        """Which document each place is in."""
        return np.searchsorted(starts, places, side="right") - 1

    def read(nll: jax.Array, lengths: np.ndarray, chunk: int, history: int) -> None:
        """Add the losses `[rows, chunk_len]` of a chunk, which starts after so much history."""
        columns = np.arange(nll.shape[1])
        real = columns < lengths[:, None]
        seen = np.broadcast_to(history + columns, real.shape)
        if pictures:
            places = first + chunk * chunk_len + columns
            seen = places - starts[documents(places)]
            real &= documents(places) == documents(places + 1)
        bins = (np.searchsorted(BIN_STARTS, seen, side="right") - 1)[real]
        sums[:] += np.bincount(bins, np.asarray(nll, np.float64)[real], len(sums))
        counts[:] += np.bincount(bins, minlength=len(sums))
        if on_progress is not None:
            on_progress(int(counts.sum()), total)

    state, unread = new_state(), None
    for i, chunk in enumerate(chunks):
        history = i * chunk_len % context_len
        if i and not history:
            state = new_state()
        places = first + i * chunk_len + np.arange(chunk.inputs.shape[1])
        ids = documents(places).astype(np.int32) if resets else None
        nll, state = _score(model, state, *chunk, ids, mesh)
        if unread is not None:  # the device is busy with this chunk while the last one is read
            read(*unread)
        unread = nll, chunk.lengths, i, history
    assert unread is not None  # eval_chunks gives one chunk at least
    read(*unread)
    if pictures:
        longest = int(np.diff(starts, append=len(tokens)).max()) - 1
    ends = np.minimum(BIN_STARTS[1:], min(context_len, longest))
    return Evaluation(
        loss=float(sums.sum() / counts.sum()),
        tokens=int(counts.sum()),
        by_position=[
            (int(BIN_STARTS[i]), int(ends[i]), float(sums[i] / counts[i]))
            for i in np.flatnonzero(counts)
        ],
        bytes_per_token=source.bytes_per_token,
    )


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
        features, state, _ = forward(
            model, state, inputs, lengths=lengths, document_ids=document_ids
        )
        nll = token_nll(model, features, targets)
    if mesh is None:
        return nll, state
    places = (replicated(mesh), rows_or_whole(mesh, len(inputs)))
    return jax.lax.with_sharding_constraint((nll, state), places)


def _check_context(
    config: ModelConfig, context_len: int | None, chunk_len: int, longest: int
) -> int:
    """The number of tokens after which the state starts anew."""
    if context_len is None:
        if config.attention == "full" and longest > DEFAULT_CAPACITY:
            raise UserError(
                f"a row has {longest:,} tokens, too many for full attention: "
                f"give a context_len of {DEFAULT_CAPACITY:,} or less"
            )
        return chunk_len * -(-longest // chunk_len)
    if context_len < 1 or context_len % chunk_len:
        raise UserError(
            f"context_len is {context_len}: it must be a multiple of chunk_len, {chunk_len}"
        )
    return context_len


def _state_maker(model: Model, rows: int, capacity: int, mesh: Mesh | None) -> Callable[[], State]:
    """A function that makes fresh states, where the model is."""
    make = init_state
    if mesh is not None:
        place = rows_or_whole(mesh, rows)
        make = jax.jit(
            init_state, static_argnums=(0, 1), static_argnames="capacity", out_shardings=place
        )
    full = model.config.attention == "full"
    return functools.partial(make, model.config, rows, capacity=capacity if full else None)
