"""The cache of codes: what is older than the window, one entry per code.

Of the keys of each code s it holds their mass n_s and the mean m_s of their values
(docs/mathematics.md, "Linear equals quadratic"). The mass is their number; where keys fade
(`fading.py`) each counts what is left of it, and so it does in the mean ("A bounded past").
The step takes in one key at a time (`join`), a few tokens as many keys as stay (`join_few`), blocks
all that leave their windows (`join_blocks`). A query meets a code with the logarithm of its mass
added to the score (`log_mass`). Nothing else knows what a mass is.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num, Shaped

from transformer_vq.nn import products
from transformer_vq.nn.attention.blockwise import MASKED
from transformer_vq.nn.attention.fading import BlockFades
from transformer_vq.nn.attention.inputs import Window
from transformer_vq.nn.attention.writes import soft_sums
from transformer_vq.nn.layers import iota
from transformer_vq.nn.timeline import KeyDocuments
from transformer_vq.sharding import cuts_columns
from transformer_vq.types import (
    Codewords,
    First,
    Index,
    LogMass,
    Mass,
    Means,
    PerRowFlag,
    TimedBlocks,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The cache of each row; or, with an axis n, as each of n blocks sees it.

    It is of one document, the newest of which a key has left the window.
    """

    mass: Mass  # [B, G, *n, S]: int32 keys of each code; where they fade their weights, in wide
    means: Means  # [B, G, *n, S, V]: of their values, in wide
    first: First  # int32 [B, *n]: timeline index of the first key of the document


def log_mass(mass: Mass, dtype: Any) -> LogMass:
    """What a code's score gains from the mass of its keys: its log; MASKED where there is none."""
    return jnp.where(mass > 0, jnp.log(_divisor(mass).astype(dtype)), MASKED)


def _divisor(mass: Num[jax.Array, "*any"]) -> Num[jax.Array, "*any"]:
    """The mass, and 1 where there is none."""
    if jnp.issubdtype(mass.dtype, jnp.integer):
        return jnp.maximum(mass, 1)
    return jnp.where(mass > 0, mass, jnp.ones_like(mass))


@jax.custom_jvp
def _moved(
    base: Float[jax.Array, "*any V"],
    sums: Float[jax.Array, "*any V"],
    added: Float[jax.Array, "*any 1"],
    kept: Float[jax.Array, "*any 1"],
) -> Float[jax.Array, "*any V"]:
    """Means of codes, `base` of the mass that is `kept`, when keys join with these sums of weighted
    values and of weights (`added`): `base + (sums - added base) / (kept + added)`."""
    return base + (sums - added * base) / _divisor(kept + added)


@_moved.defjvp
def _moved_jvp(primals, tangents):
    """Of the mean m = (kept base + sums) / mass, without 1 / mass^2, which a faded mass would
    overflow."""
    base, sums, added, kept = primals
    d_base, d_sums, d_added, d_kept = tangents
    mass = _divisor(kept + added)
    means = _moved(*primals)
    change = d_sums - products.scaled(means, d_added) - products.scaled(means - base, d_kept)
    return means, (change + kept * d_base) / mass


def join(
    mass: Num[jax.Array, "B G"],
    rows: Float[jax.Array, "B G 2 V"],
    new_values: Float[jax.Array, "B G V"],
    *,
    arrives: PerRowFlag,
    joins: PerRowFlag,
    weight: Float[jax.Array, "B G"] | None = None,
) -> tuple[Num[jax.Array, "B G"], Float[jax.Array, "B G 2 V"]]:
    """One key per row and head leaves its slot to a new one, and joins the mean of its code.

    `mass` is that of its code, now; `rows` are its value and the mean; `weight` is what is left of
    it, 1 by default. Returned are the mass `n = mass + weight`, and the new value and the moved
    mean, `m + (v - m) weight / n`. Where no key `arrives`, the value stays; where none `joins` (it
    is of an older document, or there is no cache), mass and mean do.

    The two rows are made by a product, which XLA does not fuse with the read of them (fused, each
    number is read by itself).
    """
    added = joins[:, None].astype(mass.dtype)
    if weight is not None:
        added = added * weight.astype(mass.dtype)
    mass = mass + added
    step = added.astype(rows.dtype) / _divisor(mass).astype(rows.dtype)
    keep = jnp.broadcast_to(~arrives[:, None], step.shape).astype(rows.dtype)
    zero = jnp.zeros_like(step)
    mix = jnp.stack([jnp.stack([keep, zero], -1), jnp.stack([step, 1 - step], -1)], axis=-2)
    rows = products.matmul_exact(mix, rows)
    new_values = ((1 - keep)[..., None] * new_values).astype(rows.dtype)
    return mass, rows.at[:, :, 0].add(new_values)


