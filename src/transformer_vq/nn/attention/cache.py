"""The cache of codes: what is older than the window, one entry per code.

Of the keys of each code it holds their mass and the mean of their values. The mass is their number;
with a decay (`bounds.Decay`) each key counts `exp(-rate * distance)`, and so it does in the mean.
The step takes in one key at a time (`join`), blocks many (`join_blocks`), and a query meets a code
with the logarithm of its mass added to the score (`log_mass`). Nothing else knows what a mass is.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num

from transformer_vq.nn import products
from transformer_vq.nn.attention.blockwise import MASKED
from transformer_vq.nn.attention.bounds import Decay
from transformer_vq.nn.layers import iota
from transformer_vq.nn.timeline import KeyDocuments
from transformer_vq.types import (
    First,
    Index,
    LogMass,
    Mass,
    Means,
    PerRow,
    PerRowFlag,
    TimedCodes,
    TimedValues,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The cache of each row; or, with an axis n, as each of n blocks sees it.

    It is of one document, the newest of which a key has left the window.
    """

    mass: Mass  # [B, G, *n, S]: int32 keys of each code; with a decay their weights, in wide
    means: Means  # [B, G, *n, S, V]: of their values, in wide
    first: First  # int32 [B, *n]: timeline index of the first key of the document


def log_mass(mass: Mass, dtype: Any) -> LogMass:
    """What a code's score gains from the mass of its keys: its log; MASKED where there is none."""
    return jnp.where(mass > 0, jnp.log(_divisor(mass).astype(dtype)), MASKED)


def _divisor(mass: Num[jax.Array, "*any"]) -> Num[jax.Array, "*any"]:
    """The mass, and something above 0 where there is none."""
    whole = jnp.issubdtype(mass.dtype, jnp.integer)
    return jnp.maximum(mass, 1 if whole else jnp.finfo(mass.dtype).tiny)


def faded(mass: Mass, tokens: PerRow, decay: Decay | None) -> Mass:
    """The mass `[B, G, S]` when so many tokens have come, `[B]`, and no key has left."""
    if decay is None:
        return mass
    return mass * decay.left(tokens).astype(mass.dtype)[:, None, None]


def join(
    mass: Num[jax.Array, "B G"],
    rows: Float[jax.Array, "B G 2 V"],
    new_values: Float[jax.Array, "B G V"],
    *,
    arrives: PerRowFlag,
    joins: PerRowFlag,
    decay: Decay | None = None,
) -> tuple[Num[jax.Array, "B G"], Float[jax.Array, "B G 2 V"]]:
    """One key per row and head leaves its slot to a new one, and joins the mean of its code.

    `mass` is that of its code, now; `rows` are its value and the mean. Returned are the mass n, and
    the new value and the moved mean: `m + (v - m) w / n`, w = 1 or, with a decay, what is left of a
    key at distance W. Where no key `arrives`, the value stays; where none `joins` (it is of an
    older document, or there is no cache), mass and mean do.

    The two rows are made by a product, which XLA does not fuse with the read of them (fused, each
    number is read by itself).
    """
    added = joins[:, None].astype(mass.dtype)
    if decay is not None:
        added = added * math.exp(-decay.rate * decay.ring_len)
    mass = mass + added
    step = added.astype(rows.dtype) / _divisor(mass).astype(rows.dtype)
    keep = jnp.broadcast_to(~arrives[:, None], step.shape).astype(rows.dtype)
    zero = jnp.zeros_like(step)
    mix = jnp.stack([jnp.stack([keep, zero], -1), jnp.stack([step, 1 - step], -1)], axis=-2)
    rows = products.matmul_exact(mix, rows)
    new_values = ((1 - keep)[..., None] * new_values).astype(rows.dtype)
    return mass, rows.at[:, :, 0].add(new_values)


