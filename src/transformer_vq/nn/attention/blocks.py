"""Attention of many tokens per row over the past and each other, block by block.

A block of L queries meets a span of M + L keys one by one: those before the block, and its own.
(In training, a `reach` above M stands in place of M, for the sake of gradients.)
What is older than the span is in the cache that the block sees: docs/mathematics.md, "It holds for
any split", has the picture. Blocks that fit memory stand side by side in a chunk; chunks go one
after the other, carrying the window and the cache.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, Shaped

from transformer_vq.config import ModelConfig
from transformer_vq.nn import vq
from transformer_vq.nn.attention import blockwise
from transformer_vq.nn.attention.blockwise import Far, Near
from transformer_vq.nn.attention.bounds import block_offsets, keys_beyond
from transformer_vq.nn.attention.cache import Cache, join_blocks, log_mass
from transformer_vq.nn.attention.fading import (
    BlockFades,
    ChunkFades,
    column_offsets,
    own_sums,
    since,
)
from transformer_vq.nn.attention.inputs import QKV, Attended, AttentionWeights, Window
from transformer_vq.nn.attention.sink import share_of_keys
from transformer_vq.nn.attention.state import AttentionState
from transformer_vq.nn.attention.window import (
    Layout,
    by_block,
    distances,
    keys_in_reach,
    oldest_key,
    ring_in_time,
    slide,
    spans,
    visible_keys,
)
from transformer_vq.nn.layers import iota, wide
from transformer_vq.nn.timeline import KeyDocuments, Timeline
from transformer_vq.sharding import row_shares
from transformer_vq.types import (
    ByHead,
    ByKeyHead,
    Codewords,
    Counts,
    InReach,
    Mass,
    NearBiases,
    Outputs,
    Timed,
)

SCORES_PER_CHUNK = 2**23  # scores that a device holds at once, per unit
BLOCKS_PER_CHUNK = 64  # where window and block differ, each is a slice of its own


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """The tokens of one chunk, or of all, stacked along an axis in front."""

    index: Int[jax.Array, "*chunks"]
    q: Float[jax.Array, "*chunks B c H K"]
    keys: Float[jax.Array, "*chunks B c G K"]  # quantized
    values: Float[jax.Array, "*chunks B c G V"]
    codes: Int[jax.Array, "*chunks B c G"]
    fades: Float[jax.Array, "*chunks B c G"] | None
    first: Int[jax.Array, "*chunks B c"]  # as in `Timeline`


class BlockWeights(NamedTuple):
    """The constants of a unit, query heads by their key/value head."""

    words: Codewords  # [G, S, K]
    u: ByKeyHead  # [G, R, K]
    w: ByKeyHead  # [G, R, K]
    biases: NearBiases  # [M + 1, G, R, K]: farthest first
    sink: Float[jax.Array, "G R"] | None  # score of nothing


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
        in_reach=keys_in_reach(cut, config),
        cut=cut,
        config=config,
    )
    carry = before_call(state, ring, timeline, documents, cut, config)
    by_token = (x.q, keys, x.v, codes, x.fades, timeline.first)
    chunks = Chunk(iota(cut.chunks), *jax.tree.map(functools.partial(by_chunk, cut=cut), by_token))
    if cut.chunks == 1:
        (window, cache), out = step(carry, jax.tree.map(lambda a: a[0], chunks))
    else:
        keep = jax.checkpoint_policies.save_only_these_names(*blockwise.SAVED)
        (window, cache), out = jax.lax.scan(jax.checkpoint(step, policy=keep), carry, chunks)
        out = jnp.moveaxis(out, 0, 1).reshape(batch, cut.chunks * cut.tokens, heads, -1)
    if config.use_cache:
        cache = after_call(window, cache, documents, cut, config)
    new = Window(*jax.tree.map(heads_first, (codes, keys, x.v, x.fades)))
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
    by_token = (chunk.codes, chunk.keys, chunk.values, chunk.fades)
    new = Window(*jax.tree.map(heads_first, by_token))
    keys, values = spans(window.keys, new.keys, cut), spans(window.values, new.values, cut)
    out_of_window, window_after = slide(window, new)
    start = oldest_key(cut, config) + chunk.index * cut.tokens  # of the window
    first = chunk.first.reshape(-1, cut.blocks_per_chunk, cut.block)
    index = start + cut.window + iota(cut.tokens).reshape(-1, cut.block)
    near_offsets, far_offsets = block_offsets(
        distances(cut), keys_beyond(index, first, config), config
    )
    fades = chunk_fades(window, new, out_of_window, window_after, first, start, cut)
    if fades is not None:
        near_offsets = fades.columns + (0 if near_offsets is None else near_offsets)
    # The window of `reach` may begin before the ring, where there is no key: see `visible_keys`.
    there = first if config.reach == 0 else jnp.maximum(first, 1)
    near = Near(
        keys=keys,
        values=values,
        biases=weights.biases,
        visible=visible_keys(in_reach, there, start),
        offsets=near_offsets,
    )
    far = None
    if config.use_cache:
        seen, cache = join_blocks(
            cache,
            out_of_window,
            start=start,
            documents=documents,
            block=cut.block,
            fades=None if fades is None else fades.blocks,
            soft=weights.words if config.soft_writes else None,
        )
        far = Far(
            words=weights.words,
            means=seen.means.astype(chunk.values.dtype),
            log_mass=log_mass(seen.mass, seen.means.dtype),
            visible=first == seen.first[..., None],
            offsets=far_offsets,
        )
    queries = block_queries(chunk.q, weights, cut)
    out, lse = blockwise.attend(queries, near, far, config.products == "bfloat16")
    if weights.sink is not None:
        out = out * keys_share(lse, weights.sink, fades).astype(out.dtype)
    out = jnp.moveaxis(out, (2, 4), (1, 2))  # [B, n, c, G, R, V]
    return (window_after, cache), out.reshape(*chunk.q.shape[:3], -1)


def keys_share(
    lse: Float[jax.Array, "B G n R c"], sink: Float[jax.Array, "G R"], fades: ChunkFades | None
) -> Float[jax.Array, "B G n R c 1"]:
    """The part of each query's weight that the sink leaves to the keys, whose scores have this
    log-sum-exp."""
    nothing = wide(sink)[:, None, :, None]  # [G, 1, R, 1]
    if fades is not None:  # scores are short of what all columns of a query have in common
        nothing = nothing - fades.common[:, :, :, None]
    return share_of_keys(lse, nothing)[..., None]


def chunk_fades(
    window: Window,
    new: Window,
    leaving: Window,
    after: Window,
    first: Int[jax.Array, "B n c"],
    start: Int[jax.Array, ""],
    cut: Layout,
) -> ChunkFades | None:
    """The sums of fades that a chunk needs; None if keys do not fade.

    From the window before it, its own keys, those that leave the window, and the window after it.
    `start`: timeline index of the oldest key of the window.
    """
    if window.fades is None or new.fades is None:
        return None
    assert leaving.fades is not None and after.fades is not None  # parts of those two
    older, own = spans(window.fades, new.fades, cut)
    # The window after each block is what is older for the next one, and after the last `after`.
    windows = jnp.concatenate([older[:, :, 1:], after.fades[:, :, None]], axis=2)
    index = start + cut.window + iota(cut.tokens).reshape(-1, 1, cut.block)
    of_document = jnp.tril(index >= first[..., None])
    common = own_sums(own, of_document)
    return ChunkFades(
        columns=column_offsets(older, common),
        common=common,
        blocks=BlockFades.of(by_block(leaving.fades, cut), windows.sum(-1), own.sum(-1)),
    )


def layout(config: ModelConfig, batch: int, length: int) -> Layout:
    """As few chunks as memory allows, of equal size. Blocks that exchange no gradient
    (`grad_through_cache = False`) go one by one."""
    window, block = max(config.window_len, config.reach), min(config.block_len, length)
    blocks = -(-length // block)
    if not config.grad_through_cache:
        return Layout(window, block, 1, blocks)
    columns = window + block + config.codebook_size
    rows = batch // row_shares(batch)
    limit = SCORES_PER_CHUNK // (block * rows * config.num_heads * columns)
    limit = max(1, min(limit, BLOCKS_PER_CHUNK))
    chunks = -(-blocks // limit)
    per_chunk = -(-blocks // chunks)
    return Layout(window, block, per_chunk, -(-blocks // per_chunk))


def by_chunk(x: Shaped[jax.Array, "B T *any"], cut: Layout) -> Shaped[jax.Array, "i B c *any"]:
    """The tokens of each chunk, padded at the end."""
    batch, length = x.shape[:2]
    pad = cut.chunks * cut.tokens - length
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, cut.chunks, cut.tokens, *x.shape[2:]), 1, 0)


def heads_first(x: Shaped[jax.Array, "B T G *any"]) -> Shaped[jax.Array, "B G T *any"]:
    """Keys, key/value head by key/value head."""
    return jnp.moveaxis(x, 2, 1)


def split_heads(x: ByHead, groups: int) -> ByKeyHead:
    """Query heads, by their key/value head."""
    *lead, heads, d_k = x.shape
    return x.reshape(*lead, groups, heads // groups, d_k)


def by_key_head(unit: AttentionWeights, x: QKV) -> BlockWeights:
    """The constants of a unit as blocks need them, in the dtype of the queries."""
    groups = x.k.shape[2]
    u, w, r = (split_heads(a, groups) for a in (unit.u, unit.w, unit.r))
    sink = None if unit.sink is None else unit.sink.reshape(groups, -1)
    return BlockWeights(unit.words.astype(x.q.dtype), u, w, r[::-1], sink)


def block_queries(
    q: Float[jax.Array, "B t H K"], weights: BlockWeights, cut: Layout
) -> blockwise.Queries:
    """The queries of a chunk, block by block, with the biases u for content and w for position."""
    q = jnp.moveaxis(split_heads(q, weights.u.shape[0]), 1, 3)  # [B, G, R, tokens, K]
    q = q.reshape(*q.shape[:3], cut.blocks_per_chunk, cut.block, q.shape[-1])
    q = jnp.moveaxis(q, 3, 2)
    u, w = (a[:, None, :, None] for a in (weights.u, weights.w))
    return blockwise.Queries(q + u, q + w)


# Before and after a call.


def before_call(
    state: AttentionState,
    ring: Window,
    timeline: Timeline,
    documents: KeyDocuments,
    cut: Layout,
    config: ModelConfig,
) -> tuple[Window, Cache]:
    """The window and the cache that the first chunk meets."""
    size, first_mean = config.codebook_size, config.ring_len
    means = wide(state.values[:, :, first_mean : first_mean + size])
    mass = state.counts.astype(means.dtype) if config.soft_writes else state.counts
    cache = Cache(mass, means, timeline.first_before)
    if config.use_cache:
        cache = join_oldest(ring, 1, cache, start=0, documents=documents, config=config)
    window = jax.tree.map(lambda a: a[:, :, 1:], ring)
    missing = 1 - oldest_key(cut, config)
    if missing:
        window = jax.tree.map(
            lambda a: jnp.pad(a, [(0, 0), (0, 0), (missing, 0)] + [(0, 0)] * (a.ndim - 3)), window
        )
        codes = window.codes.at[:, :, :missing].set(size)  # of no code
        window = replace(window, codes=codes)
    return window, cache


def after_call(
    window: Window, cache: Cache, documents: KeyDocuments, cut: Layout, config: ModelConfig
) -> Cache:
    """The cache of all that is beyond the M newest keys, after the last chunk."""
    start = oldest_key(cut, config)
    if start == 1:
        return cache
    start, beyond = start + cut.chunks * cut.tokens, 1 - start
    return join_oldest(window, beyond, cache, start=start, documents=documents, config=config)


def join_oldest(
    window: Window,
    count: int,
    cache: Cache,
    *,
    start: int,
    documents: KeyDocuments,
    config: ModelConfig,
) -> Cache:
    """The cache with the oldest keys of a window, which begins at timeline index `start`."""
    oldest = jax.tree.map(lambda a: a[:, :, :count], window)
    fades = None
    if window.fades is not None:
        later = window.fades[:, :, None, count:].sum(-1)
        fades = BlockFades.of(oldest.fades[:, :, None], later, jnp.zeros_like(later))
    _, cache = join_blocks(
        cache, oldest, start=start, documents=documents, block=count, fades=fades
    )
    return cache


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
    W. It is emptied where it is not of the current document. A row of length 0 keeps all bits.
    """
    size, length = ring.codes.shape[2], timeline.length[:, None]
    newest = length + iota(size)  # [B, W] timeline indices, oldest first
    at_slot = (iota(size) - (timeline.start + timeline.length)[:, None]) % size
    index = jnp.take_along_axis(newest, at_slot, axis=1)[:, None, :]
    ages = None
    if ring.fades is not None and new.fades is not None:
        assert state.ages is not None
        fades = jnp.concatenate([ring.fades, new.fades], axis=2)
        ages = since(jnp.take_along_axis(fades, newest[:, None], axis=2))
        ages = jnp.take_along_axis(ages, at_slot[:, None], axis=2)
        ages = jnp.where((length > 0)[:, None], ages, state.ages)  # sums made anew round anew

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
        counts=_like(jnp.where(current, cache.mass, 0), state.counts),
        values=jnp.concatenate([part.astype(state.values.dtype) for part in parts], axis=2),
        ages=ages,
        previous=state.previous,
        keys=None if state.keys is None else in_slots(ring.keys, new.keys),
    )


def _like(mass: Mass, counts: Counts) -> Counts:
    """The mass in the dtype of a state: soft writes make a float of what counts whole keys."""
    whole = jnp.issubdtype(counts.dtype, jnp.integer) and jnp.issubdtype(mass.dtype, jnp.floating)
    return (jnp.round(mass) if whole else mass).astype(counts.dtype)