def join_few(
    codes: Int[jax.Array, "B G j"],
    masses: Num[jax.Array, "B G j"],
    rows: Float[jax.Array, "B G two_j V"],
    new_values: Float[jax.Array, "B G j V"],
    *,
    arrives: Bool[jax.Array, "B j"],
    joins: Bool[jax.Array, "B j"],
    weights: Float[jax.Array, "B G j"] | None = None,
) -> tuple[Num[jax.Array, "B G j"], Float[jax.Array, "B G two_j V"]]:
    """`join` for several keys per row and head, by the formula of docs/mathematics.md, "A few
    tokens": `masses` of the codes of those that leave; `rows` their values, and then the means of
    their codes.

    Keys of equal codes get equal masses and means, in which all of them are.
    """
    count = codes.shape[-1]
    same = codes[..., :, None] == codes[..., None, :]  # [B, G, j, j]
    added = joins[:, None].astype(masses.dtype)
    if weights is not None:
        added = added * weights.astype(masses.dtype)
    added = jnp.where(same, added[..., None, :], 0)
    masses = masses + added.sum(-1, dtype=masses.dtype)
    steps = added.astype(rows.dtype) / _divisor(masses).astype(rows.dtype)[..., None]
    one = jnp.eye(count, dtype=rows.dtype)
    keep = jnp.broadcast_to(~arrives[:, None, :, None], (*codes.shape, 1)).astype(rows.dtype)
    top = jnp.concatenate([one * keep, jnp.zeros_like(steps)], axis=-1)
    bottom = jnp.concatenate([steps, one * (1 - steps.sum(-1, keepdims=True))], axis=-1)
    rows = products.matmul_exact(jnp.concatenate([top, bottom], axis=-2), rows)
    new_values = ((1 - keep) * new_values).astype(rows.dtype)
    return masses, rows.at[:, :, :count].add(new_values)


@jax.named_scope("join_blocks")
def join_blocks(
    cache: Cache,
    leaving: Window,
    *,
    start: Index,
    documents: KeyDocuments,
    block: int,
    fades: BlockFades | None = None,
    soft: Codewords | None = None,
) -> tuple[Cache, Cache]:
    """The caches that n blocks see, and the one after them: n_s and m_s by sums over blocks.

    The keys `leaving`, n blocks of them, stand from timeline index `start` on; those of block i
    leave the window before block i + 1. Key i leaves when token i arrives, so only as many keys
    leave as tokens are real. `fades`: where keys fade. `soft`: the codewords, where gradients are
    those of soft writes (`writes.py`).
    """
    size = cache.mass.shape[-1]
    codes, keys, values = (
        _by_block(x, block) for x in (leaving.codes, leaving.keys, leaving.values)
    )
    joins, firsts = joining(cache.first, codes.shape[2], start, documents, block)
    codes = jnp.where(joins[:, None], codes, size)  # of no code
    values = values.astype(cache.means.dtype)
    weights = jnp.ones((*codes.shape, 1), values.dtype)
    growth = None
    if fades is not None:
        # 1 in value: it is there for the gradient.
        growth = fades.growth().astype(values.dtype)[..., None]  # [B, G, n + 1, 1]
        weights = weights * jnp.exp(fades.key)[..., None].astype(values.dtype)
        weights = weights / growth[:, :, 1:, None]  # cache i + 1 is the first to hold block i
        values = products.scaled(values, weights)
    if soft is None:
        sums = products.sum_by_code(values, codes, size)
        added = products.sum_by_code(weights, codes, size)  # [B, G, n, S, 1]
    else:
        sums, added = soft_sums(keys, values, weights, codes, soft)

    # Cache i holds the cache at first and what blocks 0 to i - 1 added, of its own document.
    firsts = jnp.concatenate([cache.first[:, None], firsts], axis=1)  # [B, n + 1]
    same = jnp.tril(firsts[:, :, None] == firsts[:, None, :]).astype(cache.means.dtype)
    same = same[:, None]  # [B, 1, n + 1, n + 1]
    keep = same if fades is None else same * fades.between().astype(same.dtype)
    sums, added = _over_blocks(keep[..., 1:], sums), _over_blocks(keep[..., 1:], added)
    base = _over_blocks(same[..., :1], cache.means[:, :, None])
    kept = keep[..., :1].astype(cache.mass.dtype)  # [B, 1 or G, n + 1, 1]
    kept = kept * cache.mass[:, :, None]
    mass = kept + added[..., 0].astype(cache.mass.dtype)
    if growth is not None:
        mass = mass * growth.astype(mass.dtype)
    if jnp.issubdtype(mass.dtype, jnp.integer):  # no gradient reaches it
        total = _divisor(mass)[..., None].astype(cache.means.dtype)
        means = base + (sums - added * base) / total
    else:
        means = _moved(base, sums, added, kept[..., None])
    seen = Cache(mass[:, :, :-1], means[:, :, :-1], firsts[:, :-1])
    return seen, Cache(mass[:, :, -1], means[:, :, -1], firsts[:, -1])


def _by_block(x: Shaped[jax.Array, "B G keys *any"], block: int) -> TimedBlocks:
    return x.reshape(*x.shape[:2], -1, block, *x.shape[3:])


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
    keep: Float[jax.Array, "B #G i k"], x: Float[jax.Array, "B G k S X"]
) -> Float[jax.Array, "B G i S X"]:
    """Sums over blocks k, as far as `keep` takes them over into cache i.

    Products, here and in the backward pass: XLA's sums over blocks are slow on a CPU. Of devices
    that share X, no array that is flat in S and X: to make one, each would gather all of it.
    """
    if cuts_columns():
        keep = jnp.broadcast_to(keep, (*x.shape[:2], *keep.shape[2:]))
        return jnp.einsum("bgik,bgksx->bgisx", keep, x, precision="highest")
    flat = products.matmul_exact(keep, x.reshape(*x.shape[:3], -1))
    return flat.reshape(*flat.shape[:3], *x.shape[3:])
