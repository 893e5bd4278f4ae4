"""Where the tokens of a call stand: positions, padding, documents."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Int

from transformer_vq.config import ModelConfig
from transformer_vq.types import First, KeyIndex, PerRow, Tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Timeline:
    """Where the tokens of one call stand; shared by all units.

    Keys are indexed in time order over the ring and the call: index i < W is the ring's i-th oldest
    slot, index W + t is token t of this call. A query sees the keys from its `first` to itself.
    """

    start: Int[jax.Array, "*rows"]  # int32 [B]: tokens consumed before this call
    length: Int[jax.Array, "*rows"]  # int32 [B]: real tokens in this call
    first_before: Int[jax.Array, "*rows"]  # int32 [B]: `first` of the document the state is in
    first: Int[jax.Array, "*rows T"]  # int32 [B, T]: index of the first key of a token's document


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyDocuments:
    """The keys of a timeline, those of the ring first: which are real, and their documents."""

    length: PerRow  # int32 [B]: real tokens in the call
    first: KeyIndex  # int32 [B, W + T]: index of the first key of each key's document

    @classmethod
    def of(cls, timeline: Timeline, ring_len: int) -> "KeyDocuments":
        rows = timeline.length.shape[0]
        before = jnp.broadcast_to(timeline.first_before[:, None], (rows, ring_len))
        return cls(timeline.length, jnp.concatenate([before, timeline.first], axis=1))

    def first_at(self, index: First) -> First:
        """Where the document of the keys with these indices `[B, n]` begins."""
        index = jnp.clip(index, 0, self.first.shape[1] - 1)
        return jnp.take_along_axis(self.first, index, axis=1)


@runtime_checkable
class HasPosition(Protocol):
    """What a timeline needs of a `State`."""

    @property
    def position(self) -> PerRow: ...
    @property
    def document_start(self) -> PerRow: ...
    @property
    def document_id(self) -> PerRow: ...


def make_timeline(
    config: ModelConfig,
    state: HasPosition,
    lengths: PerRow,
    length: int,
    document_ids: Tokens | None,
) -> tuple[Timeline, jax.Array, jax.Array]:
    """The timeline of a call of `length` tokens, and the new document start and id of each row."""
    ring, start = config.ring_len, state.position
    first_before = ring + state.document_start - start
    first = jnp.broadcast_to(first_before[:, None], (start.shape[0], length))
    document_start, document_id = state.document_start, state.document_id
    if config.reset_at_document and document_ids is not None:
        before = jnp.concatenate([document_id[:, None], document_ids[:, :-1]], axis=1)
        index = ring + jnp.arange(length, dtype=jnp.int32)
        first = jax.lax.cummax(jnp.where(document_ids != before, index, first), axis=1)
        last = jnp.clip(lengths - 1, 0)[:, None]
        last_first, last_id = (
            jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (first, document_ids)
        )
        document_start = jnp.where(lengths > 0, last_first - ring + start, document_start)
        document_id = jnp.where(lengths > 0, last_id, document_id)
    timeline = Timeline(start=start, length=lengths, first_before=first_before, first=first)
    return timeline, document_start, document_id
