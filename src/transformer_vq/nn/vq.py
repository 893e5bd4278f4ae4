"""Vector quantization of keys (paper, section 3.2): assignment, straight-through, moving average.

A codebook is `{"sum": [..., G, S, K], "count": [..., G, S]}`; its codewords are sum over count.
No gradient reaches it: `update_codebook` moves it towards the keys it was given, `revive` sets
codewords that are not used to keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer_vq.nn import products
from transformer_vq.nn.layers import ArraySpec, iota, rms_norm, wide
from transformer_vq.types import Key, Params

MIN_COUNT = 0.01  # a code used less than this keeps its size instead of dividing by nothing


def codebook_specs(num_units: int, num_kv_heads: int, size: int, width: int) -> Params:
    """Codewords start with the distribution of normalised keys: direction free, norm K^1/4."""
    return {
        "sum": ArraySpec(
            (num_units, num_kv_heads, size, width),
            ("unit", "kv_heads", None, None),
            scale=width**-0.25,
        ),
        "count": ArraySpec((num_units, num_kv_heads, size), ("unit", "kv_heads", None), "ones"),
    }


def codewords(codebook: Params, *, sphere: bool = False) -> jax.Array:
    """Codewords `[..., G, S, K]`, without gradient.

    `sphere`: of the norm that keys have, K^1/4. A mean of keys is shorter than they are, and so
    would be the scores that it gives (`ModelConfig.sphere_codewords`).
    """
    count = jnp.maximum(codebook["count"], MIN_COUNT)
    words = codebook["sum"] / count[..., None]
    if sphere:
        words = (rms_norm(words) * words.shape[-1] ** -0.25).astype(words.dtype)
    return jax.lax.stop_gradient(words)


def assign(keys: jax.Array, words: jax.Array) -> jax.Array:
    """The nearest codeword of each key: `[B, T, G, K]` and `[G, S, K]` to int32 `[B, T, G]`.

    |k|^2 is the same for every codeword and is left out.
    """
    keys, words = wide(jax.lax.stop_gradient(keys)), wide(words)
    batch, length, groups, width = keys.shape
    size = words.shape[1]
    flat = jnp.moveaxis(keys, 2, 0).reshape(groups, batch * length, width)
    content = products.matmul_few(flat, words)
    distances = jnp.sum(jnp.square(words), axis=-1)[:, None] - 2.0 * content  # [G, B T, S]
    # The first of the nearest. Two reductions: XLA runs them much faster than an argmin.
    nearest = distances == jnp.min(distances, axis=-1, keepdims=True)
    codes = jnp.min(jnp.where(nearest, iota(size), size - 1), axis=-1)
    return jnp.moveaxis(codes.reshape(groups, batch, length), 0, 2)


def look_up(words: jax.Array, codes: jax.Array) -> jax.Array:
    """Codewords `[G, S, K]` at codes `[B, T, G]`: `[B, T, G, K]`."""
    return words[iota(words.shape[0]), codes]


def straight_through(keys: jax.Array, quantized: jax.Array) -> jax.Array:
    """The quantized keys in value, the keys in gradient (van den Oord et al., 2017)."""
    return keys + jax.lax.stop_gradient(quantized.astype(keys.dtype) - keys)


def commitment(keys: jax.Array, quantized: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over tokens and heads of weight times |k - sg(C_z)|^2; a scalar. Weights are `[B, T]`."""
    error = wide(keys) - jax.lax.stop_gradient(wide(quantized))
    return jnp.sum(weights[..., None] * jnp.sum(jnp.square(error), axis=-1))


def code_statistics(keys: jax.Array, codes: jax.Array, weights: jax.Array, size: int) -> Params:
    """Per code, the weighted sum of its keys `[G, S, K]` and their weight `[G, S]`.

    keys `[B, T, G, K]`, codes `[B, T, G]`, weights `[B, T]`.
    """
    keys = wide(jax.lax.stop_gradient(keys))
    weights = jnp.broadcast_to(weights[..., None, None].astype(keys.dtype), (*codes.shape, 1))
    weighted = jnp.concatenate([keys * weights, weights], axis=-1)
    weighted, codes = jnp.moveaxis(weighted, 2, 1), jnp.moveaxis(codes, 2, 1)
    sums = products.sum_by_code(weighted, codes, size).sum(0)
    return {"sum": sums[..., :-1], "count": sums[..., -1]}


class SamplePositions(NamedTuple):
    """Positions of tokens sampled from a batch, one for every codeword: where to find a key."""

    rows: jax.Array  # int32 [S]
    times: jax.Array  # int32 [S]
    here: jax.Array  # float32 [S]: 1, or 0 for a token that is in another part of the batch


def draw_samples(key: Key, mask: jax.Array, size: int) -> SamplePositions:
    """`size` tokens of those that the mask `[B, T]` counts, drawn without replacement.

    Where fewer count, each is taken as often as another, or once more. The draw depends on the key
    and on nothing of how the batch is spread over devices.
    """
    order = jnp.where(mask, jax.random.uniform(key, mask.shape), -1.0).ravel()
    _, order = jax.lax.top_k(order, min(size, mask.size))
    tokens = jnp.clip(mask.sum(dtype=jnp.int32), 1, len(order))
    rows, times = jnp.divmod(order[iota(size) % tokens], mask.shape[1])
    return SamplePositions(rows, times, jnp.ones(size, jnp.float32))


def keys_at(keys: jax.Array, samples: SamplePositions) -> jax.Array:
    """The keys `[B, T, G, K]` at the sample positions: `[G, S, K]`, zeros for what is not here."""
    keys = wide(jax.lax.stop_gradient(keys))[samples.rows, samples.times]
    return jnp.moveaxis(keys * samples.here[:, None, None].astype(keys.dtype), 1, 0)


def revive(codebook: Params, keys: jax.Array, below: float) -> Params:
    """Codewords that are hardly used start again, each at its key of `[..., G, S, K]`.

    That is: those whose count, a moving average, is less than `below` times the mean count of
    their codebook. They get the mean count, and with it time to find a use.
    """
    count = codebook["count"]
    mean = jnp.mean(wide(count), axis=-1, keepdims=True)
    dead = count < below * mean
    total = (keys * mean[..., None]).astype(codebook["sum"].dtype)
    return {
        "sum": jnp.where(dead[..., None], total, codebook["sum"]),
        "count": jnp.where(dead, mean.astype(count.dtype), count),
    }


def update_codebook(codebook: Params, statistics: Params, decay: float) -> Params:
    """One step of the exponential moving average (design, section 2). Any leading axes.

    `statistics` cover the whole update: all its tokens, over the global batch.
    """
    return jax.tree.map(
        lambda old, new: (decay * old + (1.0 - decay) * new).astype(old.dtype),
        codebook,
        statistics,
    )
