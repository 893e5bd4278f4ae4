"""Attention of one token per row: few rows of the state are touched, in place."""

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import products, vq
from transformer_vq.nn.attention.blockwise import MASKED
from transformer_vq.nn.attention.cache import log_counts
from transformer_vq.nn.attention.state import AttentionState
from transformer_vq.nn.layers import wide
from transformer_vq.nn.timeline import Timeline


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
    new = products.matmul_exact(mix, old)  # kept or cleared; the mean, moved
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
        far = wide(content) + log_counts(counts, near.dtype)[:, :, None]
    else:
        far = jnp.full((*shape, config.codebook_size), MASKED, near.dtype)
    spare = jnp.full((*shape, values.shape[2] - ring - config.codebook_size), MASKED, near.dtype)
    weights = jax.nn.softmax(jnp.concatenate([near, far, spare], axis=-1), axis=-1)
    out = products.matmul_table(weights.astype(values.dtype), values)
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
