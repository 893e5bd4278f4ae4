"""The forward pass over many tokens: in, units, out. Units are scanned, so that compile time does
not grow with depth; what training needs besides is in `Training`."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import attention, dropout, products, rows
from transformer_vq.nn.attention import AttentionState
from transformer_vq.nn.dropout import DropoutKeys, UnitKeys
from transformer_vq.nn.embedding import embed, to_logits
from transformer_vq.nn.layers import iota
from transformer_vq.nn.model import Model, State
from transformer_vq.nn.rows import Chunk, Chunking
from transformer_vq.nn.timeline import make_timeline
from transformer_vq.nn.unit import (
    PreparedUnit,
    Statistics,
    UnitOutput,
    UnitState,
    UnitTraining,
    apply_unit,
    distance_wave,
    prepare_unit,
    unit_input,
)
from transformer_vq.nn.vq import SamplePositions
from transformer_vq.sharding import cuts_columns, keep_rows
from transformer_vq.types import Features, PerRow, Tokens


class Training(NamedTuple):
    """What training asks of a forward pass; None outside of training."""

    weights: jax.Array  # [B, T]: how much each token counts in the statistics
    samples: SamplePositions | None = None  # tokens whose keys the statistics are to hold
    dropout: DropoutKeys | None = None
    remat: bool = False  # recompute units in the backward pass instead of keeping activations


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """What comes out of a forward pass."""

    features: Features  # before the output projection
    state: State
    statistics: Statistics | None  # in training; those of full attention are zeros


def forward(
    model: Model,
    state: State,
    tokens: Tokens,
    *,
    lengths: PerRow | None = None,
    document_ids: Tokens | None = None,
    training: Training | None = None,
) -> Forward:
    """Continue B sequences by T tokens each: `extend` (which see for the arguments) without the
    logits of every token, which are large, and with what training needs."""
    config = model.config
    batch, length = tokens.shape
    if lengths is None:
        lengths = jnp.full(batch, length, jnp.int32)
    timeline, document_start, document_id = make_timeline(
        config, state, lengths, length, document_ids
    )
    x = keep_rows(embed(model.params, tokens, timeline, config))
    keys = None if training is None else training.dropout
    if keys is not None:
        x = dropout.drop_embedding(keys, x, config)
    call = Chunk(
        x=x,
        timeline=timeline,
        weights=None if training is None else training.weights,
        samples=None if training is None else training.samples,
        rows=iota(batch) if keys is None else keys.rows,
        block=jnp.int32(0),
    )
    out = _run_units(model, state, call, training)
    last = jnp.take_along_axis(out.x, jnp.clip(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = to_logits(model.params, last, config)
    new_state = State(
        position=state.position + lengths,
        document_start=document_start,
        document_id=document_id,
        logits=jnp.where(lengths[:, None] > 0, logits, state.logits),
        units=out.states,
    )
    return Forward(out.x, new_state, out.statistics)


class _UnitsOutput(NamedTuple):
    x: Features
    states: tuple[UnitState, ...]
    statistics: Statistics | None


def _run_units(model: Model, state: State, call: Chunk, training: Training | None) -> _UnitsOutput:
    """All units, one after the other."""
    config = model.config
    wave = distance_wave(config, state.capacity)
    cut = rows.chunking(config, *call.x.shape[:2])
    # What devices share the columns of cannot stand side by side.
    layout = "separate" if cuts_columns() else "fused"
    keys = None
    if training is not None and training.dropout is not None:
        keys = dropout.unit_keys(training.dropout, config.num_units)

    stacked = jax.tree.map(lambda *units: jnp.stack(units), *state.units)
    # Written where they were read, they are held once and not twice. Gradients would keep what is
    # carried for every unit, so in training states go from one stack to another.
    in_place = training is None and products.tuning().states_in_place
    given, carried = (None, stacked) if in_place else (stacked, None)
    take, put = jax.lax.dynamic_index_in_dim, jax.lax.dynamic_update_index_in_dim

    def run(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
        x, states = carry
        params, codebook, unit_state, number, keys = xs
        if states is not None:
            unit_state = jax.tree.map(lambda a: take(a, number, 0, keepdims=False), states)
        unit_wave = wave
        if keys is not None:
            unit_wave, keys = dropout.drop_sinusoids(keys, wave, config)
        unit = prepare_unit(params, codebook, unit_wave, number, config, layout=layout)
        whole = call._replace(x=unit_input(unit, x, call.x))
        out = _run_unit(unit, unit_state, whole, cut, keys, config, training)
        x, new = keep_rows(out.x), out.state
        if states is not None:
            states, new = jax.tree.map(lambda a, b: put(a, b, number, 0), states, new), None
        return (x, states), (new, out.statistics)

    xs = (model.params["units"], model.codebook, given, iota(config.num_units), keys)
    (x, carried), (passed, statistics) = jax.lax.scan(run, (call.x, carried), xs)
    stacked = passed if carried is None else carried
    states = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(config.num_units)]
    if statistics is not None:
        statistics = replace(statistics, commitment=statistics.commitment.sum())
    elif training is not None:  # full attention has no codebook to commit to
        zeros = jax.tree.map(jnp.zeros_like, model.codebook)
        statistics = Statistics(jnp.zeros((), training.weights.dtype), zeros)
    return _UnitsOutput(x, tuple(states), statistics)


def _run_unit(
    unit: PreparedUnit,
    unit_state: UnitState,
    call: Chunk,
    cut: Chunking,
    keys: UnitKeys | None,
    config: ModelConfig,
    training: Training | None,
) -> UnitOutput:
    """One unit on a whole call, chunk by chunk."""

    def run_chunk(unit_state: UnitState, chunk: Chunk) -> tuple[UnitState, tuple]:
        out = _run_chunk(unit, unit_state, chunk, keys, config)
        return out.state, (out.x, out.statistics)

    if training is not None and training.remat:  # kept is what is dear to make again
        keep = jax.checkpoint_policies.save_only_these_names(*attention.SAVED, "codes")
        run_chunk = jax.checkpoint(run_chunk, policy=keep)

    def run_micro_batch(unit_state: UnitState, micro_batch: Chunk) -> UnitOutput:
        if cut.chunks == 1:
            unit_state, (x, statistics) = run_chunk(unit_state, micro_batch)
            return UnitOutput(x, unit_state, statistics)
        assert isinstance(unit_state, AttentionState)  # only these are cut along time
        words = unit.attention.words
        carried = attention.window_keys(unit_state, words, config.compute_dtype)
        keeps_keys = unit_state.keys is not None
        unit_state = replace(unit_state, keys=carried)  # as codes, no gradient would pass
        chunks = rows.split_time(cut, micro_batch, config)
        unit_state, (x, statistics) = jax.lax.scan(run_chunk, unit_state, chunks)
        unit_state = unit_state if keeps_keys else replace(unit_state, keys=None)
        x = rows.join_time(x, call.x.shape[1])
        return UnitOutput(x, unit_state, _sum(statistics))

    if cut.micro_batches == 1:
        return run_micro_batch(unit_state, call)

    def run_rows(_: None, by_row: tuple, samples: SamplePositions | None):
        unit_state, micro_batch = by_row
        micro_batch = micro_batch._replace(samples=samples, block=call.block)
        return None, run_micro_batch(unit_state, micro_batch)

    by_row = (unit_state, call._replace(samples=None, block=None))
    _, out = rows.scan_rows(run_rows, cut.micro_batches, None, by_row, call.samples)
    x, unit_state = rows.join_rows((out.x, out.state))
    return UnitOutput(x, unit_state, _sum(out.statistics))


def _run_chunk(
    unit: PreparedUnit,
    unit_state: UnitState,
    chunk: Chunk,
    keys: UnitKeys | None,
    config: ModelConfig,
) -> UnitOutput:
    """One unit on what goes through it at once."""
    if not config.grad_through_cache:
        past = jax.lax.stop_gradient(unit_state)
        unit_state = replace(past, previous=unit_state.previous)  # no part of the cache

    def drop(added: Features, branch: int) -> Features:
        if keys is None:
            return added
        return dropout.drop_branch(keys, branch, added, chunk.rows, chunk.block, config)

    training = None
    if chunk.weights is not None:
        training = UnitTraining(chunk.weights, chunk.samples, drop)
    return apply_unit(unit, chunk.x, unit_state, chunk.timeline, config, training)


def _sum(statistics: Statistics | None) -> Statistics | None:
    """The statistics of all chunks, which are stacked along a first axis."""
    return jax.tree.map(lambda a: a.sum(0), statistics)
