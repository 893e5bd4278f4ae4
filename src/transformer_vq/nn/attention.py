"""Attention over a window of quantized keys and a cache of codes, exact and in linear time.

A softmax over all past keys splits in two (docs/mathematics.md): keys at distance up to M each
have a score of their own; older keys score by their code alone, so all keys of code s count as one
key with score `(q + u) . C_s + log n_s` and value the mean of theirs. The state holds just that:

- a ring of W = M + 1 slots (slot = position mod W) with the code and value of the newest keys;
- for each code, the count and mean value of the keys that have left the ring.

`attend_blocks` takes many tokens at once, `attend_step` one per row; both mean the same.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from transformer_vq.config import ModelConfig
from transformer_vq.nn import blockwise, layers, vq
from transformer_vq.nn.blockwise import MASKED, Far, Near
from transformer_vq.nn.layers import wide

SCORES_PER_GROUP = 2**23  # scores held at once, per unit
BLOCKS_PER_GROUP = 64  # where window and block differ, each is a slice of its own


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionState:
    """What one attention unit remembers of the past, per row and key/value head.

    `values` is one table of J rows: 0..W-1 are the ring, row W + s is the mean value of code s, the
    rest is zero. One array, because then a step reads and writes it in place
    (docs/architecture.md).
    """

    codes: jax.Array  # int32 [B, G, W]: code of the key in each ring slot
    counts: jax.Array  # int32 [B, G, S]: keys of each code that have left the ring
    values: jax.Array  # state_dtype [B, G, J, V]
    keys: jax.Array | None = None  # [B, G, W, K]: quantized keys of the ring, in training only


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
    """Nothing seen: all zeros."""
    lead = (batch_size, config.num_kv_heads)
    return AttentionState(
        codes=jnp.zeros((*lead, config.ring_len), jnp.int32),
        counts=jnp.zeros((*lead, config.codebook_size), jnp.int32),
        values=jnp.zeros((*lead, config.table_rows, config.d_v), dtype),
    )


def keep_keys(state: AttentionState, config: ModelConfig) -> AttentionState:
    """An empty state whose window will hold on to its keys as they were when they came.

    For training, where the codebook moves between the pieces of a sequence: so does the reference
    implementation. Without, a code means its codeword of today, which is equal if nothing moves.
    """
    shape = (*state.codes.shape, config.d_k)
    return replace(state, keys=jnp.zeros(shape, config.compute_dtype))


def window_keys(state: AttentionState, words: jax.Array, dtype) -> jax.Array:
    """The keys of the window, `[B, G, W, K]`: kept ones, or the codewords `[G, S, K]` of its codes.

    In a state that carries them, gradients reach them.
    """
    if state.keys is not None:
        return state.keys
    groups = jnp.arange(words.shape[0])[:, None]
    return words.astype(dtype)[groups, state.codes]


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

    Blocks are taken in groups that fit memory: side by side within a group, one group after the
    other, carrying the window and the cache.
    """
    batch, length, heads, d_k = q.shape
    groups, d_v = v.shape[2:]
    dtype = v.dtype
    window, ring, size = config.window_len, config.ring_len, config.codebook_size
    block = min(config.block_len, length)
    per_group, num_groups = _grouping(length, block, batch * heads * (window + block + size))
    if not config.grad_through_cache:  # blocks that exchange no gradient go one by one
        per_group, num_groups = 1, -(-length // block)
    tokens = per_group * block  # of each row in a group
    padded = num_groups * tokens

    codes = checkpoint_name(vq.assign(k, words), "codes")
    near_keys = vq.straight_through(k, vq.look_up(words, codes)).astype(q.dtype)
    words = words.astype(q.dtype)

    # The ring in time order: what stands before the call's own keys.
    slots = ((timeline.start[:, None] + jnp.arange(ring)) % ring)[:, None, :]
    ring_codes = jnp.take_along_axis(state.codes, slots, axis=2)
    ring_values = jnp.take_along_axis(state.values, slots[..., None], axis=2).astype(dtype)
    ring_keys = window_keys(state, words, words.dtype)
    ring_keys = jnp.take_along_axis(ring_keys, slots[..., None], axis=2)

    def by_group(x: jax.Array) -> jax.Array:
        """`[B, T, ...]` as `[num_groups, B, tokens of a group, ...]`, padded at the end."""
        x = jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, num_groups, tokens, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def by_head(x: jax.Array) -> jax.Array:
        """Query heads `[..., H, K]` as `[..., G, R, K]`."""
        return x.reshape(*x.shape[:-2], groups, heads // groups, d_k)

    def by_block(x: jax.Array) -> jax.Array:
        """Keys `[B, T', G, ...]` as `[B, G, T', ...]`."""
        return jnp.moveaxis(x, 2, 1)

    def pushed_out(recent: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The window's keys `[B, G, window, ...]` and new ones, in time order, cut in two: as many
        as are new, which leave the window, and those that stay."""
        stay = max(tokens - window, 0)
        leave = jnp.concatenate([recent[:, :, :tokens], new[:, :, :stay]], axis=2)
        return leave, jnp.concatenate([recent[:, :, tokens:], new[:, :, stay:]], axis=2)

    def before(recent: jax.Array, new: jax.Array) -> jax.Array:
        """The `window` keys before each block of the new ones: `[B, G, n, window, ...]`."""
        if window == block:
            return own(pushed_out(recent, new)[0])
        x = jnp.concatenate([recent, new], axis=2)
        starts = [i * block for i in range(per_group)]
        return jnp.stack([x[:, :, start : start + window] for start in starts], axis=2)

    def own(x: jax.Array) -> jax.Array:
        """Of keys `[B, G, tokens, ...]`, those of each block."""
        return x.reshape(*x.shape[:2], per_group, block, *x.shape[3:])

    u, w, biases = by_head(u), by_head(w), by_head(r)[::-1]
    cache_of = _Eviction(config, timeline, ring, length)
    row, column = jnp.arange(block)[:, None], jnp.arange(window + block)
    distance = row + window - column  # [block, M + block]
    in_reach = distance >= 0 if config.use_cache else (distance >= 0) & (distance <= window)

    def attend_group(carry, xs):
        i, q, keys, values, codes, first = xs
        if not config.grad_through_cache:
            carry = jax.lax.stop_gradient(carry)
        recent, cache = carry
        new = (by_block(codes), by_block(keys), by_block(values))
        pairs = list(zip(recent, new, strict=True))
        near_keys, near_values = ((before(x, y), own(y)) for x, y in pairs[1:])
        leaving, recent = zip(*(pushed_out(x, y) for x, y in pairs), strict=True)
        start = 1 + i * tokens  # timeline index of the first key here
        first = first.reshape(batch, per_group, block)
        index = start + jnp.arange(per_group)[:, None, None] * block + column
        visible = in_reach & (index >= first[..., None])  # [B, n, c, j]

        near = Near(near_keys, near_values, biases, visible)
        far = None
        if config.use_cache:
            caches, cache = cache_of.blocks(cache, leaving[0], leaving[2], start, block)
            counts, means, cache_first = caches
            sees_cache = first == cache_first[..., None]
            log_counts = _log_counts(counts, means.dtype)
            far = Far(words, means.astype(dtype), log_counts, sees_cache)
        q = jnp.moveaxis(by_head(q), 1, 3)  # [B, G, R, tokens, K]
        q = jnp.moveaxis(q.reshape(*q.shape[:3], per_group, block, d_k), 3, 2)
        out = blockwise.attend(q + u[:, None, :, None], q + w[:, None, :, None], near, far)
        out = jnp.moveaxis(out, (2, 4), (1, 2))  # [B, n, c, G, R, V]
        return (recent, cache), out.reshape(batch, tokens, heads, d_v)

    cache = (state.counts, wide(state.values[:, :, ring : ring + size]), timeline.first_before)
    if config.use_cache:  # the oldest slot is beyond the window of every query to come
        cache = cache_of.after(cache, ring_codes[:, :, :1], ring_values[:, :, :1], 0)
    recent = tuple(x[:, :, 1:] for x in (ring_codes, ring_keys, ring_values))
    xs = (
        jnp.arange(num_groups),
        *(by_group(x) for x in (q, near_keys, v, codes, timeline.first)),
    )
    if num_groups == 1:
        (_, cache), out = attend_group((recent, cache), jax.tree.map(lambda x: x[0], xs))
        out = out[:, :length]
    else:
        keep = jax.checkpoint_policies.save_only_these_names(*blockwise.SAVED)
        body = jax.checkpoint(attend_group, policy=keep)
        (_, cache), out = jax.lax.scan(body, (recent, cache), xs)
        out = jnp.moveaxis(out, 0, 1).reshape(batch, padded, heads, d_v)[:, :length]

    # The state after `length` tokens: the newest W keys, each in its slot, and the cache.
    counts, means, cache_first = cache
    newest = timeline.length[:, None] + jnp.arange(ring)  # [B, W] timeline indices, oldest first
    at_slot = (jnp.arange(ring) - (timeline.start + timeline.length)[:, None]) % ring
    index = jnp.take_along_axis(newest, at_slot, axis=1)[:, None, :]
    all_codes = jnp.concatenate([ring_codes, by_block(codes)], axis=2)
    all_values = jnp.concatenate([ring_values, by_block(v)], axis=2)
    keys = None
    if state.keys is not None:
        all_keys = jnp.concatenate([ring_keys, by_block(near_keys)], axis=2)
        keys = jnp.take_along_axis(all_keys, index[..., None], axis=2)
    newest_first = cache_of.first_at(timeline.length[:, None] - 1 + ring)
    current = (newest_first[:, 0] == cache_first)[:, None, None]
    new_values = jnp.take_along_axis(all_values, index[..., None], axis=2)
    new_means = jnp.where(current[..., None], means, 0)  # else it is of an older document
    spare = jnp.zeros_like(state.values[:, :, ring + size :])
    new_state = AttentionState(
        codes=jnp.take_along_axis(all_codes, index, axis=2),
        counts=jnp.where(current, counts, 0),
        values=jnp.concatenate(
            [x.astype(state.values.dtype) for x in (new_values, new_means, spare)], axis=2
        ),
        keys=keys,
    )
    return out, codes, new_state


def _grouping(length: int, block: int, scores_per_query: int) -> tuple[int, int]:
    """Blocks in a group, and groups: as few groups as memory allows, of equal size."""
    blocks = -(-length // block)
    limit = SCORES_PER_GROUP // (block * scores_per_query)
    limit = max(1, min(limit, BLOCKS_PER_GROUP))
    groups = -(-blocks // limit)
    per_group = -(-blocks // groups)
    return per_group, -(-blocks // per_group)


class _Eviction:
    """How keys leave the window and join the cache, in time order.

    A cache is `(counts [B, G, S], means [B, G, S, V], first [B])`: of one document, the newest that
    had a key leave; `first` is the timeline index of that document's first key. Key i leaves when
    token i arrives, so only the first `length` keys leave.
    """

    def __init__(self, config: ModelConfig, timeline: Timeline, ring: int, length: int):
        self.size = config.codebook_size
        self.length = timeline.length
        before = jnp.broadcast_to(timeline.first_before[:, None], (len(timeline.length), ring))
        self.firsts = jnp.concatenate([before, timeline.first], axis=1)  # [B, W + T]

    def first_at(self, index: jax.Array) -> jax.Array:
        """Where the document of key `index` `[B, n]` begins."""
        index = jnp.clip(index, 0, self.firsts.shape[1] - 1)
        return jnp.take_along_axis(self.firsts, index, axis=1)

    def after(self, cache, codes, values, start):
        """The cache after the keys from timeline index `start` on have left.

        codes `[B, G, keys]`, values `[B, G, keys, V]`.
        """
        return self.blocks(cache, codes, values, start, codes.shape[2])[1]

    def blocks(self, cache, codes, values, start, block):
        """The caches that each block sees, stacked along a new axis, and the one after them.

        Keys of block i leave before block i + 1: codes `[B, G, keys]` and values
        `[B, G, keys, V]` begin at index `start`.
        """
        counts, means, cache_first = cache
        codes = codes.reshape(*codes.shape[:2], -1, block)
        values = values.reshape(*codes.shape, -1)
        index = start + jnp.arange(codes[0, 0].size).reshape(-1, block)
        length = self.length[:, None]
        newest = jnp.minimum(index[:, -1], length - 1)  # [B, n]
        firsts = jnp.where(start < length, self.first_at(newest), cache_first[:, None])
        joins = (index < length[..., None]) & (index >= firsts[..., None])  # [B, n, j]
        codes = jnp.where(joins[:, None], codes, self.size)  # of no code
        sums = vq.sum_by_code(values.astype(means.dtype), codes, self.size)
        ones = jnp.ones((*codes.shape, 1), means.dtype)
        added = vq.sum_by_code(ones, codes, self.size)  # [B, G, n, S, 1]

        # Cache i holds the cache at first and what blocks 0 to i - 1 added, of its own document.
        firsts = jnp.concatenate([cache_first[:, None], firsts], axis=1)  # [B, n + 1]
        keep = jnp.tril(firsts[:, :, None] == firsts[:, None, :]).astype(means.dtype)

        def over(keep: jax.Array, x: jax.Array) -> jax.Array:
            """Products, here and in the backward pass: XLA's sums over blocks are slow on a CPU."""
            flat = x.reshape(*x.shape[:3], -1)
            flat = jnp.matmul(keep[:, None], flat, precision="highest")
            return flat.reshape(*flat.shape[:3], *x.shape[3:])

        sums, added = over(keep[:, :, 1:], sums), over(keep[:, :, 1:], added)
        base = over(keep[:, :, :1], means[:, :, None])
        kept = keep[:, None, :, :1].astype(jnp.int32)  # [B, 1, n + 1, 1]
        counts = kept * counts[:, :, None] + added[..., 0].astype(jnp.int32)
        total = jnp.maximum(counts, 1)[..., None].astype(means.dtype)
        means = base + (sums - added * base) / total
        seen = (counts[:, :, :-1], means[:, :, :-1], firsts[:, :-1])
        return seen, (counts[:, :, -1], means[:, :, -1], firsts[:, -1])


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
    # One read of two rows, one write of two rows: anything else makes XLA copy the table. Between
    # them a product, which XLA does not fuse with the read (fused, each number is read by itself).
    old = wide(values[rows[..., None], heads_of[..., None], both])  # [B, G, 2, V]
    count = counts[rows, heads_of, old_code] + leaves.astype(jnp.int32)
    step = leaves / jnp.maximum(count, 1).astype(old.dtype)
    keep = jnp.broadcast_to(~active[:, None], step.shape).astype(old.dtype)
    zero = jnp.zeros_like(step)
    mix = jnp.stack([jnp.stack([keep, zero], -1), jnp.stack([step, 1 - step], -1)], axis=-2)
    new = jnp.matmul(mix, old, precision="highest")  # kept or cleared; the mean, moved
    new = new.at[:, :, 0].add(((1 - keep)[..., None] * wide(v[:, 0])).astype(new.dtype))
    values = values.at[rows[..., None], heads_of[..., None], both].set(new.astype(values.dtype))
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
    spare = jnp.full((*shape, values.shape[2] - ring - config.codebook_size), MASKED, near.dtype)
    weights = jax.nn.softmax(jnp.concatenate([near, far, spare], axis=-1), axis=-1)
    parts = layers.parts_of(1, values[0, 0].size, values.shape[2])
    weights = weights.astype(values.dtype).reshape(*shape, parts, -1)
    table = values.reshape(batch, groups, parts, -1, values.shape[-1])
    out = jnp.einsum("bgrpj,bgpjv->bgprv", weights, table).sum(2)
    out = out.reshape(batch, 1, heads, -1).astype(v.dtype)
    return out, new_codes, AttentionState(codes=codes, counts=counts, values=values)


@jax.custom_jvp
def _clear_means(values: jax.Array, clear: jax.Array, first_mean: jax.Array) -> jax.Array:
    """Zero the means, from row `first_mean` of the table on, of rows that start a document.

    A loop of zero or one turns: while no row starts a document, the table is not touched.
    """

    def turn(_, values):
        return _without_means(values, clear, first_mean)

    return jax.lax.fori_loop(0, jnp.any(clear).astype(jnp.int32), turn, values)


@_clear_means.defjvp
def _clear_means_jvp(primals, tangents):
    _, clear, first_mean = primals
    return _clear_means(*primals), _without_means(tangents[0], clear, first_mean)


def _without_means(values: jax.Array, clear: jax.Array, first_mean: jax.Array) -> jax.Array:
    is_mean = jnp.arange(values.shape[2]) >= first_mean
    return jnp.where(clear[:, None, None, None] & is_mean[:, None], 0, values)
