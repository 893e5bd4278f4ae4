"""Attention over a window of quantized keys and a cache of codes, exact and in linear time.

A softmax over all past keys splits in two (docs/mathematics.md): keys at distance up to M each
have a score of their own; older keys score by their code alone, so all keys of code s count as one
key with score `(q + u) . C_s + log n_s` and value the mean of theirs. The state holds just that:

- a ring of W = M + 1 slots (slot = position mod W) with the code and value of the newest keys;
- for each code, the count and mean value of the keys that have left the ring.

`attend_blocks` takes many tokens at once, `attend_step` one per row; both mean the same.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import vq
from transformer_vq.nn.layers import wide

MASKED = -1e30  # finite, so that a row with nothing to see gives numbers and not NaN


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionState:
    """What one attention unit remembers of the past, per row and key/value head.

    `values` is one table: rows 0..W-1 are the ring, row W + s is the mean value of code s. One
    array, because then a step reads and writes it in place (docs/architecture.md).
    """

    codes: jax.Array  # int32 [B, G, W]: code of the key in each ring slot
    counts: jax.Array  # int32 [B, G, S]: keys of each code that have left the ring
    values: jax.Array  # state_dtype [B, G, W + S, V]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Timeline:
    """Where the tokens of one call stand; shared by all units.

    Keys are indexed in time order over the ring and the call: index i < W is the ring's i-th oldest
    slot, index W + t is token t of this call. A query sees the keys from its `first` to itself.
    """

    start: jax.Array  # int32 [B]: tokens consumed before this call
    length: jax.Array  # int32 [B]: real tokens in this call
    first_before: jax.Array  # int32 [B]: `first` of the document the state is in
    first: jax.Array  # int32 [B, T]: index of the first key of each token's document


def init_attention_state(config: ModelConfig, batch_size: int, dtype) -> AttentionState:
    lead = (batch_size, config.num_kv_heads)
    rows = config.ring_len + config.codebook_size
    return AttentionState(
        codes=jnp.zeros((*lead, config.ring_len), jnp.int32),
        counts=jnp.zeros((*lead, config.codebook_size), jnp.int32),
        values=jnp.zeros((*lead, rows, config.d_v), dtype),
    )


def skew(scores: jax.Array, width: int) -> jax.Array:
    """Shift row a right by a: `out[..., a, a + e] = scores[..., a, e]`, zero elsewhere.

    `[..., C, E]` to `[..., C, width]`, with width >= C + E - 1 (Dai et al., 2019, appendix B).
    """
    *lead, rows, entries = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(lead) + 1) + [(0, width + 1 - entries)])
    flat = padded.reshape(*lead, rows * (width + 1))
    return flat[..., : rows * width].reshape(*lead, rows, width)


def _log_counts(counts: jax.Array, dtype) -> jax.Array:
    """The score that a code gains from the number of its keys: log n, and nothing for none."""
    return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1).astype(dtype)), MASKED)


def attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    words: jax.Array,
    u: jax.Array,
    w: jax.Array,
    r: jax.Array,
    state: AttentionState,
    timeline: Timeline,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, AttentionState]:
    """Attention of T new tokens per row over the past and each other, block by block.

    q `[B, T, H, K]`, k `[B, T, G, K]`, v `[B, T, G, V]`, codewords `[G, S, K]`, u, w `[H, K]`,
    r `[M + 1, H, K]` (one row per distance). Returns outputs `[B, T, H, V]`, codes `[B, T, G]` and
    the state after each row's `length` tokens. Outputs at padding are finite and meaningless.
    """
    batch, length, heads, d_k = q.shape
    groups, d_v = v.shape[2:]
    window, ring = config.window_len, config.ring_len
    block = min(config.block_len, length)
    num_blocks = -(-length // block)
    dtype = v.dtype

    codes = vq.assign(k, words)
    near_keys = vq.straight_through(k, vq.look_up(words, codes))
    words = words.astype(k.dtype)

    # The ring in time order: what stands before the call's own keys.
    oldest = timeline.start[:, None] + jnp.arange(ring)  # [B, W] ring positions, modulo W
    slots = (oldest % ring)[:, None, :]
    ring_codes = jnp.take_along_axis(state.codes, slots, axis=2)
    ring_values = jnp.take_along_axis(state.values, slots[..., None], axis=2).astype(dtype)
    heads_of = jnp.arange(groups)[:, None]
    ring_keys = words[heads_of, ring_codes]

    def blocks(x: jax.Array) -> jax.Array:
        """`[B, T, G, ...]` to `[blocks, B, G, block, ...]`, padded at the end."""
        pad = num_blocks * block - length
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, num_blocks, block, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2)) if x.ndim > 3 else jnp.moveaxis(x, 1, 0)

    def by_group(x: jax.Array) -> jax.Array:
        """Query heads `[..., H, K]` as `[..., G, R, K]`."""
        return x.reshape(*x.shape[:-2], groups, heads // groups, x.shape[-1])

    u, w, r = by_group(u), by_group(w), by_group(r)
    firsts = jnp.concatenate(
        [jnp.broadcast_to(timeline.first_before[:, None], (batch, ring)), timeline.first], axis=1
    )
    block_row, span_column = jnp.arange(block)[:, None], jnp.arange(window + block)
    distance = block_row + window - span_column  # [block, M + block]
    in_reach = distance >= 0 if config.use_cache else (distance >= 0) & (distance <= window)

    def evict(cache, codes, values, index):
        """The cache after the keys at these timeline indices (consecutive) left the window.

        Key i leaves when token i arrives, so only the first `length` keys leave. Documents that
        ended are dropped: the cache holds the newest evicted document only.
        """
        counts, means, cache_first = cache
        leaves = index < timeline.length[:, None]
        newest = jnp.clip(jnp.minimum(index[-1], timeline.length - 1), 0)
        newest_first = jnp.take_along_axis(firsts, newest[:, None], axis=1)[:, 0]
        first = jnp.where(leaves[:, 0], newest_first, cache_first)
        same = (first == cache_first)[:, None, None]
        counts, means = jnp.where(same, counts, 0), jnp.where(same[..., None], means, 0)
        joins = leaves & (index >= first[:, None])
        hits = jax.nn.one_hot(codes, config.codebook_size, dtype=dtype)
        hits = hits * joins[:, None, :, None].astype(dtype)
        added = hits.sum(2, dtype=means.dtype)
        sums = jnp.einsum("bgjs,bgjv->bgsv", hits, values, preferred_element_type=means.dtype)
        counts = counts + added.astype(jnp.int32)
        total = jnp.maximum(counts, 1).astype(means.dtype)
        means = means + (sums - added[..., None] * means) / total[..., None]
        return counts, means, first

    def body(carry, xs):
        i, q, keys, values, codes, first = xs
        if not config.grad_through_cache:
            carry = jax.lax.stop_gradient(carry)
        (window_codes, window_keys, window_values), cache = carry
        span_keys = jnp.concatenate([window_keys, keys], axis=2)
        span_values = jnp.concatenate([window_values, values], axis=2)
        span_codes = jnp.concatenate([window_codes, codes], axis=2)
        index = 1 + i * block + span_column  # timeline index of each key in the span

        content_query, position_query = q + u[:, :, None], q + w[:, :, None]
        scores = wide(jnp.einsum("bgrck,bgjk->bgrcj", content_query, span_keys))
        bias = jnp.einsum("bgrck,dgrk->bgrcd", position_query, r[::-1])
        scores += skew(wide(bias), window + block)
        visible = in_reach & (index >= first[..., None])  # [B, block, M + block]
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        table = span_values
        if config.use_cache:
            counts, means, cache_first = cache
            far = wide(jnp.einsum("bgrck,gsk->bgrcs", content_query, words))
            far += _log_counts(counts, far.dtype)[:, :, None, None]
            sees_cache = (first == cache_first[:, None])[:, None, None, :, None]
            far = jnp.where(sees_cache, far, MASKED)
            scores = jnp.concatenate([scores, far], axis=-1)
            table = jnp.concatenate([span_values, means.astype(dtype)], axis=2)
            cache = evict(cache, span_codes[:, :, :block], span_values[:, :, :block], index[:block])
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        out = jnp.einsum("bgrcj,bgjv->bgrcv", weights, table)
        recent = (span_codes[:, :, block:], span_keys[:, :, block:], span_values[:, :, block:])
        return (recent, cache), out

    cache = (
        state.counts,
        wide(state.values[:, :, ring:]),
        timeline.first_before,
    )
    if config.use_cache:  # the oldest slot is beyond the window of every query to come
        cache = evict(cache, ring_codes[:, :, :1], ring_values[:, :, :1], jnp.arange(1))
    recent = (ring_codes[:, :, 1:], ring_keys[:, :, 1:], ring_values[:, :, 1:])
    queries = jnp.moveaxis(blocks(by_group(q)), 3, 4)  # [blocks, B, G, R, block, K]
    xs = (
        jnp.arange(num_blocks),
        queries,
        blocks(near_keys),
        blocks(v),
        blocks(codes),
        blocks(timeline.first),
    )
    (_, (counts, means, cache_first)), out = jax.lax.scan(body, (recent, cache), xs)
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # [B, blocks, block, G, R, V]
    out = out.reshape(batch, num_blocks * block, heads, d_v)[:, :length]

    # The state after `length` tokens: the newest W keys, each in its slot, and the cache.
    newest = timeline.length[:, None] + jnp.arange(ring)  # [B, W] timeline indices, oldest first
    at_slot = (jnp.arange(ring) - (timeline.start + timeline.length)[:, None]) % ring
    index = jnp.take_along_axis(newest, at_slot, axis=1)[:, None, :]
    all_codes = jnp.concatenate([ring_codes, jnp.moveaxis(codes, 2, 1)], axis=2)
    all_values = jnp.concatenate([ring_values, jnp.moveaxis(v, 2, 1)], axis=2)
    last_first = jnp.take_along_axis(firsts, (ring + timeline.length - 1)[:, None], axis=1)[:, 0]
    current = (last_first == cache_first)[:, None, None]  # else the cache is of an older document
    values = jnp.concatenate(
        [
            jnp.take_along_axis(all_values, index[..., None], axis=2).astype(state.values.dtype),
            jnp.where(current[..., None], means, 0).astype(state.values.dtype),
        ],
        axis=2,
    )
    new_state = AttentionState(
        codes=jnp.take_along_axis(all_codes, index, axis=2),
        counts=jnp.where(current, counts, 0),
        values=values,
    )
    return out, codes, new_state


def attend_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    words: jax.Array,
    u: jax.Array,
    w: jax.Array,
    r: jax.Array,
    state: AttentionState,
    timeline: Timeline,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, AttentionState]:
    """`attend_blocks` for one token per row (T = 1; same shapes), touching few rows of the state.

    The table is read and written in place: two rows are gathered (the value whose slot the new key
    takes, and the mean it joins), two are computed and scattered back, and attention is one softmax
    over W + S scores and one product with the table.
    """
    batch, _, heads, d_k = q.shape
    groups = k.shape[2]
    ring = config.ring_len
    rows, heads_of = jnp.arange(batch)[:, None], jnp.arange(groups)[None, :]
    active, first = timeline.length > 0, timeline.first[:, 0]
    slot = (timeline.start % ring)[:, None]  # [B, 1]

    new_codes = vq.assign(k, words)
    codes, counts, values = state.codes, state.counts, state.values
    if config.reset_at_document:
        new_document = active & (first != timeline.first_before)
        counts = jnp.where(new_document[:, None, None], 0, counts)
        values = _clear_means(values, new_document, ring)

    # The key in the slot leaves the window and joins the mean of its code.
    leaves = (active & (first <= 0) & config.use_cache)[:, None]
    old_code = codes[rows, heads_of, slot]
    mean_row = ring + old_code
    both = jnp.stack([jnp.broadcast_to(slot, old_code.shape), mean_row], axis=-1)  # [B, G, 2]
    # One read of two rows, one write of two rows: anything else makes XLA copy the table.
    old = wide(values[rows[..., None], heads_of[..., None], both])
    old_value, old_mean = old[:, :, 0], old[:, :, 1]
    count = counts[rows, heads_of, old_code] + leaves.astype(jnp.int32)
    step = leaves / jnp.maximum(count, 1).astype(old_mean.dtype)
    new_mean = old_mean + (old_value - old_mean) * step[..., None]
    new_value = jnp.where(active[:, None, None], wide(v[:, 0]), old_value)
    new = jnp.stack([new_value, new_mean], axis=2).astype(values.dtype)
    values = values.at[rows[..., None], heads_of[..., None], both].set(new)
    counts = counts.at[rows, heads_of, old_code].set(count)
    codes = codes.at[rows, heads_of, slot].set(
        jnp.where(active[:, None], new_codes[:, 0], old_code)
    )

    # One score per codeword serves the ring, by its codes, and the cache.
    shape = (batch, groups, heads // groups)
    q = q[:, 0].reshape(*shape, d_k)
    content = jnp.einsum("bgrk,gsk->bgrs", q + u.reshape(*shape[1:], d_k), words.astype(q.dtype))
    bias = jnp.einsum(
        "bgrk,dgrk->bgrd", q + w.reshape(*shape[1:], d_k), r.reshape(ring, *shape[1:], d_k)
    )
    distance = (slot - jnp.arange(ring)) % ring  # [B, W] of the key in each slot
    near = jnp.take_along_axis(content, codes[:, :, None], axis=3)
    near += jnp.take_along_axis(bias, distance[:, None, None], axis=3)
    visible = distance <= (ring - first)[:, None]
    near = jnp.where(visible[:, None, None], wide(near), MASKED)
    if config.use_cache:
        far = wide(content) + _log_counts(counts, near.dtype)[:, :, None]
    else:
        far = jnp.full((*shape, config.codebook_size), MASKED, near.dtype)
    weights = jax.nn.softmax(jnp.concatenate([near, far], axis=-1), axis=-1)
    out = jnp.einsum("bgrj,bgjv->bgrv", weights.astype(values.dtype), values)
    out = out.reshape(batch, 1, heads, -1).astype(v.dtype)
    return out, new_codes, AttentionState(codes=codes, counts=counts, values=values)


def _clear_means(values: jax.Array, clear: jax.Array, ring: int) -> jax.Array:
    """Zero the means of rows that start a document.

    A loop of zero or one turns: while no row starts a document, the table is not touched.
    """

    def turn(_, values):
        return values.at[:, :, ring:].multiply(~clear[:, None, None, None])

    return jax.lax.fori_loop(0, jnp.any(clear).astype(jnp.int32), turn, values)