@jax.named_scope("join_blocks")
def join_blocks(
    cache: Cache,
    codes: TimedCodes,
    values: TimedValues,
    *,
    start: Index,
    documents: KeyDocuments,
    block: int,
    decay: Decay | None = None,
) -> tuple[Cache, Cache]:
    """The caches that n blocks see, and the one after them.

    The keys `codes` `[B, G, n block]`, `values` `[B, G, n block, V]` stand from timeline index
    `start` on; those of block i leave the window before block i + 1. Key i leaves when token i
    arrives, so only as many keys leave as tokens are real.
    """
    size = cache.mass.shape[-1]
    codes = codes.reshape(*codes.shape[:2], -1, block)
    values = values.reshape(*codes.shape, -1)
    joins, firsts = joining(cache.first, codes.shape[2], start, documents, block)
    codes = jnp.where(joins[:, None], codes, size)  # of no code
    values = values.astype(cache.means.dtype)
    weights = jnp.ones((*codes.shape, 1), values.dtype)
    fading = None
    if decay is not None:
        left, fading = fade_over_blocks(codes.shape[2], start, documents, block, decay)
        weights = weights * left[:, None, ..., None].astype(values.dtype)
        values = weights * values
    sums = products.sum_by_code(values, codes, size)
    added = products.sum_by_code(weights, codes, size)  # [B, G, n, S, 1]

    # Cache i holds the cache at first and what blocks 0 to i - 1 added, of its own document.
    firsts = jnp.concatenate([cache.first[:, None], firsts], axis=1)  # [B, n + 1]
    same = jnp.tril(firsts[:, :, None] == firsts[:, None, :]).astype(cache.means.dtype)
    keep = same if fading is None else same * fading.astype(same.dtype)
    sums, added = _over_blocks(keep[:, :, 1:], sums), _over_blocks(keep[:, :, 1:], added)
    base = _over_blocks(same[:, :, :1], cache.means[:, :, None])
    kept = keep[:, None, :, :1].astype(cache.mass.dtype)  # [B, 1, n + 1, 1]
    mass = kept * cache.mass[:, :, None] + added[..., 0].astype(cache.mass.dtype)
    total = _divisor(mass)[..., None].astype(cache.means.dtype)
    means = base + (sums - added * base) / total
    seen = Cache(mass[:, :, :-1], means[:, :, :-1], firsts[:, :-1])
    return seen, Cache(mass[:, :, -1], means[:, :, -1], firsts[:, -1])


def fade_over_blocks(
    blocks: int, start: Index, documents: KeyDocuments, block: int, decay: Decay
) -> tuple[Float[jax.Array, "B n j"], Float[jax.Array, "B i k"]]:
    """What is left of each key of `join_blocks` at the end of its block; and of the mass at the end
    of block k - 1, at the end of block i - 1 (k <= i; k = 0: before all blocks).

    Ends are counted in real tokens: padding takes no time.
    """
    ends = jnp.maximum(start - 1 + iota(blocks + 1) * block, 0)
    ends = decay.ring_len - 1 + jnp.minimum(ends, documents.length[:, None])  # [B, n + 1]
    index = start + iota(blocks * block).reshape(-1, block)
    return decay.left(ends[:, 1:, None] - index), decay.left(ends[:, :, None] - ends[:, None, :])


def joining(
    cache_first: Int[jax.Array, "B"],
    blocks: int,
    start: Index,
    documents: KeyDocuments,
    block: int,
) -> tuple[Bool[jax.Array, "B n j"], Int[jax.Array, "B n"]]:
    """Which keys of each block join the cache, and the document that it then is of, by its `first`.

    That is the document of the newest key that has left; keys of older ones do not join.
    """
    index = start + iota(blocks * block).reshape(-1, block)
    length = documents.length[:, None]
    newest = jnp.minimum(index[:, -1], length - 1)  # [B, n]
    firsts = jnp.where(start < length, documents.first_at(newest), cache_first[:, None])
    return (index < length[..., None]) & (index >= firsts[..., None]), firsts


def _over_blocks(
    keep: Float[jax.Array, "B i k"], x: Float[jax.Array, "B G k S X"]
) -> Float[jax.Array, "B G i S X"]:
    """Sums over blocks k, as far as `keep` takes them over into cache i.

    Products, here and in the backward pass: XLA's sums over blocks are slow on a CPU.
    """
    flat = x.reshape(*x.shape[:3], -1)
    flat = products.matmul_exact(keep[:, None], flat)
    return flat.reshape(*flat.shape[:3], *x.shape[3:])
