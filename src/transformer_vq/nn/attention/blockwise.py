"""Softmax attention of query blocks over their spans and caches, with a backward pass of its own.

As in flash attention (Dao et al., 2022) the weights are not kept for the backward pass: they are
made again from the scores and the saved log-sum-exp, block by block. Everything here is one softmax
over two kinds of columns, near keys and codes; `blocks.py` says what they are.

Axes as in `types.py`: n blocks, c queries of a block, j keys of a span (M + c), d distances
(M + 1, farthest first). What is differentiated is in named tuples, not in dataclasses: their fields
also hold what JAX has in place of the derivative of a flag.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from transformer_vq.nn import products
from transformer_vq.nn.layers import wide
from transformer_vq.types import (
    BlockOutputs,
    BlockQueries,
    BlockScores,
    Codewords,
    FarOffsets,
    FarVisible,
    LogMass,
    LogSums,
    Means,
    NearBiases,
    NearOffsets,
    NearVisible,
    TimedBlocks,
)

MASKED = -1e30  # finite, so that a row with nothing to see gives numbers and not NaN
SAVED = ("attention_out", "attention_lse")  # names of what a rematerialised unit keeps


class Queries(NamedTuple):
    """The queries of each block."""

    content: BlockQueries  # [B, G, n, R, c, K]: q + u
    position: BlockQueries  # [B, G, n, R, c, K]: q + w


class Near(NamedTuple):
    """The keys that each block sees one by one: those before the block, and its own.

    In two parts, so that those of its own are nowhere copied. j counts over both.
    """

    keys: tuple[TimedBlocks, TimedBlocks]  # [B, G, n, M, K] and [B, G, n, c, K]
    values: tuple[TimedBlocks, TimedBlocks]  # [B, G, n, M, V] and [B, G, n, c, V]
    biases: NearBiases  # [d, G, R, K]: position vectors, farthest first
    visible: NearVisible  # bool [B, n, c, j]; of the key by the query
    offsets: NearOffsets | None  # [B, 1 or G, n, 1 or c, j]: added to the scores; None: nothing


class Far(NamedTuple):
    """The cache of each block: a column for each code."""

    words: Codewords  # [G, S, K]
    means: Means  # [B, G, n, S, V]
    log_mass: LogMass  # [B, G, n, S]; MASKED for a code without keys
    visible: FarVisible  # bool [B, n, c]: of the cache by the query
    offsets: FarOffsets | None  # [B, n, c]: added to the scores; None: nothing


def skew(scores: Float[jax.Array, "*any c d"], width: int) -> Float[jax.Array, "*any c j"]:
    """Shift row a right by a: `out[..., a, a + e] = scores[..., a, e]`, zero elsewhere.

    `[..., c, d]` to `[..., c, width]`, with width >= c + d - 1 (Dai et al., 2019, appendix B).
    """
    *lead, rows, entries = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(lead) + 1) + [(0, width + 1 - entries)])
    flat = padded.reshape(*lead, rows * (width + 1))
    return flat[..., : rows * width].reshape(*lead, rows, width)


# Products name their operands in order, as `matmul` does: einsum may swap them, and XLA's CPU
# backend then pays with transposed copies.


def _swap(x: Float[jax.Array, "*any x y"]) -> Float[jax.Array, "*any y x"]:
    return jnp.swapaxes(x, -1, -2)


def _over_blocks(
    queries: BlockQueries, shared: Float[jax.Array, "G #R K y"], rounded: bool
) -> Float[jax.Array, "B G n R c y"]:
    """Queries times what all blocks share, `[G, R or 1, K, y]`."""
    x = jnp.moveaxis(queries, (1, 3), (0, 1))  # [G, r, B, n, c, x]
    groups, repeats, *lead, width = x.shape
    y = products.product(x.reshape(groups, repeats, -1, width), shared, rounded=rounded)
    return jnp.moveaxis(y.reshape(groups, repeats, *lead, -1), (0, 1), (1, 3))


def _over_heads(
    queries: Float[jax.Array, "B G n R c x"], keys: Float[jax.Array, "B G n x y"], rounded: bool
) -> Float[jax.Array, "B G n R c y"]:
    """Queries, or weights, times what all R query heads of a key/value head share."""
    *lead, repeats, rows, width = queries.shape
    queries = queries.reshape(*lead, repeats * rows, width)
    y = products.product(queries, keys, rounded=rounded)
    return y.reshape(*lead, repeats, rows, -1)


def _near_scores(queries: Queries, near: Near, rounded: bool) -> list[BlockScores]:
    """Scores of near keys, `[B, G, n, R, c, j]` in two parts, in wide."""
    bias = wide(_over_blocks(queries.position, jnp.moveaxis(near.biases, 0, -1), rounded))
    bias = _by_column(bias, near.visible.shape[-1])
    scores, start = [], 0
    for keys in near.keys:
        end = start + keys.shape[3]
        part = wide(_over_heads(queries.content, _swap(keys), rounded)) + bias[..., start:end]
        if near.offsets is not None:
            part += near.offsets[:, :, :, None, :, start:end].astype(part.dtype)
        visible = near.visible[:, None, :, None, :, start:end]
        scores.append(jnp.where(visible, part, MASKED))
        start = end
    return scores


def _by_column(bias: Float[jax.Array, "*any c d"], width: int) -> Float[jax.Array, "*any c j"]:
    """Biases by distance, farthest first, at the keys of a span; zero beyond the window."""
    rows, distances = bias.shape[-2:]
    beyond = width - rows - (distances - 1)  # keys that only a reach has in the span
    bias = skew(bias, width - beyond)
    return jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(beyond, 0)]) if beyond else bias


def _far_scores(content: BlockQueries, far: Far, rounded: bool) -> BlockScores:
    """Scores of codes, `[B, G, n, R, c, S]`, in wide."""
    scores = wide(_over_blocks(content, _swap(far.words)[:, None], rounded))
    scores += far.log_mass[:, :, :, None, None]
    if far.offsets is not None:
        scores += far.offsets[:, None, :, None, :, None].astype(scores.dtype)
    return jnp.where(far.visible[:, None, :, None, :, None], scores, MASKED)


@jax.named_scope("softmax")
def _forward(
    queries: Queries, near: Near, far: Far | None, rounded: bool
) -> tuple[BlockOutputs, LogSums]:
    """Outputs, and the logarithm of the sum of exponentials of each query's scores."""
    dtype = queries.content.dtype
    columns = list(zip(_near_scores(queries, near, rounded), near.values, strict=True))
    if far is not None:
        columns.append((_far_scores(queries.content, far, rounded), far.means))
    columns = [(scores, values) for scores, values in columns if scores.shape[-1]]
    tops = [scores.max(-1, keepdims=True) for scores, _ in columns]
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp(scores - top) for scores, _ in columns]
    total = functools.reduce(jnp.add, [w.sum(-1, keepdims=True) for w in weights])
    sums = [
        _over_heads(w.astype(dtype), values, rounded)
        for w, (_, values) in zip(weights, columns, strict=True)
    ]
    out = (wide(functools.reduce(jnp.add, sums)) / total).astype(dtype)
    return out, (top + jnp.log(total))[..., 0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def attend(
    queries: Queries, near: Near, far: Far | None, rounded: bool
) -> tuple[BlockOutputs, LogSums]:
    """Outputs `[B, G, n, R, c, V]`, and the logarithm of the sum of exponentials of each query's
    scores, `[B, G, n, R, c]`, in wide. No gradient reaches `far.words`. `rounded`: as products
    (`products.matmul_rounded`)."""
    return _forward(queries, near, far, rounded)


def _attend_jvp(rounded, primals, tangents):
    """With weights P = exp(scores - lse): d lse = sum(P ds), d out = P dv + (P ds) v - out d lse.

    Linear in the tangents, so JAX makes the backward pass of it, that of flash attention. Offsets
    and masses that depend on nothing that is trained cost nothing.
    """
    queries, near, far = primals
    offsets = tangents[1].offsets
    masses = None if far is None else tangents[2].log_mass
    d_queries, d_near, d_far = jax.tree.map(_number, tangents, is_leaf=_is_zero)
    out, lse = _forward(queries, near, far, rounded)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED, strict=True))
    dtype = out.dtype

    def near_scores(queries, keys, biases):
        return _near_scores(queries, near._replace(keys=keys, biases=biases), rounded)

    def part(scores, d_scores, values, d_values):
        weights = jnp.exp(scores - lse[..., None])
        d_weights = (weights * d_scores).astype(dtype)
        moved = _over_heads(d_weights, values, rounded)
        moved += _over_heads(weights.astype(dtype), d_values, rounded)
        return moved, d_weights @ jnp.ones((scores.shape[-1], 1), dtype)

    scores, d_scores = jax.jvp(
        near_scores,
        (queries, near.keys, near.biases),
        (d_queries, d_near.keys, d_near.biases),
    )
    # What is masked has no weight, so what its score gains need not be masked.
    if offsets is not None and not _is_zero(offsets):
        ends = [x.shape[-1] for x in d_scores]
        moved = jnp.split(offsets[:, :, :, None], ends[:1], axis=-1)
        d_scores = [x + y.astype(x.dtype) for x, y in zip(d_scores, moved, strict=True)]
    columns = list(zip(scores, d_scores, near.values, d_near.values, strict=True))
    if far is not None:
        content, d_content = queries.content, d_queries.content
        scores, d_scores = jax.jvp(
            lambda content: _far_scores(content, far, rounded), (content,), (d_content,)
        )
        if masses is not None and not _is_zero(masses):
            d_scores = d_scores + masses[:, :, :, None, None].astype(d_scores.dtype)
        columns.append((scores, d_scores, far.means, d_far.means))
    parts = [part(*column) for column in columns if column[0].shape[-1]]
    d_out, total = (functools.reduce(jnp.add, x) for x in zip(*parts, strict=True))
    # Spread by a product, not by broadcasting: the backward pass then sums by a product, many times
    # faster on a CPU than XLA's reduction.
    d_out = d_out - out * (total @ jnp.ones((1, out.shape[-1]), dtype))
    return (out, lse), (d_out, wide(total[..., 0]))


attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _is_zero(tangent: object) -> bool:
    return isinstance(tangent, SymbolicZero)


def _number(tangent):
    """A tangent of numbers where JAX only says that it is zero."""
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent
