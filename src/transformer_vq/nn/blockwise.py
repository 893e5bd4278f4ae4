"""Softmax attention of query blocks over their spans and caches, with a backward pass of its own.

As in flash attention (Dao et al., 2022) the weights are not kept for the backward pass: they are
made again from the scores and the saved log-sum-exp, block by block. Everything here is one softmax
over two kinds of columns, near keys and codes; `nn/attention.py` says what they are.

Axes beyond those of `types.py`: n blocks, c queries of a block, j keys of a span (M + block), s
codes, d distances (M + 1, farthest first), r query heads of a key/value head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from transformer_vq.nn.layers import wide

MASKED = -1e30  # finite, so that a row with nothing to see gives numbers and not NaN
SAVED = ("attention_out", "attention_lse")  # names of what a rematerialised unit keeps


class Columns(NamedTuple):
    """What a group of query blocks attends to. Without a cache, `words` and `means` are None."""

    keys: jax.Array  # [B, G, n, j, K]
    values: jax.Array  # [B, G, n, j, V]
    biases: jax.Array  # [d, G, r, K]: position vectors, farthest first
    words: jax.Array | None  # [G, S, K]
    means: jax.Array | None  # [B, G, n, S, V]


class Visibility(NamedTuple):
    """Which columns a query sees: nothing here has a gradient."""

    keys: jax.Array  # bool [B, n, c, j]
    cache: jax.Array  # bool [B, n, c]
    log_counts: jax.Array  # [B, G, n, S]; MASKED for a code without keys


def skew(scores: jax.Array, width: int) -> jax.Array:
    """Shift row a right by a: `out[..., a, a + e] = scores[..., a, e]`, zero elsewhere.

    `[..., c, e]` to `[..., c, width]`, with width >= c + e - 1 (Dai et al., 2019, appendix B).
    """
    *lead, rows, entries = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(lead) + 1) + [(0, width + 1 - entries)])
    flat = padded.reshape(*lead, rows * (width + 1))
    return flat[..., : rows * width].reshape(*lead, rows, width)


# Products name their operands in order, as `matmul` does: einsum may swap them, and XLA's CPU
# backend then pays with transposed copies.


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _over_blocks(queries: jax.Array, shared: jax.Array) -> jax.Array:
    """Queries `[B, G, n, r, c, x]` times what all blocks share, `[G, r or 1, x, y]`."""
    x = jnp.moveaxis(queries, (1, 3), (0, 1))  # [G, r, B, n, c, x]
    groups, repeats, *lead, width = x.shape
    y = jnp.matmul(x.reshape(groups, repeats, -1, width), shared)
    return jnp.moveaxis(y.reshape(groups, repeats, *lead, -1), (0, 1), (1, 3))


def _over_heads(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Queries `[B, G, n, r, c, x]` times what all heads of a group share, `[B, G, n, x, y]`."""
    *lead, repeats, rows, width = queries.shape
    y = jnp.matmul(queries.reshape(*lead, repeats * rows, width), keys)
    return y.reshape(*lead, repeats, rows, -1)


def _scores(content: jax.Array, position: jax.Array, columns: Columns, visibility: Visibility):
    """Scores of near keys `[B, G, n, r, c, j]` and of codes `[..., s]` (or None), in wide."""
    width = columns.keys.shape[3]
    near = wide(_over_heads(content, _swap(columns.keys)))
    bias = _over_blocks(position, jnp.moveaxis(columns.biases, 0, -1))
    near += skew(wide(bias), width)
    near = jnp.where(visibility.keys[:, None, :, None], near, MASKED)
    if columns.words is None:
        return near, None
    far = wide(_over_blocks(content, _swap(columns.words)[:, None]))
    far += visibility.log_counts[:, :, :, None, None]
    return near, jnp.where(visibility.cache[:, None, :, None, :, None], far, MASKED)


def _forward(content, position, columns, visibility):
    near, far = _scores(content, position, columns, visibility)
    top = near.max(-1, keepdims=True)
    if far is not None:
        top = jnp.maximum(top, far.max(-1, keepdims=True))
    near = jnp.exp(near - top)
    total = near.sum(-1, keepdims=True)
    dtype = columns.values.dtype
    out = _over_heads(near.astype(dtype), columns.values)
    if far is not None:
        far = jnp.exp(far - top)
        total += far.sum(-1, keepdims=True)
        out += _over_heads(far.astype(dtype), columns.means)
    out = (wide(out) / total).astype(dtype)
    return out, (top + jnp.log(total))[..., 0]


@jax.custom_jvp
def attend(
    content: jax.Array, position: jax.Array, columns: Columns, visibility: Visibility
) -> jax.Array:
    """Outputs `[B, G, n, r, c, V]` of queries for content, `q + u`, and position, `q + w`.

    Queries are `[B, G, n, r, c, K]`. No gradient reaches `columns.words`.
    """
    return _forward(content, position, columns, visibility)[0]


@attend.defjvp
def _attend_jvp(primals, tangents):
    """With weights P = exp(scores - lse): d out = P dv + (P ds) v - out sum(P ds).

    Linear in the tangents, so JAX makes the backward pass of it, that of flash attention.
    """
    content, position, columns, visibility = primals
    d_content, d_position, d_columns, _ = tangents
    out, lse = _forward(*primals)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED, strict=True))
    dtype = out.dtype

    def scores_of(content, position, keys, biases):
        return _scores(content, position, columns._replace(keys=keys, biases=biases), visibility)

    (near, far), (d_near, d_far) = jax.jvp(
        scores_of,
        (content, position, columns.keys, columns.biases),
        (d_content, d_position, d_columns.keys, d_columns.biases),
    )

    def parts(scores, d_scores, values, d_values):
        weights = jnp.exp(scores - lse[..., None])
        d_weights = weights * d_scores
        moved = _over_heads(d_weights.astype(dtype), values)
        moved += _over_heads(weights.astype(dtype), d_values)
        ones = jnp.ones((scores.shape[-1], 1), dtype)
        return moved, d_weights.astype(dtype) @ ones

    d_out, total = parts(near, d_near, columns.values, d_columns.values)
    if far is not None:
        more, more_total = parts(far, d_far, columns.means, d_columns.means)
        d_out, total = d_out + more, total + more_total
    # Spread by a product, not by broadcasting: the backward pass then sums by a product, many times
    # faster on a CPU than XLA's reduction.
    return out, d_out - out * (total @ jnp.ones((1, out.shape[-1]), dtype))
