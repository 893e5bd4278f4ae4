"""Attention of a few tokens per row: the state is read once, and takes in only what is to stay.

A query meets the table as it stood before the call, and the new keys one by one. Keys of the ring
that are beyond its window by now score by their codeword alone, as they would in the cache: in a
softmax, a code is what its keys are one by one (docs/mathematics.md). So nothing has to be written
before it is known how many of the tokens stay: `attend_few` makes the outputs, `commit_few` the
state after the first of the tokens.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from transformer_vq.config import ModelConfig
from transformer_vq.nn import products, vq
from transformer_vq.nn.attention.blockwise import MASKED
from transformer_vq.nn.attention.bounds import cap_offsets, keys_beyond
from transformer_vq.nn.attention.cache import join_few, log_mass
from transformer_vq.nn.attention.fading import own_sums, since
from transformer_vq.nn.attention.inputs import QKV, AttentionWeights
from transformer_vq.nn.attention.sink import softmax
from transformer_vq.nn.attention.state import AttentionState
from transformer_vq.nn.attention.step import empty_cache
from transformer_vq.nn.layers import iota, wide
from transformer_vq.nn.timeline import Timeline
from transformer_vq.types import KeyIndex, Outputs, TimedCodes, TimedFades, TimedValues


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewKeys:
    """The keys of a few tokens, as a state takes them in; T of them are j."""

    codes: TimedCodes  # int32 [B, G, T]
    values: TimedValues  # state_dtype [B, G, T, V]
    fades: TimedFades | None  # [B, G, T], in wide; None: keys do not fade


@jax.named_scope("attend_few")
def attend_few(
    x: QKV,
    unit: AttentionWeights,
    state: AttentionState,
    timeline: Timeline,
    config: ModelConfig,
) -> tuple[Outputs, NewKeys]:
    """`attend_blocks` for few tokens per row, without the state after them.

    Every score is made at once, `[B, G, R, T, J + T]`; the table is multiplied once.
    """
    batch, length, heads, _ = x.q.shape
    codes, values = vq.assign(x.k, unit.words), x.v.astype(state.values.dtype)
    new = NewKeys(*jax.tree.map(lambda a: jnp.moveaxis(a, 1, 2), (codes, values, x.fades)))
    weights = softmax(_scores(x, unit, state, new, timeline, config), unit.sink)
    weights = weights.astype(values.dtype).reshape(*weights.shape[:2], -1, weights.shape[-1])
    of_table, own = jnp.split(weights, [state.values.shape[2]], axis=-1)  # [B, G, R T, J], [.., T]
    out = products.matmul_table(of_table, state.values) + jnp.matmul(own, new.values)
    out = out.reshape(batch, -1, heads // x.k.shape[2], length, out.shape[-1])  # [B, G, R, T, V]
    out = jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, -1)
    return out.astype(x.v.dtype), new


def _scores(
    x: QKV,
    unit: AttentionWeights,
    state: AttentionState,
    new: NewKeys,
    timeline: Timeline,
    config: ModelConfig,
) -> Float[jax.Array, "B G R T columns"]:
    """Scores of the keys in the ring, of the codes, of the table's spare rows, and of the new keys;
    in wide."""
    batch, length, heads, d_k = x.q.shape
    ring, groups = config.ring_len, x.k.shape[2]
    shape = (groups, heads // groups, 1, d_k)
    q = jnp.moveaxis(x.q.reshape(batch, length, *shape[:2], d_k), 1, 3)  # [B, G, R, T, K]
    content = jnp.einsum("bgrtk,gsk->bgrts", q + unit.u.reshape(shape), unit.words.astype(q.dtype))
    r = unit.r.reshape(ring, *shape[:2], d_k)
    bias = jnp.einsum("bgrtk,dgrk->bgrtd", q + unit.w.reshape(shape), r)

    keys = jnp.concatenate([state.codes, new.codes], axis=2)[:, :, None, None]
    index = _key_index(timeline, ring, length)[:, None]
    distance = ring + iota(length)[:, None] - index  # [B, T, W + T]
    near = distance <= config.window_len
    seen = (distance >= 0) & (index >= timeline.first[..., None])
    scores = jnp.take_along_axis(content, keys, axis=4)
    biases = jnp.take_along_axis(bias, jnp.clip(distance, 0, ring - 1)[:, None, None], axis=4)
    scores = wide(scores + jnp.where(near[:, None, None], biases, 0))
    far = jnp.full(content.shape, MASKED, scores.dtype)
    if config.use_cache:
        far = wide(content) + log_mass(state.counts, scores.dtype)[:, :, None, None]
    else:
        seen &= near
    if config.far_cap:
        beyond = keys_beyond(ring + iota(length), timeline.first, config)
        offset = cap_offsets(beyond, config).astype(scores.dtype)[..., None]  # [B, T, 1]
        scores += jnp.where(near, 0, offset)[:, None, None]
        far += offset[:, None, None]
    if state.ages is not None and new.fades is not None:
        sums = _sums_of_fades(new.fades, timeline, ring)
        ages = jnp.concatenate([state.ages, -sums], axis=2)
        scores += (ages[:, :, None] + sums[..., None])[:, :, None]
        far += sums[:, :, None, :, None]
    cached = timeline.first == timeline.first_before[:, None]  # the cache is of their document
    far = jnp.where(cached[:, None, None, :, None], far, MASKED)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    spare = state.values.shape[2] - ring - config.codebook_size
    spare = jnp.full((*scores.shape[:-1], spare), MASKED, scores.dtype)
    in_ring, own = jnp.split(scores, [ring], axis=-1)
    return jnp.concatenate([in_ring, far, spare, own], axis=-1)


def _key_index(timeline: Timeline, ring: int, length: int) -> KeyIndex:
    """Timeline indices of the keys in the slots of the ring, and of the new ones."""
    in_slot = (iota(ring) - timeline.start[:, None]) % ring
    own = jnp.broadcast_to(ring + iota(length), (len(in_slot), length))
    return jnp.concatenate([in_slot, own], axis=1)


def _sums_of_fades(fades: TimedFades, timeline: Timeline, ring: int) -> TimedFades:
    """Of each new token, the sum of the fades from the first of the call, or of its document."""
    index = ring + iota(fades.shape[2])
    of_document = jnp.tril(index >= timeline.first[..., None])  # [B, T, T]
    return own_sums(fades[:, :, None], of_document[:, None])[:, :, 0]


@jax.named_scope("commit_few")
def commit_few(
    state: AttentionState, new: NewKeys, timeline: Timeline, config: ModelConfig
) -> AttentionState:
    """The state after the first `timeline.length` of the new keys: as `attend_step` leaves it.

    Rows of which none stays keep their state.
    """
    ring, length = config.ring_len, new.codes.shape[2]
    last = jnp.clip(timeline.length - 1, 0)[:, None]
    first = jnp.take_along_axis(timeline.first, last, axis=1)[:, 0]  # of the document at the end
    if config.reset_at_document:
        begins = (timeline.length > 0) & (first != timeline.first_before)
        state = empty_cache(state, begins, ring)
    for at in range(0, length, ring):  # no slot twice at once
        some = jax.tree.map(lambda a, at=at: a[:, :, at : at + ring], new)
        index = at + iota(some.codes.shape[2])  # of the keys that leave
        arrives = index < timeline.length[:, None]
        joins = arrives & (index >= first[:, None]) & config.use_cache
        slots = (timeline.start[:, None] + index) % ring
        state = _take_in(state, some, slots, arrives, joins)
    return state


def _take_in(
    state: AttentionState,
    new: NewKeys,
    slots: Int[jax.Array, "B j"],
    arrives: Bool[jax.Array, "B j"],
    joins: Bool[jax.Array, "B j"],
) -> AttentionState:
    """`step.take_in` for several keys, each with a slot of its own: rows of the table are read
    once and written once."""
    batch, groups, length = new.codes.shape
    rows, heads = iota(batch)[:, None, None], iota(groups)[:, None]
    slots = jnp.broadcast_to(slots[:, None], new.codes.shape)
    old_codes = state.codes[rows, heads, slots]  # [B, G, j]
    counts, ages, weights = state.counts, state.ages, None
    if ages is not None and new.fades is not None:
        fades = jnp.where(arrives[:, None], new.fades, 0)
        passing = fades.sum(-1, keepdims=True)
        counts, ages = counts * jnp.exp(passing), ages + passing
        old_ages = ages[rows, heads, slots]
        weights = jnp.exp(old_ages)
        ages = ages.at[rows, heads, slots].set(jnp.where(arrives[:, None], since(fades), old_ages))
    both = jnp.concatenate([slots, state.codes.shape[2] + old_codes], axis=2)
    masses, table = join_few(
        old_codes,
        counts[rows, heads, old_codes],
        wide(state.values[rows, heads, both]),
        wide(new.values),
        arrives=arrives,
        joins=joins,
        weights=weights,
    )
    new_codes = jnp.where(arrives[:, None], new.codes, old_codes)
    return replace(
        state,
        codes=state.codes.at[rows, heads, slots].set(new_codes),
        counts=counts.at[rows, heads, old_codes].set(masses),
        values=state.values.at[rows, heads, both].set(table.astype(state.values.dtype)),
        ages=ages,
    )
