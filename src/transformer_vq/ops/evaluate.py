"""Stateful evaluation: every token is predicted from the entire history before it."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from transformer_vq import costs
from transformer_vq.config import ModelConfig
from transformer_vq.data import (
    DataError,
    EvalChunk,
    Source,
    as_source,
    check_tokens,
    eval_chunks,
    row_starts,
)
from transformer_vq.errors import UserError, require_kind, shown
from transformer_vq.fields import require_count
from transformer_vq.nn.forward import forward
from transformer_vq.nn.model import Model, State, init_state
from transformer_vq.ops.loss import token_hits, token_nll
from transformer_vq.ops.scores import Evaluation as Evaluation
from transformer_vq.ops.scores import Gains, Scores, Sums
from transformer_vq.sharding import replicated, rows_or_whole, traced_on
from transformer_vq.types import PerRow, Tokens

Scored = TypeVar("Scored")

CHUNK, LONG_CHUNK = 2048, 8192  # tokens of a call
MANY_CHUNKS = 16  # of so many, what the last one is padded with is little
MOST_OPERATIONS = 2**38  # of a long call: some seconds of a CPU


def evaluate(
    model: Model,
    tokens: np.ndarray | Source,
    *,
    chunk_len: int | None = None,
    rows: int = 1,
    max_tokens: int | None = None,
    context_len: int | None = None,
    far_gain: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `tokens`, a chunk at a time, with the state carried through all of them.

    Up to float rounding, the numbers depend neither on `chunk_len` nor on `config.block_len`.
    Where the model resets at documents, and for whole documents (pictures, episodes of a task) in
    any case, a token's history begins with its document. The start tokens of whole documents are
    given, and not predicted. Where some tokens count (`Source.counted`), the numbers are of those.

    Args:
      model: neither changed nor donated. If it lives on a mesh, so does the work: rows are spread
        over the devices if their number divides, and done by all alike if not.
      tokens: a source, or bare integers `[N]`; below `config.vocab_size`. The first of each row is
        not predicted.
      chunk_len: tokens of each row in one call: more need more memory. By default 8,192
        where rows have 131,072 and more and such a call takes seconds at most (small models, few
        rows), else 2,048; and what divides `context_len`, if that is given.
      rows: streams that the tokens are cut into and that are scored side by side, each with a
        history of its own.
      max_tokens: how many to predict, from the beginning on; all by default. Where some tokens
        count, to the end of the document.
      context_len: forget everything after so many tokens, again and again; a multiple of
        `chunk_len` (where that is not given, of 2,048, or less). Never, by default; full attention
        must, for more tokens than it can hold.
      far_gain: also score every token with the far part masked, so that keys beyond the window
        weigh nothing, which takes twice the time: what the far part brings is the difference.
      on_progress: called with the number of tokens scored, and of all. What it raises ends it.

    Raises:
      DataError: for fewer than two tokens in a row, or none that counts.
      ValueError: for a token outside of the vocabulary, for sizes that make no sense, and for
        `far_gain` of a model without a far part.
    """
    _check_options(model, far_gain, on_progress)
    source = as_source(tokens)
    streams = Streams.of(source, rows, max_tokens)
    check_tokens(streams.tokens, model.config.vocab_size)
    if streams.alone:
        model = Model(model.params, model.codebook, model.config.replace(reset_at_document=True))
        if model.config.attention == "full":
            chunk_len = context_len = streams.document_len
    if context_len is not None:
        require_count("context_len", context_len)
    if chunk_len is None:
        chunk_len = _default_chunk_len(model.config, streams, context_len)
    chunks = streams.chunks(chunk_len)
    context_len = _check_context(model.config, context_len, chunk_len, streams.longest_row)
    room = min(context_len, streams.longest_row)
    readers = [_Reader(model, rows, room, hits=streams.counts is not None)]
    if far_gain:
        readers.append(_Reader(_far_masked(model), rows, room, hits=False))
    resets = model.config.reset_at_document and (streams.alone or len(streams.documents) > 1)
    ids_of = streams.document_ids if resets else None
    sums, gains = Sums(), Gains()
    for start, lengths, (own, *masked) in _one_behind(_read(readers, chunks, context_len, ids_of)):
        history, counted = streams.look(start, lengths, own.nll.shape[1], context_len)
        sums.add(own, history, counted)
        for without in masked:
            gain = np.asarray(without.nll, np.float64) - np.asarray(own.nll, np.float64)
            gains.add(gain, history, counted, streams.positions(start, gain.shape[1]))
        if on_progress is not None:
            on_progress(sums.tokens, streams.total)
    result = sums.result(min(context_len, streams.longest_history), source.bytes_per_token)
    return gains.added_to(result) if far_gain else result


