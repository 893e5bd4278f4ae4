"""Soft writes: gradients for keys that are no longer seen one by one, at linear cost.

A key j beyond the window is only in the sums of its code: `sum_s = sum_j A_js w_j v_j`, with A_js 1
for its own code and 0 for the others. So nothing tells it which code would have served the queries
to come. Here A has the gradient of `softmax_s(k_j . C_s)` (straight-through on the assignment, as
in Bengio et al., 2013), and the values stay as they are (`ModelConfig.soft_writes`).

The gradient for A_js is `w_j (d sum_s . v_j + d mass_s)`: a product of the size of that of queries
with the table.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from transformer_vq.nn import products
from transformer_vq.nn.layers import wide
from transformer_vq.types import Codewords

Sums = tuple[Float[jax.Array, "B G n S V"], Float[jax.Array, "B G n S 1"]]


def soft_sums(
    keys: Float[jax.Array, "B G n j K"],
    values: Float[jax.Array, "B G n j V"],
    weights: Float[jax.Array, "B G n j 1"],
    codes: Int[jax.Array, "B G n j"],
    words: Codewords,
) -> Sums:
    """Per code the sum of the values, which hold their weights, and of the weights, of n blocks.

    A key of code S belongs to none, and is left out in value and in gradient.
    """
    weighted = jnp.concatenate([values, weights], axis=-1)
    sums = _sums(keys, weighted, codes, words)
    return sums[..., :-1], sums[..., -1:]


@jax.custom_jvp
def _sums(keys, weighted, codes, words):
    return products.sum_by_code(weighted, codes, words.shape[1])


@_sums.defjvp
def _sums_jvp(primals, tangents):
    keys, weighted, codes, words = primals
    d_keys, d_weighted, _, _ = tangents
    size = words.shape[1]
    transposed = jnp.swapaxes(words, -1, -2)[:, None]  # [G, 1, K, S]
    soft = jax.nn.softmax(wide(keys @ transposed), axis=-1)
    d_logits = wide(d_keys @ transposed)
    d_assigned = soft * (d_logits - jnp.sum(soft * d_logits, axis=-1, keepdims=True))
    written = jnp.where((codes < size)[..., None], weighted, 0)
    moved = jnp.swapaxes(d_assigned.astype(written.dtype), -1, -2) @ written
    sums = products.sum_by_code(weighted, codes, size)
    return sums, products.sum_by_code(d_weighted, codes, size) + moved
