"""What an attention unit remembers."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn.layers import iota, wide_dtype
from transformer_vq.types import (
    CachedKeys,
    CachedValues,
    Codewords,
    Counts,
    LastKey,
    RingCodes,
    RingFades,
    RingKeys,
    TableOfValues,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionState:
    """What one attention unit remembers of the past, per row and key/value head.

    `values` is one table of J rows: 0..W-1 are the ring, row W + s is the mean value of code s, the
    rest is zero. One array, because then a step reads and writes it in place
    (docs/architecture.md).
    """

    codes: RingCodes  # int32 [B, G, W]: code of the key in each ring slot
    counts: Counts  # [B, G, S]: mass of each code: int32 keys that have left the ring, or their
    # weights where they fade (`ModelConfig.fades`), in float32 or float64
    values: TableOfValues  # state_dtype [B, G, J, V]
    ages: RingFades | None = None  # [B, G, W], in wide: sum of the fades since the key in each slot
    previous: LastKey | None = None  # [B, G, K], in wide: newest key, unmixed (`key_shift`)
    keys: RingKeys | None = None  # [B, G, W, K]: quantized keys of the ring, in training only


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullAttentionState:
    """What one unit of full attention remembers: all keys and values, at their positions."""

    keys: CachedKeys  # state_dtype [B, G, capacity, K]
    values: CachedValues  # state_dtype [B, G, capacity, V]
    previous: LastKey | None = None  # [B, G, K], in wide: newest key, unmixed (`key_shift`)

    @property
    def capacity(self) -> int:
        return self.keys.shape[-2]


UnitState = AttentionState | FullAttentionState


def init_attention_state(config: ModelConfig, batch_size: int, dtype: Any) -> AttentionState:
    """Nothing seen: all zeros."""
    lead = (batch_size, config.num_kv_heads)
    mass = wide_dtype(config.compute_dtype)
    return AttentionState(
        codes=jnp.zeros((*lead, config.ring_len), jnp.int32),
        counts=jnp.zeros((*lead, config.codebook_size), mass if config.fades else jnp.int32),
        values=jnp.zeros((*lead, config.table_rows, config.d_v), dtype),
        ages=jnp.zeros((*lead, config.ring_len), mass) if config.fades else None,
        previous=_no_key(config, batch_size),
    )


def init_full_state(
    config: ModelConfig, batch_size: int, capacity: int, dtype: Any
) -> FullAttentionState:
    """Nothing seen: all zeros."""
    lead = (batch_size, config.num_kv_heads, capacity)
    return FullAttentionState(
        keys=jnp.zeros((*lead, config.d_k), dtype),
        values=jnp.zeros((*lead, config.d_v), dtype),
        previous=_no_key(config, batch_size),
    )


def _no_key(config: ModelConfig, batch_size: int) -> LastKey | None:
    if not config.key_shift:
        return None
    shape = (batch_size, config.num_kv_heads, config.d_k)
    return jnp.zeros(shape, wide_dtype(config.compute_dtype))


def keep_keys(state: AttentionState, config: ModelConfig) -> AttentionState:
    """An empty state whose window will hold on to its keys as they were when they came.

    For training, where the codebook moves between the chunks of a sequence: so does the reference
    implementation. Without, a code means its codeword of today, which is equal if nothing moves.
    """
    shape = (*state.codes.shape, config.d_k)
    return replace(state, keys=jnp.zeros(shape, config.compute_dtype))


def window_keys(state: AttentionState, words: Codewords, dtype: Any) -> RingKeys:
    """The keys of the ring, `[B, G, W, K]`: kept ones, or the codewords `[G, S, K]` of its codes.

    In a state that carries them, gradients reach them.
    """
    if state.keys is not None:
        return state.keys
    groups = iota(words.shape[0])[:, None]
    return words.astype(dtype)[groups, state.codes]
