"""Attention of many tokens per row over the past and each other, block by block.

A block of L queries meets a span of M + L keys one by one: those before the block, and its own.
What is older than the span is in the cache that the block sees. Blocks that fit memory stand side
by side in a chunk; chunks go one after the other, carrying the window and the cache.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, Shaped

from transformer_vq.config import ModelConfig
from transformer_vq.nn import vq
from transformer_vq.nn.attention import blockwise
from transformer_vq.nn.attention.blockwise import Far, Near
from transformer_vq.nn.attention.bounds import Decay, block_offsets, keys_beyond
from transformer_vq.nn.attention.cache import Cache, join_blocks, log_mass
from transformer_vq.nn.attention.inputs import QKV, Attended, AttentionWeights
from transformer_vq.nn.attention.state import AttentionState, window_keys
from transformer_vq.nn.layers import iota, wide
from transformer_vq.nn.timeline import KeyDocuments, Timeline
from transformer_vq.types import (
    BlockQueries,
    ByHead,
    ByKeyHead,
    Codewords,
    InReach,
    NearBiases,
    NearVisible,
    Outputs,
    Timed,
    TimedBlocks,
    TimedCodes,
    TimedKeys,
    TimedValues,
)

SCORES_PER_CHUNK = 2**23  # scores held at once, per unit
BLOCKS_PER_CHUNK = 64  # where window and block differ, each is a slice of its own


class Layout(NamedTuple):
    """How the T tokens of a row are cut."""

    block: int  # tokens of a block
    blocks_per_chunk: int  # side by side
    chunks: int  # one after the other

    @property
    def tokens(self) -> int:
        """Of a row, in a chunk."""
        return self.block * self.blocks_per_chunk


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """Keys that are seen one by one, in the order of time: of the ring, the window, or new."""

    codes: TimedCodes  # int32 [B, G, j]
    keys: TimedKeys  # [B, G, j, K]: quantized
    values: TimedValues  # [B, G, j, V]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """The tokens of one chunk, or of all, stacked along an axis in front."""

    index: Int[jax.Array, "*chunks"]
    q: Float[jax.Array, "*chunks B c H K"]
    keys: Float[jax.Array, "*chunks B c G K"]  # quantized
    values: Float[jax.Array, "*chunks B c G V"]
    codes: Int[jax.Array, "*chunks B c G"]
    first: Int[jax.Array, "*chunks B c"]  # as in `Timeline`


class BlockWeights(NamedTuple):
    """The constants of a unit, query heads by their key/value head."""

    words: Codewords  # [G, S, K]
    u: ByKeyHead  # [G, R, K]
    w: ByKeyHead  # [G, R, K]
    biases: NearBiases  # [M + 1, G, R, K]: farthest first


@jax.named_scope("attend_blocks")
def attend_blocks(
    x: QKV,
    unit: AttentionWeights,
    state: AttentionState,
    timeline: Timeline,
    config: ModelConfig,
) -> Attended:
    """Attention of T new tokens per row over the past and each other.

    Chunk by chunk: the keys of a chunk push as many out of the window, which join the cache.
    """
    batch, length, heads, _ = x.q.shape
    cut = layout(config, batch, length)
    codes = checkpoint_name(vq.assign(x.k, unit.words), "codes")
    keys = vq.straight_through(x.k, vq.look_up(unit.words, codes)).astype(x.q.dtype)
    weights = by_key_head(unit, x)
    ring = ring_in_time(state, weights.words, timeline, x.v.dtype)
    documents = KeyDocuments.of(timeline, config.ring_len)

    step = functools.partial(
        attend_chunk,
        weights=weights,
        documents=documents,
        in_reach=keys_in_reach(cut.block, config),
        cut=cut,
        config=config,
    )
    carry = before_call(state, ring, timeline, documents, config)
    chunks = Chunk(
        iota(cut.chunks),
        *(by_chunk(a, cut) for a in (x.q, keys, x.v, codes, timeline.first)),
    )
    if cut.chunks == 1:
        (_, cache), out = step(carry, jax.tree.map(lambda a: a[0], chunks))
    else:
        keep = jax.checkpoint_policies.save_only_these_names(*blockwise.SAVED)
        (_, cache), out = jax.lax.scan(jax.checkpoint(step, policy=keep), carry, chunks)
        out = jnp.moveaxis(out, 0, 1).reshape(batch, cut.chunks * cut.tokens, heads, -1)
    new = Window(*(heads_first(a) for a in (codes, keys, x.v)))
    state = state_after(state, ring, new, cache, timeline, documents)
    return Attended(out[:, :length], codes, state)


def attend_chunk(
    carry: tuple[Window, Cache],
    chunk: Chunk,
    *,
    weights: BlockWeights,
    documents: KeyDocuments,
    in_reach: InReach,
    cut: Layout,
    config: ModelConfig,
) -> tuple[tuple[Window, Cache], Outputs]:
    """Outputs of a chunk's queries; the window (M keys) and the cache before and after it."""
    if not config.grad_through_cache:
        carry = jax.lax.stop_gradient(carry)
    window, cache = carry
    new = Window(*(heads_first(a) for a in (chunk.codes, chunk.keys, chunk.values)))
    start = 1 + chunk.index * cut.tokens  # timeline index of the oldest key of the window
    first = chunk.first.reshape(-1, cut.blocks_per_chunk, cut.block)
    index = start + config.window_len + iota(cut.tokens).reshape(-1, cut.block)
    near_offsets, far_offsets = block_offsets(
        distances(cut.block, config), keys_beyond(index, first, config), config
    )
    near = Near(
        keys=spans(window.keys, new.keys, cut),
        values=spans(window.values, new.values, cut),
        biases=weights.biases,
        visible=visible_keys(in_reach, first, start),
        offsets=near_offsets,
    )
    out_of_window, window_after = slide(window, new)
    far = None
    if config.use_cache:
        seen, cache = join_blocks(
            cache,
            out_of_window.codes,
            out_of_window.values,
            start=start,
            documents=documents,
            block=cut.block,
            decay=Decay.of(config),
        )
        far = Far(
            words=weights.words,
            means=seen.means.astype(chunk.values.dtype),
            log_mass=log_mass(seen.mass, seen.means.dtype),
            visible=first == seen.first[..., None],
            offsets=far_offsets,
        )
    q = block_queries(chunk.q, cut, groups=new.codes.shape[1])
    u, w = (a[:, None, :, None] for a in (weights.u, weights.w))
    out = blockwise.attend(blockwise.Queries(q + u, q + w), near, far)
    out = jnp.moveaxis(out, (2, 4), (1, 2))  # [B, n, c, G, R, V]
    return (window_after, cache), out.reshape(*chunk.q.shape[:3], -1)


