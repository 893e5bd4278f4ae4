"""Large inputs go through a unit piece by piece.

So what is in flight fits the caches of a CPU and the memory of any device, and the backward pass
has to make no more than a piece again. First the rows are parted into groups, which have nothing to
do with each other, then time. Values, states, gradients and dropout do not depend on it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import layers, products
from transformer_vq.nn.timeline import Timeline
from transformer_vq.nn.vq import Places
from transformer_vq.sharding import row_shares
from transformer_vq.types import Features, Key


class Plan(NamedTuple):
    """How a call of B rows and T tokens is cut."""

    groups: int  # of rows: every `groups`-th row is of one
    size: int  # tokens of each row in a piece: whole blocks, or all
    pieces: int  # of a group, along time


class Piece(NamedTuple):
    """What goes through a unit at once: some tokens of b rows of a call."""

    x: Features  # [b, tokens, D]
    timeline: Timeline
    weights: jax.Array | None  # [b, tokens]
    places: Places | None  # those of the call: `here` is 1 where they are in this piece
    rows: jax.Array  # int32 [b]: which of the batch
    block: jax.Array  # int32 []: which block of the call is the first here


def plan(config: ModelConfig, batch: int, length: int) -> Plan:
    """The pieces of a call `[batch, length]`: as many rows as go at once, then as many blocks."""
    most = products.tuning().tokens_per_chunk
    shares = row_shares(batch)  # devices, each of which has rows in every group
    rows = batch // shares
    fitting = (n for n in range(1, rows) if rows % n == 0 and rows // n * length <= most)
    groups = next(fitting, rows)
    blocks = -(-length // config.block_len)
    per_piece = max(1, most // (rows // groups * config.block_len))
    if config.attention == "full" or blocks <= per_piece:
        return Plan(groups, length, 1)
    count = -(-blocks // per_piece)
    size = -(-blocks // count) * config.block_len
    return Plan(groups, size, -(-length // size))


def map_groups(plan: Plan, one_group: Callable, unit_state: Any, whole: Piece) -> tuple:
    """`one_group(unit_state, piece)` of every group of rows, one after the other.

    It returns features, state, and statistics or None; so does this, of all rows. A group takes
    every `groups`-th row, so that all devices have as many rows of each.
    """
    if plan.groups == 1:
        return one_group(unit_state, whole)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(-1, plan.groups, *x.shape[1:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def turn(_, xs):
        group, unit_state, x, timeline, weights, rows = xs
        places = whole.places
        if places is not None:
            here = places.here * (places.rows % plan.groups == group)
            places = Places(places.rows // plan.groups, places.times, here)
        return None, one_group(unit_state, Piece(x, timeline, weights, places, rows, whole.block))

    by_row = (unit_state, whole.x, whole.timeline, whole.weights, whole.rows)
    xs = (jnp.arange(plan.groups), *jax.tree.map(split, by_row))
    _, (x, unit_state, statistics) = jax.lax.scan(turn, None, xs)
    statistics = jax.tree.map(lambda a: a.sum(0), statistics)
    return join(x), jax.tree.map(join, unit_state), statistics


def cut_time(plan: Plan, group: Piece, config: ModelConfig) -> Piece:
    """A group's pieces along time, stacked along a new axis; padded at the end."""
    starts = plan.size * jnp.arange(plan.pieces)

    def cut(x: jax.Array) -> jax.Array:
        pad = plan.pieces * plan.size - x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], plan.pieces, plan.size, *x.shape[2:]), 1, 0)

    places = group.places
    if places is not None:
        mine = places.times // plan.size == jnp.arange(plan.pieces)[:, None]
        rows, times = (
            jnp.broadcast_to(x, mine.shape) for x in (places.rows, places.times % plan.size)
        )
        places = Places(rows, times, places.here * mine)
    # In a timeline, indices count from the ring before the piece.
    timeline, offsets = group.timeline, starts[:, None]
    first = cut(timeline.first)
    before = jnp.concatenate([timeline.first_before[None], first[:-1, :, -1]])
    timeline = Timeline(
        start=timeline.start + offsets,
        length=jnp.clip(timeline.length - offsets, 0, plan.size),
        first_before=before - offsets,
        first=first - offsets[..., None],
    )
    return Piece(
        cut(group.x),
        timeline,
        None if group.weights is None else cut(group.weights),
        places,
        jnp.broadcast_to(group.rows, (plan.pieces, *group.rows.shape)),
        group.block + starts // config.block_len,
    )


def join_time(x: jax.Array, length: int) -> Features:
    """Features of pieces along time `[pieces, b, size, D]` as `[b, length, D]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, :length]


def drop(
    keys: tuple[Key, Key], branch: int, added: Features, piece: Piece, config: ModelConfig
) -> Features:
    """Dropout of what a branch of a unit adds to the rows of a piece.

    `keys`: of the call, by which numbers are dropped, and of the sequence, by which whole rows are.
    Every block of every row has a key of its own, so pieces may be cut anyhow.
    """
    call, sequence = (jax.random.fold_in(key, branch) for key in keys)
    batch, length, width = added.shape

    def drop_block(row: jax.Array, block: jax.Array, x: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(call, row), block)
        return layers.dropout(key, x, config.dropout_residual)

    def drop_row(row: jax.Array, x: jax.Array) -> jax.Array:
        return layers.dropout(jax.random.fold_in(sequence, row), x, config.dropout_layer, (1, 1))

    if config.dropout_residual:
        blocks = -(-length // config.block_len)
        pad = blocks * config.block_len - length
        x = jnp.pad(added, [(0, 0), (0, pad), (0, 0)]).reshape(batch, blocks, -1, width)
        of_row = jax.vmap(drop_block, in_axes=(None, 0, 0))
        x = jax.vmap(of_row, in_axes=(0, None, 0))(piece.rows, piece.block + jnp.arange(blocks), x)
        added = x.reshape(batch, -1, width)[:, :length]
    return jax.vmap(drop_row)(piece.rows, added) if config.dropout_layer else added
