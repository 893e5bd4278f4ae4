"""Causal softmax attention over all keys, tile by tile, with a backward pass of its own.

Flash attention (Dao et al., 2022) with a position bias at every distance. A tile is one block of
queries against one block of keys. Tiles in the future of their queries are skipped, as are those
that no row of the batch sees (unused cache, older documents); only a block against itself is
partly masked. The forward pass goes through the keys of a query block with a running maximum; the
backward pass makes the weights again from the scores and the saved log-sum-exp, and goes through
the queries of a key block.

Axes as in `types.py`: n query blocks, m >= n key blocks (those before the call first), c tokens of
a block; and e rows of biases of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, Shaped

from transformer_vq.nn.attention.blockwise import MASKED, SAVED
from transformer_vq.nn.layers import iota, wide
from transformer_vq.types import (
    Index,
    TileBiases,
    TileContent,
    TileFirst,
    TileKeys,
    TileLogSums,
    TileOutputs,
    TilePosition,
    TileScores,
    TileValues,
)


class Tiles(NamedTuple):
    """What attention is differentiated by, in blocks: a block is then one piece of memory."""

    content: TileContent  # [n, B, G, R, c, K]: q + u
    position: TilePosition  # [n, G, R, B, c, K]: q + w
    keys: TileKeys  # [m, B, G, c, K]
    values: TileValues  # [m, B, G, c, V]
    biases: TileBiases  # [G, R, m c, K]: position vectors, farthest first


def _swap(x: Float[jax.Array, "*any x y"]) -> Float[jax.Array, "*any y x"]:
    return jnp.swapaxes(x, -1, -2)


def _rows(x: Float[jax.Array, "*any x c y"]) -> Float[jax.Array, "*any x*c y"]:
    """Join the axes before the last but one with it: `[..., x, c, y]` as `[..., x c, y]`."""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _align(x: Float[jax.Array, "*any c e"]) -> Float[jax.Array, "*any c c"]:
    """Of biases `[..., c, e]`, farthest first, those of keys: `out[a, j] = x[a, c - 1 - a + j]`.

    e is 2 c, or c for a block against itself: then entries with j > a mean nothing. Rows are read
    one entry further left each, as if they were one entry shorter (of c: longer).
    """
    *lead, c, width = x.shape
    if width == c:
        x = jnp.pad(x, [(0, 0)] * (len(lead) + 1) + [(1, 0)])
        return x.reshape(*lead, c * (c + 1))[..., c:].reshape(*lead, c, c)
    x = x.reshape(*lead, 2 * c * c)[..., c - 1 : c - 1 + c * (2 * c - 1)]
    return x.reshape(*lead, c, 2 * c - 1)[..., :c]


def _align_transposed(x: Float[jax.Array, "*any c c"], width: int) -> Float[jax.Array, "*any c e"]:
    """`[..., c, c]` to `[..., c, e]`; in a block against itself j > a must hold zeros."""
    *lead, c, _ = x.shape
    none = [(0, 0)] * len(lead)
    if width == c:
        x = jnp.pad(x.reshape(*lead, c * c), [*none, (c, 0)])
        return x.reshape(*lead, c, c + 1)[..., 1:]
    x = jnp.pad(x, [*none, (0, 0), (0, c - 1)]).reshape(*lead, c * (2 * c - 1))
    return jnp.pad(x, [*none, (c - 1, 1)]).reshape(*lead, c, 2 * c)


def _add_at(
    x: Float[jax.Array, "*x"], part: Float[jax.Array, "*part"], start: Index, axis: int
) -> Float[jax.Array, "*x"]:
    """x with `part` added from `start` on, along an axis; in place in a loop."""
    there = jax.lax.dynamic_slice_in_dim(x, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(x, there + part, start, axis)


class _Saved(NamedTuple):
    """What the backward pass needs of query blocks besides `Tiles`."""

    lse: TileLogSums  # [n, B, G, R, c]
    delta: TileLogSums  # [n, B, G, R, c]: the sum of `d_out` times the output, less `d_lse`
    d_out: TileOutputs  # [n, B, G, R, c, V]
    d_out_t: Float[jax.Array, "n B G V Rc"]  # [n, B, G, V, R c]
    content: Float[jax.Array, "n B G K Rc"]  # [n, B, G, K, R c]
    position: Float[jax.Array, "n G R K Bc"]  # [n, G, R, K, B c]


class _Tile:
    """Query block i against key block j; `own`: the block of keys that is that of the queries.

    Products name their operands in order, as in `blockwise`.
    """

    def __init__(self, x: Tiles, first: TileFirst, i: Index, j: Index, own: bool):
        before = len(x.keys) - len(x.content)
        c = x.content.shape[-2]
        self.content, self.position = x.content[i], x.position[i]
        self.keys, self.values = x.keys[j], x.values[j]
        # Biases of distances from (i - j) c - c to (i - j) c + c - 1, or those from 0 on.
        self.width = c if own else 2 * c
        self.start = (len(x.keys) - 1 - (before + i - j)) * c
        self.biases = jax.lax.dynamic_slice_in_dim(x.biases, self.start, self.width, axis=2)
        index = iota(c)
        self.visible = (j * c + index >= first[i][..., None])[:, None, None]  # [B, 1, 1, c, c]
        if own:
            self.visible = self.visible & (index <= index[:, None])

    def scores(self) -> TileScores:
        """`[B, G, R, c, c]`, in wide."""
        content = jnp.matmul(_rows(self.content), _swap(self.keys))
        content = content.reshape(*self.content.shape[:-1], -1)
        position = jnp.matmul(_rows(self.position), _swap(self.biases))
        position = position.reshape(*self.position.shape[:-1], self.width)
        bias = jnp.moveaxis(_align(position), 2, 0)
        return jnp.where(self.visible, wide(content) + wide(bias), MASKED)

    def times_values(self, weights: TileScores) -> Float[jax.Array, "B G R c V"]:
        """Sums of values, in wide, by weights."""
        sums = jnp.matmul(_rows(weights.astype(self.values.dtype)), self.values)
        return wide(sums.reshape(*weights.shape[:-1], -1))

    def pull_back(self, saved: _Saved) -> tuple[Shaped[jax.Array, "..."], ...]:
        """Gradients for content, position, and, transposed, for biases, keys and values; in wide.

        No matrix of weights is transposed, which a CPU pays for: what it multiplies is.
        """
        weights = jnp.exp(self.scores() - saved.lse[..., None])
        d_weights = (_rows(saved.d_out) @ _swap(self.values)).reshape(weights.shape)
        d_scores = (weights * (wide(d_weights) - saved.delta[..., None])).astype(d_weights.dtype)
        d_content = (_rows(d_scores) @ self.keys).reshape(self.content.shape)
        d_keys = saved.content @ _rows(d_scores)
        d_values = saved.d_out_t @ _rows(weights.astype(d_weights.dtype))
        d_bias = _rows(_align_transposed(jnp.moveaxis(d_scores, 0, 2), self.width))
        d_position = (d_bias @ self.biases).reshape(self.position.shape)
        d_biases = saved.position @ d_bias
        return tuple(wide(x) for x in (d_content, d_position, d_biases, d_keys, d_values))


@jax.named_scope("softmax")
def _forward(x: Tiles, first: TileFirst) -> tuple[TileOutputs, TileLogSums]:
    """Outputs, and the logarithm of the sum of exponentials of the scores."""
    before, oldest = len(x.keys) - len(x.content), _oldest(x, first)

    def block(i):
        tile = _Tile(x, first, i, before + i, own=True)
        scores = tile.scores()
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        start = (top, weights.sum(-1, keepdims=True), tile.times_values(weights))

        def add(j, carry):
            top, total, out = carry
            tile = _Tile(x, first, i, j, own=False)
            scores = tile.scores()
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, scale = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = total * scale + weights.sum(-1, keepdims=True)
            return new_top, total, out * scale + tile.times_values(weights)

        top, total, out = start
        if len(x.keys) > 1:
            top, total, out = jax.lax.fori_loop(oldest[i], before + i, add, start)
        return (out / total).astype(x.content.dtype), (top + jnp.log(total))[..., 0]

    return jax.lax.map(block, iota(len(x.content)))


def _oldest(x: Tiles, first: TileFirst) -> Int[jax.Array, "n"]:
    """The first key block that any query of each block sees, `[n]`: they do not fall."""
    return jnp.clip(first.min((1, 2)) // x.content.shape[-2], 0).astype(jnp.int32)


@jax.custom_vjp
def attend(x: Tiles, first: TileFirst) -> tuple[TileOutputs, TileLogSums]:
    """Outputs `[n, B, G, R, c, V]` of causal attention; the last n blocks of keys are the queries'.
    And the logarithm of the sum of exponentials of each query's scores, `[n, B, G, R, c]`.

    `first` int32 `[n, B, c]`: the first key, of all m c, that each query sees. In a row it must
    not fall, nor be beyond the query itself.
    """
    return _forward(x, first)


def _attend_forward(x: Tiles, first: TileFirst):
    out, lse = _forward(x, first)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED, strict=True))
    return (out, lse), (x, first, out, lse)


@jax.named_scope("softmax_backward")
def _attend_backward(residuals, cotangents: tuple[TileOutputs, TileLogSums]):
    """With weights P: d scores = P (d out . v - d out . out + d lse), the rest by the rules of
    products."""
    x, first, out, lse = residuals
    d_out, d_lse = cotangents
    queries, before = len(x.content), len(x.keys) - len(x.content)
    ends = jnp.searchsorted(_oldest(x, first), iota(len(x.keys)), side="right")
    saved = _Saved(
        lse=lse,
        delta=jnp.sum(wide(d_out) * wide(out), axis=-1) - d_lse,
        d_out=d_out,
        d_out_t=_swap(_rows(d_out)),
        content=_swap(_rows(x.content)),
        position=_swap(_rows(x.position)),
    )

    def add(i, j, sums, *, own=False):
        """The sums, with the parts of query block i and key block j added."""
        d_content, d_position, d_biases, d_keys, d_values = sums
        tile = _Tile(x, first, i, j, own)
        parts = tile.pull_back(jax.tree.map(lambda a: a[i], saved))
        d_content = _add_at(d_content, parts[0][None], i, 0)
        d_position = _add_at(d_position, parts[1][None], i, 0)
        d_biases = _add_at(d_biases, parts[2], tile.start, 3)
        return d_content, d_position, d_biases, d_keys + parts[3], d_values + parts[4]

    def key_block(sums, j, *, own):
        sums = (*sums, *(jnp.zeros_like(wide(_swap(a[0]))) for a in (x.keys, x.values)))
        start = jnp.zeros_like(j)
        if own:
            sums = add(j - before, j, sums, own=True)
            start = j - before + 1
        if len(x.keys) > 1:
            end = jnp.minimum(ends[j], queries).astype(j.dtype)
            sums = jax.lax.fori_loop(start, end, lambda i, s: add(i, j, s), sums)
        *sums, d_keys, d_values = sums
        return tuple(sums), tuple(_swap(d.astype(d_out.dtype)) for d in (d_keys, d_values))

    sums = tuple(jnp.zeros_like(wide(a)) for a in (x.content, x.position, _swap(x.biases)))
    parts = []
    for own, start, end in ((False, 0, before), (True, before, len(x.keys))):
        if end > start:
            body = functools.partial(key_block, own=own)
            sums, part = jax.lax.scan(body, sums, jnp.arange(start, end, dtype=jnp.int32))
            parts.append(part)
    d_content, d_position, d_biases = (d.astype(d_out.dtype) for d in sums)
    d_keys, d_values = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return Tiles(d_content, d_position, d_keys, d_values, _swap(d_biases)), None


attend.defvjp(_attend_forward, _attend_backward)