def layout(config: ModelConfig, batch: int, length: int) -> Layout:
    """As few chunks as memory allows, of equal size. Blocks that exchange no gradient
    (`grad_through_cache = False`) go one by one."""
    block = min(config.block_len, length)
    blocks = -(-length // block)
    if not config.grad_through_cache:
        return Layout(block, 1, blocks)
    columns = config.window_len + block + config.codebook_size
    limit = SCORES_PER_CHUNK // (block * batch * config.num_heads * columns)
    limit = max(1, min(limit, BLOCKS_PER_CHUNK))
    chunks = -(-blocks // limit)
    per_chunk = -(-blocks // chunks)
    return Layout(block, per_chunk, -(-blocks // per_chunk))


# Axes.


def by_chunk(x: Shaped[jax.Array, "B T *any"], cut: Layout) -> Shaped[jax.Array, "i B c *any"]:
    """The tokens of each chunk, padded at the end."""
    batch, length = x.shape[:2]
    pad = cut.chunks * cut.tokens - length
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, cut.chunks, cut.tokens, *x.shape[2:]), 1, 0)


def by_block(x: Shaped[jax.Array, "B G c *any"], cut: Layout) -> TimedBlocks:
    """Of the keys of a chunk, those of each block."""
    return x.reshape(*x.shape[:2], cut.blocks_per_chunk, cut.block, *x.shape[3:])


def heads_first(x: Shaped[jax.Array, "B T G *any"]) -> Shaped[jax.Array, "B G T *any"]:
    """Keys, key/value head by key/value head."""
    return jnp.moveaxis(x, 2, 1)


def split_heads(x: ByHead, groups: int) -> ByKeyHead:
    """Query heads, by their key/value head."""
    *lead, heads, d_k = x.shape
    return x.reshape(*lead, groups, heads // groups, d_k)


def by_key_head(unit: AttentionWeights, x: QKV) -> BlockWeights:
    """The constants of a unit as blocks need them, in the dtype of the queries."""
    u, w, r = (split_heads(a, x.k.shape[2]) for a in (unit.u, unit.w, unit.r))
    return BlockWeights(unit.words.astype(x.q.dtype), u, w, r[::-1])


def block_queries(q: Float[jax.Array, "B t H K"], cut: Layout, groups: int) -> BlockQueries:
    """The queries of a chunk, block by block."""
    q = jnp.moveaxis(split_heads(q, groups), 1, 3)  # [B, G, R, tokens, K]
    q = q.reshape(*q.shape[:3], cut.blocks_per_chunk, cut.block, q.shape[-1])
    return jnp.moveaxis(q, 3, 2)


# The window.


def ring_in_time(
    state: AttentionState, words: Codewords, timeline: Timeline, dtype: jnp.dtype
) -> Window:
    """The W keys of the ring, oldest first: what stands before the call's own keys."""
    ring = state.codes.shape[2]
    slots = ((timeline.start[:, None] + iota(ring)) % ring)[:, None, :]
    codes = jnp.take_along_axis(state.codes, slots, axis=2)
    values = jnp.take_along_axis(state.values, slots[..., None], axis=2).astype(dtype)
    keys = window_keys(state, words, words.dtype)
    return Window(codes, jnp.take_along_axis(keys, slots[..., None], axis=2), values)


def before_call(
    state: AttentionState,
    ring: Window,
    timeline: Timeline,
    documents: KeyDocuments,
    config: ModelConfig,
) -> tuple[Window, Cache]:
    """The window and the cache that the first chunk meets.

    The oldest key of the ring is beyond the window of every query to come: it is in the cache.
    """
    size, first_mean = config.codebook_size, config.ring_len
    means = wide(state.values[:, :, first_mean : first_mean + size])
    cache = Cache(state.counts, means, timeline.first_before)
    if config.use_cache:
        oldest = ring.codes[:, :, :1], ring.values[:, :, :1]
        _, cache = join_blocks(
            cache, *oldest, start=0, documents=documents, block=1, decay=Decay.of(config)
        )
    return jax.tree.map(lambda a: a[:, :, 1:], ring), cache


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


def distances(block: int, config: ModelConfig) -> Int[jax.Array, "c j"]:
    """Of the keys of its span, M + L of them, from the queries of a block."""
    row, column = iota(block)[:, None], iota(config.window_len + block)
    return row + config.window_len - column


def keys_in_reach(block: int, config: ModelConfig) -> InReach:
    """Which keys of its span, M + L of them, the queries of a block see, documents apart."""
    distance = distances(block, config)
    if config.use_cache:
        return distance >= 0
    return (distance >= 0) & (distance <= config.window_len)


def visible_keys(
    in_reach: InReach, first: Int[jax.Array, "B n c"], start: Int[jax.Array, ""]
) -> NearVisible:
    """Those in reach that are of the query's document. `start`: index of the first span's first."""
    blocks, block = first.shape[1:]
    index = start + iota(blocks)[:, None, None] * block + iota(in_reach.shape[1])
    return in_reach & (index >= first[..., None])


@jax.named_scope("state_after")
def state_after(
    state: AttentionState,
    ring: Window,
    new: Window,
    cache: Cache,
    timeline: Timeline,
    documents: KeyDocuments,
) -> AttentionState:
    """The state after `length` tokens: the newest W keys, each in its slot, and the cache.

    `ring` and `new` are the keys before the call and its own, `cache` what is older than the newest
    W. It is emptied where it is not of the current document.
    """
    size, length = ring.codes.shape[2], timeline.length[:, None]
    newest = length + iota(size)  # [B, W] timeline indices, oldest first
    at_slot = (iota(size) - (timeline.start + timeline.length)[:, None]) % size
    index = jnp.take_along_axis(newest, at_slot, axis=1)[:, None, :]

    def in_slots(old: Timed, new: Shaped[jax.Array, "B G T *any"]) -> Timed:
        both = jnp.concatenate([old, new], axis=2)
        at = index.reshape(*index.shape, *[1] * (both.ndim - 3))
        return jnp.take_along_axis(both, at, axis=2)

    current = documents.first_at(length - 1 + size)[:, 0] == cache.first
    current = current[:, None, None]
    parts = (
        in_slots(ring.values, new.values),
        jnp.where(current[..., None], cache.means, 0),
        jnp.zeros_like(state.values[:, :, size + cache.mass.shape[2] :]),
    )
    return AttentionState(
        codes=in_slots(ring.codes, new.codes),
        counts=jnp.where(current, cache.mass, 0),
        values=jnp.concatenate([part.astype(state.values.dtype) for part in parts], axis=2),
        keys=None if state.keys is None else in_slots(ring.keys, new.keys),
    )
