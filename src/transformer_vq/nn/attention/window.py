"""The keys that blocks see one by one: the window in the order of time, as it moves over a chunk.

Each block of L queries sees a span of M + L keys: the window before it, and its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int, Shaped

from transformer_vq.config import ModelConfig
from transformer_vq.nn.attention.fading import fades_of
from transformer_vq.nn.attention.inputs import Window
from transformer_vq.nn.attention.state import AttentionState, window_keys
from transformer_vq.nn.layers import iota
from transformer_vq.nn.timeline import Timeline
from transformer_vq.types import Codewords, InReach, NearVisible, Timed, TimedBlocks


class Layout(NamedTuple):
    """How the T tokens of a row are cut."""

    window: int  # keys before a block that it sees one by one
    block: int  # tokens of a block
    blocks_per_chunk: int  # side by side
    chunks: int  # one after the other

    @property
    def tokens(self) -> int:
        """Of a row, in a chunk."""
        return self.block * self.blocks_per_chunk


def oldest_key(cut: Layout, config: ModelConfig) -> int:
    """Timeline index of the oldest key of the first chunk's window: 1, or less with a reach.

    Key 0, the oldest of the ring, is beyond the window of every query to come, so in the cache with
    all that are older. Those of the window that are below 1 are not there.
    """
    return 1 + config.window_len - cut.window


# Axes.


def by_block(x: Shaped[jax.Array, "B G c *any"], cut: Layout) -> TimedBlocks:
    """Of the keys of a chunk, those of each block."""
    return x.reshape(*x.shape[:2], cut.blocks_per_chunk, cut.block, *x.shape[3:])


def ring_in_time(
    state: AttentionState, words: Codewords, timeline: Timeline, dtype: jnp.dtype
) -> Window:
    """The W keys of the ring, oldest first: what stands before the call's own keys."""
    ring = state.codes.shape[2]
    slots = ((timeline.start[:, None] + iota(ring)) % ring)[:, None, :]
    fades = None
    if state.ages is not None:
        fades = fades_of(jnp.take_along_axis(state.ages, slots, axis=2))
    codes = jnp.take_along_axis(state.codes, slots, axis=2)
    values = jnp.take_along_axis(state.values, slots[..., None], axis=2).astype(dtype)
    keys = window_keys(state, words, words.dtype)
    return Window(codes, jnp.take_along_axis(keys, slots[..., None], axis=2), values, fades)


def slide(window: Window, new: Window) -> tuple[Window, Window]:
    """The window's keys and new ones, in time order, cut in two: as many as are new, which leave
    the window, and those that stay."""
    return jax.tree.map(leaving, window, new), jax.tree.map(staying, window, new)


def leaving(old: Timed, new: Shaped[jax.Array, "B G c *any"]) -> Shaped[jax.Array, "B G c *any"]:
    """The oldest c of both."""
    window, tokens = old.shape[2], new.shape[2]
    return jnp.concatenate([old[:, :, :tokens], new[:, :, : max(tokens - window, 0)]], axis=2)


def staying(old: Timed, new: Shaped[jax.Array, "B G c *any"]) -> Timed:
    """The newest of both, as many as old ones."""
    window, tokens = old.shape[2], new.shape[2]
    return jnp.concatenate([old[:, :, tokens:], new[:, :, max(tokens - window, 0) :]], axis=2)


def spans(
    old: Timed, new: Shaped[jax.Array, "B G c *any"], cut: Layout
) -> tuple[TimedBlocks, Shaped[jax.Array, "B G n b *any"]]:
    """The keys that each block sees one by one: those of the window before it, and its own.

    `[B, G, M, ...]` and `[B, G, tokens, ...]` to `[B, G, n, M, ...]` and `[B, G, n, L, ...]`.
    """
    window = old.shape[2]
    if window == cut.block:
        return by_block(leaving(old, new), cut), by_block(new, cut)
    both = jnp.concatenate([old, new], axis=2)
    starts = [i * cut.block for i in range(cut.blocks_per_chunk)]
    before = jnp.stack([both[:, :, start : start + window] for start in starts], axis=2)
    return before, by_block(new, cut)


def distances(cut: Layout) -> Int[jax.Array, "c j"]:
    """Of the keys of its span, M + L of them, from the queries of a block."""
    row, column = iota(cut.block)[:, None], iota(cut.window + cut.block)
    return row + cut.window - column


def keys_in_reach(cut: Layout, config: ModelConfig) -> InReach:
    """Which keys of its span, M + L of them, the queries of a block see, documents apart."""
    distance = distances(cut)
    if config.use_cache:
        return distance >= 0
    return (distance >= 0) & (distance <= config.window_len)


def visible_keys(
    in_reach: InReach, first: Int[jax.Array, "B n c"], start: Int[jax.Array, ""]
) -> NearVisible:
    """Those in reach that are of the query's document. `start`: index of the first span's first.

    With a reach there are indices below 1, of keys that are not here: `first` is then at least 1.
    """
    blocks, block = first.shape[1:]
    index = start + iota(blocks)[:, None, None] * block + iota(in_reach.shape[1])
    return in_reach & (index >= first[..., None])
