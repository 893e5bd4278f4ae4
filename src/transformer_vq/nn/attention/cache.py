"""The cache of codes: what is older than the window, one entry per code."""

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import products
from transformer_vq.nn.attention.blockwise import MASKED
from transformer_vq.nn.timeline import Timeline


def log_counts(counts: jax.Array, dtype) -> jax.Array:
    """The score that a code gains from the number of its keys: log n, and nothing for none."""
    return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1).astype(dtype)), MASKED)


class Eviction:
    """How keys leave the window and join the cache, in time order.

    A cache is `(counts [B, G, S], means [B, G, S, V], first [B])`: of one document, the newest that
    had a key leave; `first` is the timeline index of that document's first key. Key i leaves when
    token i arrives, so only the first `length` keys leave.
    """

    def __init__(self, config: ModelConfig, timeline: Timeline, ring: int, length: int):
        self.size = config.codebook_size
        self.length = timeline.length
        before = jnp.broadcast_to(timeline.first_before[:, None], (len(timeline.length), ring))
        self.firsts = jnp.concatenate([before, timeline.first], axis=1)  # [B, W + T]

    def first_at(self, index: jax.Array) -> jax.Array:
        """Where the document of key `index` `[B, n]` begins."""
        index = jnp.clip(index, 0, self.firsts.shape[1] - 1)
        return jnp.take_along_axis(self.firsts, index, axis=1)

    def after(self, cache, codes, values, start):
        """The cache after the keys from timeline index `start` on have left.

        codes `[B, G, keys]`, values `[B, G, keys, V]`.
        """
        return self.blocks(cache, codes, values, start, codes.shape[2])[1]

    def blocks(self, cache, codes, values, start, block):
        """The caches that each block sees, stacked along a new axis, and the one after them.

        Keys of block i leave before block i + 1: codes `[B, G, keys]` and values
        `[B, G, keys, V]` begin at index `start`.
        """
        counts, means, cache_first = cache
        codes = codes.reshape(*codes.shape[:2], -1, block)
        values = values.reshape(*codes.shape, -1)
        index = start + jnp.arange(codes[0, 0].size).reshape(-1, block)
        length = self.length[:, None]
        newest = jnp.minimum(index[:, -1], length - 1)  # [B, n]
        firsts = jnp.where(start < length, self.first_at(newest), cache_first[:, None])
        joins = (index < length[..., None]) & (index >= firsts[..., None])  # [B, n, j]
        codes = jnp.where(joins[:, None], codes, self.size)  # of no code
        sums = products.sum_by_code(values.astype(means.dtype), codes, self.size)
        ones = jnp.ones((*codes.shape, 1), means.dtype)
        added = products.sum_by_code(ones, codes, self.size)  # [B, G, n, S, 1]

        # Cache i holds the cache at first and what blocks 0 to i - 1 added, of its own document.
        firsts = jnp.concatenate([cache_first[:, None], firsts], axis=1)  # [B, n + 1]
        keep = jnp.tril(firsts[:, :, None] == firsts[:, None, :]).astype(means.dtype)

        def over(keep: jax.Array, x: jax.Array) -> jax.Array:
            """Products, here and in the backward pass: XLA's sums over blocks are slow on a CPU."""
            flat = x.reshape(*x.shape[:3], -1)
            flat = products.matmul_exact(keep[:, None], flat)
            return flat.reshape(*flat.shape[:3], *x.shape[3:])

        sums, added = over(keep[:, :, 1:], sums), over(keep[:, :, 1:], added)
        base = over(keep[:, :, :1], means[:, :, None])
        kept = keep[:, None, :, :1].astype(jnp.int32)  # [B, 1, n + 1, 1]
        counts = kept * counts[:, :, None] + added[..., 0].astype(jnp.int32)
        total = jnp.maximum(counts, 1)[..., None].astype(means.dtype)
        means = base + (sums - added * base) / total
        seen = (counts[:, :, :-1], means[:, :, :-1], firsts[:, :-1])
        return seen, (counts[:, :, -1], means[:, :, -1], firsts[:, -1])
