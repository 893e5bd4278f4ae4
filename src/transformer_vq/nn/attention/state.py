"""What an attention unit remembers: the ring of the newest keys, and the cache of older ones."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig


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
