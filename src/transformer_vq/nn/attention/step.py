"""Attention of one token per row: few rows of the state are touched, in place.

The order is that of docs/mathematics.md, "Why M + 1 slots": all that is old fades by the new token
(`fade`), the new key takes the slot of the one that turns far, which joins its code (`take_in`),
and then the query sees all of the table.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer_vq.config import ModelConfig
from transformer_vq.nn import products, vq
from transformer_vq.nn.attention.blockwise import MASKED
from transformer_vq.nn.attention.bounds import cap_offsets, keys_beyond
from transformer_vq.nn.attention.cache import join, log_mass
from transformer_vq.nn.attention.inputs import QKV, Attended, AttentionWeights
from transformer_vq.nn.attention.sink import softmax
from transformer_vq.nn.attention.state import AttentionState
from transformer_vq.nn.layers import iota, wide
from transformer_vq.nn.timeline import Timeline
from transformer_vq.types import (
    Codes,
    Fades,
    Index,
    PerRowFlag,
    TableOfValues,
    Values,
)


@jax.named_scope("attend_step")
def attend_step(
    x: QKV,
    unit: AttentionWeights,
    state: AttentionState,
    timeline: Timeline,
    config: ModelConfig,
) -> Attended:
    """`attend_blocks` for one token per row (T = 1; same shapes), touching few rows of the state.

    The table is read and written in place: two rows are gathered (the value whose slot the new key
    takes, and the mean it joins), two are computed and scattered back, and attention is one softmax
    over W + S scores and one product with the table.
    """
    codes = vq.assign(x.k, unit.words)
    if config.reset_at_document:
        new_document = (timeline.length > 0) & (timeline.first[:, 0] != timeline.first_before)
        state = empty_cache(state, new_document, config.ring_len)
    if x.fades is not None:
        state = fade(state, x.fades)
    state = take_in(state, codes, x.v, timeline, config)
    weights = softmax(_scores(x, unit, state, timeline, config), unit.sink)
    out = products.matmul_table(weights.astype(state.values.dtype), state.values)
    batch, length, heads, _ = x.q.shape
    return Attended(out.reshape(batch, length, heads, -1).astype(x.v.dtype), codes, state)


def fade(state: AttentionState, fades: Fades) -> AttentionState:
    """The state when one more token has come, which makes all keys fade by `[B, 1, G]`."""
    assert state.ages is not None
    fades = jnp.moveaxis(fades, 1, 2)  # [B, G, 1]
    return replace(state, counts=state.counts * jnp.exp(fades), ages=state.ages + fades)


@jax.named_scope("take_in")
def take_in(
    state: AttentionState, codes: Codes, values: Values, timeline: Timeline, config: ModelConfig
) -> AttentionState:
    """The state with one key per row, `codes` `[B, 1, G]` and `values` `[B, 1, G, V]`, in the slot
    of the oldest, which leaves the window and joins the mean of its code.

    Rows of length 0 stay as they are.
    """
    batch, _, groups = codes.shape
    ring = config.ring_len
    rows, heads_of = iota(batch)[:, None], iota(groups)[None, :]
    active = timeline.length > 0
    slot = (timeline.start % ring)[:, None]  # [B, 1]
    old_code = state.codes[rows, heads_of, slot]
    both = jnp.stack([jnp.broadcast_to(slot, old_code.shape), ring + old_code], axis=-1)  # [B G 2]
    weight, ages = None, state.ages
    if ages is not None:  # the oldest key joins with what has not faded; the new one's age is 0
        weight = jnp.exp(ages[rows, heads_of, slot])
        age = jnp.where(active[:, None], 0.0, ages[rows, heads_of, slot])
        ages = ages.at[rows, heads_of, slot].set(age)
    # The oldest key, of timeline index 0, joins if it is of the token's document.
    joins = active & (timeline.first[:, 0] <= 0) & config.use_cache
    # One read of two rows, one write of two rows: anything else makes XLA copy the table.
    count, pair = join(
        state.counts[rows, heads_of, old_code],
        wide(state.values[rows[..., None], heads_of[..., None], both]),
        wide(values[:, 0]),
        arrives=active,
        joins=joins,
        weight=weight,
    )
    pair = pair.astype(state.values.dtype)
    new_code = jnp.where(active[:, None], codes[:, 0], old_code)
    return replace(
        state,
        codes=state.codes.at[rows, heads_of, slot].set(new_code),
        counts=state.counts.at[rows, heads_of, old_code].set(count),
        values=state.values.at[rows[..., None], heads_of[..., None], both].set(pair),
        ages=ages,
    )


def _scores(
    x: QKV, unit: AttentionWeights, state: AttentionState, timeline: Timeline, config: ModelConfig
) -> Float[jax.Array, "B G R J"]:
    """Scores of the keys in the ring, of the codes, and of the table's spare rows; in wide.

    One score per codeword serves the ring, by its codes, and the cache.
    """
    batch, _, heads, d_k = x.q.shape
    ring, groups = config.ring_len, x.k.shape[2]
    shape = (batch, groups, heads // groups)
    q = x.q[:, 0].reshape(*shape, d_k)
    words = unit.words.astype(q.dtype)
    content = jnp.einsum("bgrk,gsk->bgrs", q + unit.u.reshape(*shape[1:], d_k), words)
    r = unit.r.reshape(ring, *shape[1:], d_k)
    bias = jnp.einsum("bgrk,dgrk->bgrd", q + unit.w.reshape(*shape[1:], d_k), r)
    slot = (timeline.start % ring)[:, None]
    distance = (slot - iota(ring)) % ring  # [B, W] of the key in each slot
    near = jnp.take_along_axis(content, state.codes[:, :, None], axis=3)
    near += jnp.take_along_axis(bias, distance[:, None, None], axis=3)
    near = wide(near)
    if state.ages is not None:
        near += state.ages[:, :, None]
    visible = distance <= ring - timeline.first  # of the token's document
    near = jnp.where(visible[:, None, None], near, MASKED)
    if config.use_cache:
        far = wide(content) + log_mass(state.counts, near.dtype)[:, :, None]
        if config.far_cap:
            beyond = keys_beyond(jnp.full((batch, 1), ring), timeline.first, config)
            far += cap_offsets(beyond, config).astype(far.dtype)[:, :, None, None]
    else:
        far = jnp.full((*shape, config.codebook_size), MASKED, near.dtype)
    spare = state.values.shape[2] - ring - config.codebook_size
    spare = jnp.full((*shape, spare), MASKED, near.dtype)
    return jnp.concatenate([near, far, spare], axis=-1)


def empty_cache(state: AttentionState, clear: PerRowFlag, ring_len: int) -> AttentionState:
    """The state with nothing in the cache of the rows to clear, of which a document begins."""
    counts = jnp.where(clear[:, None, None], 0, state.counts)
    return replace(state, counts=counts, values=_clear_means(state.values, clear, ring_len))


@jax.custom_jvp
def _clear_means(values: TableOfValues, clear: PerRowFlag, first_mean: Index) -> TableOfValues:
    """Zero the means, from row `first_mean` of the table on, of the rows to clear.

    A loop of zero or one turns: while no row starts a document, the table is not touched.
    """

    def turn(_, values: TableOfValues) -> TableOfValues:
        return _without_means(values, clear, first_mean)

    return jax.lax.fori_loop(0, jnp.any(clear).astype(jnp.int32), turn, values)


@_clear_means.defjvp
def _clear_means_jvp(primals, tangents):
    _, clear, first_mean = primals
    return _clear_means(*primals), _without_means(tangents[0], clear, first_mean)


def _without_means(values: TableOfValues, clear: PerRowFlag, first_mean: Index) -> TableOfValues:
    is_mean = iota(values.shape[2]) >= first_mean
    return jnp.where(clear[:, None, None, None] & is_mean[:, None], 0, values)
