"""The quadratic baseline: attention over unquantized keys, position biases at every distance.

Its state is a key/value cache of a capacity fixed when the state is made.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn.attention import Timeline
from transformer_vq.nn.blockwise import MASKED
from transformer_vq.nn.layers import wide


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullAttentionState:
    """Keys and values of all tokens so far, at their positions."""

    keys: jax.Array  # state_dtype [B, G, capacity, K]
    values: jax.Array  # state_dtype [B, G, capacity, V]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


def init_full_state(
    config: ModelConfig, batch_size: int, capacity: int, dtype
) -> FullAttentionState:
    """Nothing seen: all zeros."""
    lead = (batch_size, config.num_kv_heads, capacity)
    return FullAttentionState(
        keys=jnp.zeros((*lead, config.d_k), dtype),
        values=jnp.zeros((*lead, config.d_v), dtype),
    )


def attend_full(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    u: jax.Array,
    w: jax.Array,
    r: jax.Array,
    state: FullAttentionState,
    timeline: Timeline,
    config: ModelConfig,
) -> tuple[jax.Array, FullAttentionState]:
    """Attention of T new tokens per row over the cache and each other; any T.

    Shapes as in `attend_blocks`, with r `[capacity, H, K]`: one row per distance. A query beyond
    the capacity gives NaN: `extend` refuses it first wherever positions are known.
    """
    batch, length, heads, d_k = q.shape
    groups, capacity = k.shape[2], state.capacity
    positions = timeline.start[:, None] + jnp.arange(length)
    real = jnp.arange(length) < timeline.length[:, None]
    target = jnp.where(real, positions, capacity)[:, :, None]  # past the end: dropped
    index = (jnp.arange(batch)[:, None, None], jnp.arange(groups), target)
    state = FullAttentionState(
        keys=state.keys.at[index].set(k.astype(state.keys.dtype), mode="drop"),
        values=state.values.at[index].set(v.astype(state.values.dtype), mode="drop"),
    )
    q = jnp.moveaxis(q.reshape(batch, length, groups, heads // groups, d_k), 1, 3)
    u, w = (x.reshape(groups, heads // groups, 1, d_k) for x in (u, w))
    r = r.reshape(capacity, groups, heads // groups, d_k)

    distance = positions[:, :, None] - jnp.arange(capacity)  # [B, T, capacity]
    bias = jnp.einsum("bgrtk,dgrk->bgrtd", q + w, r)
    bias = jnp.take_along_axis(bias, jnp.clip(distance, 0)[:, None, None], axis=4, mode="clip")
    scores = wide(jnp.einsum("bgrtk,bgjk->bgrtj", q + u, state.keys.astype(k.dtype)) + bias)
    # `first` counts from the oldest of W slots before this call: make it a position.
    first = timeline.first + (timeline.start - config.ring_len)[:, None]
    visible = (distance >= 0) & (jnp.arange(capacity) >= first[..., None])
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bgrtj,bgjv->btgrv", weights, state.values.astype(v.dtype))
    overflow = (positions >= capacity) & real
    out = jnp.where(overflow[..., None, None, None], jnp.nan, out)
    return out.reshape(batch, length, heads, -1), state
