"""Keys that fade, in blocks: which sums of fades each column of a block's scores gets.

The score of key j for query t gains the fades of the tokens after j, up to t: `D_t - D_j`, D being
the sum of all fades so far. For a block whose first token is a, `D_t - D_(a-1)` is common to all
columns of query t and cancels in its softmax (docs/mathematics.md, "A bounded past", "Blocks").
What is left depends on the column alone:

- a key before the block: the sum of the fades after it, up to a - 1 (`since`);
- a key of the block: minus the sum of those from a up to it;
- a code: the log of the mass of its keys, each of which weighs e to its sum up to a - 1.

No sum is longer than a span and a block, so that precision does not suffer on long texts.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from transformer_vq.nn import products
from transformer_vq.nn.layers import iota
from transformer_vq.types import NearOffsets, RingFades


def since(fades: Float[jax.Array, "*any j"]) -> Float[jax.Array, "*any j"]:
    """Of each key, the sum of the fades of the keys after it."""
    later = jnp.concatenate([fades[..., 1:], jnp.zeros_like(fades[..., :1])], axis=-1)
    return jax.lax.cumsum(later, axis=later.ndim - 1, reverse=True)


def fades_of(ages: RingFades) -> RingFades:
    """The inverse of `since` for ages in the order of time. That of the oldest is lost, and 0."""
    return jnp.concatenate([ages[..., :1], ages[..., :-1]], axis=-1) - ages


def own_sums(
    fades: Float[jax.Array, "B G n c"], of_document: Bool[jax.Array, "B n c c"]
) -> Float[jax.Array, "B G n c"]:
    """Of each token of a block, the sum of the fades from the block's first up to it; or from the
    first of its document, so that not even the rounding depends on an earlier one.

    `of_document`: which tokens of the block, up to each, are of its document.
    """
    sums = products.matmul_exact(of_document[:, None].astype(fades.dtype), fades[..., None])
    return sums[..., 0]


def column_offsets(
    older: Float[jax.Array, "B G n j"], own: Float[jax.Array, "B G n c"]
) -> Float[jax.Array, "B G n 1 span"]:
    """What the scores of the keys of each span gain: from the fades of the keys before the block,
    and the sums of `own_sums`."""
    return jnp.concatenate([since(older), -own], axis=-1)[:, :, :, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockFades:
    """The fades that a cache meets over n blocks, as sums.

    Cache i is that before block i; cache n that after them all.
    """

    key: Float[jax.Array, "B G n j"]  # of each key that leaves in block i, up to cache i + 1
    mass: Float[jax.Array, "B G n"]  # of the mass in cache i, up to cache i + 1

    @classmethod
    def of(
        cls,
        leaving: Float[jax.Array, "B G n j"],
        window: Float[jax.Array, "B G n"],
        passing: Float[jax.Array, "B G n"],
    ) -> "BlockFades":
        """From the fades of the keys that leave in block i, the sum of those that are then still
        in the window, and the sum of the tokens of block i."""
        return cls(since(leaving) + window[..., None], passing)

    def between(self) -> Float[jax.Array, "B G i k"]:
        """K of docs/mathematics.md: what is left in cache i of the mass of cache k <= i (elsewhere:
        1), `e^(E_i - E_k)`, with E_i the sum of the fades up to cache i.

        A constant: its gradient is that of `growth`, the same at less cost.
        """
        blocks = self.mass.shape[-1]
        after = iota(blocks)[:, None] >= iota(blocks + 1)  # block b is after cache k
        sums = jnp.where(after, self.mass[..., None], 0.0)
        sums = jax.lax.cumsum(sums, axis=sums.ndim - 2)  # from k up to and with block b
        sums = jnp.concatenate([jnp.zeros_like(sums[..., :1, :]), sums], axis=-2)
        return jax.lax.stop_gradient(jnp.exp(sums))

    def growth(self) -> Float[jax.Array, "B G i"]:
        """1, with the gradient of `e^(E_i)`.

        Of `e^(E_i - E_k)` the first factor is one of all the mass of cache i, the second one of
        every key that cache k was the first to hold. So the mass of cache i times `growth`, and
        the weight of each such key over it, give E its gradient by sums over keys and codes, where
        the gradient of `between` would take products of all that the caches hold.
        """
        sums = jax.lax.cumsum(self.mass, axis=self.mass.ndim - 1)
        sums = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums], axis=-1)
        return jnp.exp(sums - jax.lax.stop_gradient(sums))


@dataclass(frozen=True)
class ChunkFades:
    """What the n blocks of a chunk need of the fades of their keys."""

    columns: NearOffsets  # [B, G, n, 1, j]: what the scores of the keys of each span gain
    common: Float[jax.Array, "B G n c"]  # what they are short of, each query's alike
    blocks: BlockFades
