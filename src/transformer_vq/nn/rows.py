"""Large inputs go through a unit in chunks: rows in micro-batches, then time in whole blocks.

So what is in flight fits the caches of a CPU and the memory of any device, and the backward pass
needs to recompute no more than a chunk at a time. Values, states, gradients and dropout do not
depend on how a call is cut.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import products
from transformer_vq.nn.layers import iota
from transformer_vq.nn.timeline import Timeline
from transformer_vq.nn.vq import SamplePositions
from transformer_vq.sharding import row_shares
from transformer_vq.types import Features


class Chunking(NamedTuple):
    """How a call of B rows and T tokens is cut."""

    micro_batches: int  # of rows
    size: int  # tokens of each row in a chunk: whole blocks, or all
    chunks: int  # of a micro-batch, along time


class Chunk(NamedTuple):
    """What goes through a unit at once: some tokens of b rows of a call."""

    x: Features  # [b, tokens, D]
    timeline: Timeline
    weights: jax.Array | None  # [b, tokens]
    samples: SamplePositions | None  # of the call: `here` is 1 where they are in this chunk
    rows: jax.Array  # int32 [b]: which of the batch
    block: jax.Array  # int32 []: which block of the call is the first here


def chunking(config: ModelConfig, batch: int, length: int) -> Chunking:
    """The chunks of a call `[batch, length]`: as many rows as fit one, then as many blocks."""
    most = products.tuning().tokens_per_chunk
    shares = row_shares(batch)  # devices, each of which has rows in every micro-batch
    rows = batch // shares
    fitting = (n for n in range(1, rows) if rows % n == 0 and rows // n * length <= most)
    micro_batches = next(fitting, rows)
    blocks = -(-length // config.block_len)
    per_chunk = max(1, most // (rows // micro_batches * config.block_len))
    whole = config.reach or config.soft_writes  # a state would not take their gradients on
    if config.attention == "full" or whole or blocks <= per_chunk:
        return Chunking(micro_batches, length, 1)
    count = -(-blocks // per_chunk)
    size = -(-blocks // count) * config.block_len
    return Chunking(micro_batches, size, -(-length // size))


# Rows.


def split_rows(tree: Any, count: int) -> Any:
    """Arrays `[B, ...]` as `[count, B / count, ...]`.

    A micro-batch takes every `count`-th row, so that all devices have as many rows of each.
    """

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def own_samples(
    samples: SamplePositions | None, index: jax.Array, count: int
) -> SamplePositions | None:
    """Of the sample positions of all rows, those in one micro-batch, the `index`-th."""
    if samples is None:
        return None
    here = samples.here * (samples.rows % count == index).astype(samples.here.dtype)
    return SamplePositions(samples.rows // count, samples.times, here)


def scan_rows(
    fn: Callable, count: int, carry: Any, by_row: Any, samples: SamplePositions | None
) -> tuple[Any, Any]:
    """`carry, out = fn(carry, rows, samples)` for every micro-batch, one after the other.

    `by_row`: arrays `[B, ...]`, of which `fn` gets the micro-batch. Returns the last carry, and the
    outputs stacked along a new axis.
    """

    def body(carry: Any, xs: tuple) -> tuple[Any, Any]:
        index, rows = xs
        return fn(carry, rows, own_samples(samples, index, count))

    return jax.lax.scan(body, carry, (iota(count), split_rows(by_row, count)))


# Time.


def split_time(cut: Chunking, micro_batch: Chunk, config: ModelConfig) -> Chunk:
    """The chunks of a micro-batch along time, stacked along a new axis; padded at the end."""
    starts = cut.size * iota(cut.chunks)

    def split(x: jax.Array) -> jax.Array:
        pad = cut.chunks * cut.size - x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], cut.chunks, cut.size, *x.shape[2:]), 1, 0)

    samples = micro_batch.samples
    if samples is not None:
        mine = samples.times // cut.size == iota(cut.chunks)[:, None]
        rows, times = (
            jnp.broadcast_to(x, mine.shape) for x in (samples.rows, samples.times % cut.size)
        )
        samples = SamplePositions(rows, times, samples.here * mine.astype(samples.here.dtype))
    # In a timeline, indices count from the ring before the chunk: of a row that ended earlier, from
    # the ring at its end.
    timeline, offsets = micro_batch.timeline, starts[:, None]
    done = jnp.minimum(offsets, timeline.length)
    first = split(timeline.first)
    before = jnp.concatenate([timeline.first_before[None], first[:-1, :, -1]])
    timeline = Timeline(
        start=timeline.start + done,
        length=jnp.clip(timeline.length - offsets, 0, cut.size),
        first_before=before - done,
        first=first - done[..., None],
    )
    weights = micro_batch.weights
    return Chunk(
        x=split(micro_batch.x),
        timeline=timeline,
        weights=None if weights is None else split(weights),
        samples=samples,
        rows=jnp.broadcast_to(micro_batch.rows, (cut.chunks, *micro_batch.rows.shape)),
        block=micro_batch.block + starts // config.block_len,
    )


def join_time(x: jax.Array, length: int) -> Features:
    """Features of chunks along time `[chunks, b, size, D]` as `[b, length, D]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, :length]