def _check_options(model: Model, far_gain: bool, on_progress: object) -> None:
    """Raise `UserError` for an option of `evaluate` that is none, or that the model cannot have."""
    require_kind("model", model, Model, "from init_model or of a run (load)")
    require_kind("far_gain", far_gain, bool)
    if not (on_progress is None or callable(on_progress)):
        raise UserError(
            f"on_progress is {shown(on_progress)}: it must be a function of two numbers"
        )
    if far_gain and not has_far_part(model.config):
        raise UserError(
            "far_gain is true, and the model has no far part: it has full attention, or no cache"
        )


def has_far_part(config: ModelConfig) -> bool:
    """Whether a model attends keys beyond its window by their codes."""
    return config.attention == "vq" and config.use_cache


def _far_masked(model: Model) -> Model:
    """The same model, but that no query sees a key beyond its window."""
    return Model(model.params, model.codebook, model.config.replace(use_cache=False))


@dataclass(frozen=True)
class Streams:
    """Tokens as rows that are scored side by side, and the documents that they are of."""

    tokens: np.ndarray  # [N]
    documents: np.ndarray  # [documents]: where each begins
    rows: np.ndarray  # [rows]: where each begins
    alone: bool  # a history begins with each document, whose first token is given
    counts: np.ndarray | None  # bool [N]: tokens that count; None: all

    @classmethod
    def of(cls, source: Source, rows: int, max_tokens: int | None) -> "Streams":
        """`rows` streams of a source, or of its first tokens, of which `max_tokens` are predicted.

        Raises `UserError` for `rows` or `max_tokens` below 1, `DataError` if no token counts.
        """
        require_count("rows", rows)
        tokens, documents, counts = source.tokens, source.starts, source.counted
        alone = source.whole_documents
        if max_tokens is not None:
            require_count("max_tokens", max_tokens)
            size = max_tokens + rows
            if counts is not None:  # what counts may come last
                later = documents[documents >= size]
                size = int(later[0]) if len(later) else len(tokens)
                counts = counts[:size]
            tokens = tokens[:size]
            documents = documents[documents < len(tokens)]
        # Rows of text are cut anywhere.
        first = row_starts(len(tokens), rows, documents if alone else None)
        streams = cls(tokens, documents, first, alone, counts)
        if counts is not None and not streams.total:
            raise DataError(f"no token of {source.path or 'the data'} counts that is predicted")
        return streams

    @functools.cached_property
    def total(self) -> int:
        """How many tokens are predicted, of those that count."""
        given = self.documents if self.alone else self.rows
        if self.counts is None:
            return len(self.tokens) - len(given)
        return int(self.counts.sum() - self.counts[given].sum())

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

    @property
    def document_len(self) -> int:
        """The tokens of each document. Raises `UserError` if they differ."""
        lengths = np.diff(self.documents, append=len(self.tokens))[:-1]
        if lengths.min(initial=self.longest_document) < self.longest_document:
            raise UserError(
                f"the documents have {lengths.min():,} to {self.longest_document:,} tokens: full "
                f"attention scores whole documents of one length only"
            )
        return self.longest_document

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
        return self._document_of(self.positions(start, width)).astype(np.int32)

    def look(
        self, start: int, lengths: np.ndarray, width: int, context_len: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The history of each prediction of a chunk, in tokens, and whether it counts.

        Both are `[rows, width]`; `lengths` `[rows]` says how much of each row is real.
        """
        columns = np.arange(width)
        counted = columns < lengths[:, None]
        positions = self.positions(start, width)
        if self.counts is not None:
            counted = counted & self.counts[np.minimum(positions + 1, len(self.tokens) - 1)]
        if not self.alone:
            return np.broadcast_to(start % context_len + columns, counted.shape), counted
        document = self._document_of(positions)
        inside = document == self._document_of(positions + 1)  # the next one is not a given token
        return positions - self.documents[document], counted & inside

    def positions(self, start: int, width: int) -> np.ndarray:
        """Where the tokens of a chunk are among all, `[rows, width]`."""
        return self.rows[:, None] + start + np.arange(width)

    def _document_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.documents, positions, side="right") - 1


class _Reader:
    """A model that reads chunk after chunk, and what it remembers of them."""

    def __init__(self, model: Model, rows: int, room: int, *, hits: bool):
        """`room`: tokens of a row that are read before all is forgotten."""
        self._model, self._hits, self._mesh = model, hits, _mesh_of(model)
        self._new_state = _state_maker(model, rows, room, self._mesh)
        self.forget()

    def forget(self) -> None:
        self._state = self._new_state()

    def read(self, chunk: EvalChunk, document_ids: np.ndarray | None) -> Scores:
        """The scores of the next chunk, given all before it."""
        scores, self._state = _score(
            self._model, self._state, *chunk, document_ids, mesh=self._mesh, hits=self._hits
        )
        return scores


def _read(
    readers: Sequence[_Reader],
    chunks: Iterable[EvalChunk],
    context_len: int,
    ids_of: Callable[[int, int], np.ndarray] | None,
) -> Iterator[tuple[int, np.ndarray, list[Scores]]]:
    """Of each chunk where it begins in its rows, how much of each row is real, and its scores by
    every reader.

    After `context_len` tokens the readers forget all. `ids_of`: `Streams.document_ids`, where the
    model resets at documents.
    """
    start = 0
    for chunk in chunks:
        if start and start % context_len == 0:
            for reader in readers:
                reader.forget()
        width = chunk.inputs.shape[1]
        ids = ids_of(start, width) if ids_of else None
        yield start, chunk.lengths, [reader.read(chunk, ids) for reader in readers]
        start += width


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


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("mesh", "hits"))
def _score(
    model: Model,
    state: State,
    inputs: Tokens,
    targets: Tokens,
    lengths: PerRow,
    document_ids: Tokens | None,
    *,
    mesh: Mesh | None,
    hits: bool,
) -> tuple[Scores, State]:
    """The scores of a chunk, with `hits` if they are asked for, and the new state."""
    with traced_on(mesh):
        out = forward(model, state, inputs, lengths=lengths, document_ids=document_ids)
        nll = token_nll(model, out.features, targets)
        scores = Scores(nll, token_hits(model, out.features, targets) if hits else None)
    if mesh is None:
        return scores, out.state
    shardings = (replicated(mesh), rows_or_whole(mesh, len(inputs)))
    return jax.lax.with_sharding_constraint((scores, out.state), shardings)


def _default_chunk_len(config: ModelConfig, streams: Streams, context_len: int | None) -> int:
    """Tokens of each row in a call: a call costs something by itself, but Ctrl-C and progress wait
    for its end, and the last one is padded."""
    operations = LONG_CHUNK * len(streams.rows) * costs.forward_flops(config)
    many = streams.longest_row >= MANY_CHUNKS * LONG_CHUNK
    if many and operations <= MOST_OPERATIONS and (context_len or 0) % LONG_CHUNK == 0:
        return LONG_CHUNK
    return min(CHUNK, context_len or CHUNK)


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
    if context_len % chunk_len:
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
