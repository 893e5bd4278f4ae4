"""Dropout, drawn row by row and block by block, so that it does not depend on how a call is cut."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import layers
from transformer_vq.types import Features, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DropoutKeys:
    """Randomness of one training call: masks that are drawn anew, and masks of a sequence.

    Every row draws for itself, except that all share the mask of the sinusoids: so the rows of a
    batch may go through the model in any parts.
    """

    call: Key
    sequence: Key  # the same in all calls that continue one sequence
    rows: jax.Array  # int32 [B]: which rows of the batch those of the call are


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnitKeys:
    """Randomness of one unit; of all of them, with a leading axis N, in a scan."""

    call: Key
    sequence: Key


def unit_keys(keys: DropoutKeys, num_units: int) -> UnitKeys:
    """The keys of all units, stacked along an axis N."""
    return jax.vmap(
        lambda i: UnitKeys(jax.random.fold_in(keys.call, i), jax.random.fold_in(keys.sequence, i))
    )(layers.iota(num_units))


def drop_embedding(keys: DropoutKeys, x: Features, config: ModelConfig) -> Features:
    """Dropout of the input of the first unit."""
    if not config.dropout_embedding:
        return x
    key = jax.random.fold_in(keys.call, config.num_units)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, keys.rows)
    return jax.vmap(lambda key, x: layers.dropout(key, x, config.dropout_embedding))(row_keys, x)


def drop_sinusoids(
    keys: UnitKeys, wave: jax.Array, config: ModelConfig
) -> tuple[jax.Array, UnitKeys]:
    """Dropout of the sinusoids of the distances `[distances, D]`, and the keys for the rest."""
    sinusoid_key, rest = jax.random.split(keys.sequence)
    wave = layers.dropout(sinusoid_key, wave, config.dropout_sinusoid)
    return wave, UnitKeys(keys.call, rest)


def drop_branch(
    keys: UnitKeys,
    branch: int,
    added: Features,
    rows: jax.Array,
    first_block: jax.Array,
    config: ModelConfig,
) -> Features:
    """Dropout of what a branch of a unit (0: attention, 1: MLP) adds to some tokens.

    By the key of the call numbers are dropped, by that of the sequence whole rows. `rows` `[b]`
    says which rows of the batch these are, `first_block` `[]` which block of the call comes first:
    every block of every row has a key of its own.
    """
    call, sequence = (jax.random.fold_in(key, branch) for key in (keys.call, keys.sequence))
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
        x = jax.vmap(of_row, in_axes=(0, None, 0))(rows, first_block + layers.iota(blocks), x)
        added = x.reshape(batch, -1, width)[:, :length]
    return jax.vmap(drop_row)(rows, added) if config.dropout_layer else added
