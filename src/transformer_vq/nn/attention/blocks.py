"""Attention of many tokens per row over the past and each other, block by block."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from transformer_vq.config import ModelConfig
from transformer_vq.nn import vq
from transformer_vq.nn.attention import blockwise
from transformer_vq.nn.attention.blockwise import Far, Near
from transformer_vq.nn.attention.cache import Eviction, log_counts
from transformer_vq.nn.attention.state import AttentionState, window_keys
from transformer_vq.nn.layers import wide
from transformer_vq.nn.timeline import Timeline

SCORES_PER_GROUP = 2**23  # scores held at once, per unit
BLOCKS_PER_GROUP = 64  # where window and block differ, each is a slice of its own


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
    cache_of = Eviction(config, timeline, ring, length)
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
            far = Far(words, means.astype(dtype), log_counts(counts, means.dtype), sees_cache)
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
