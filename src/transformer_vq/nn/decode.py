"""Decoding: one token per row and step, from constants that are made once per model.

What does not depend on the tokens (position tables, codewords, fused projections, casts) is
computed by `prepare`; a step then only gathers, multiplies and scatters. Units are unrolled and
their arrays are separate: slices of stacked arrays would be copied at every step.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import products
from transformer_vq.nn.embedding import embed, to_logits
from transformer_vq.nn.model import Model, State
from transformer_vq.nn.products import Narrow, Weights
from transformer_vq.nn.timeline import Timeline, make_timeline
from transformer_vq.nn.unit import (
    PreparedUnit,
    UnitState,
    apply_unit,
    distance_wave,
    prepare_unit,
    unit_input,
)
from transformer_vq.types import Features, Params, PerRow, PerRowFlag


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "units"], meta_fields=["config"]
)
@dataclass(frozen=True)
class Decoder:
    """A model prepared for decoding."""

    params: Params  # the arrays outside of units; the output projection for few rows
    units: tuple[PreparedUnit, ...]
    config: ModelConfig


def kept_weights(model: Model, rows: int) -> Weights:
    """How a decoder keeps the matrices of a model for steps of so many rows: narrow where reading
    them is the cost, and not where products of more rows would widen them at every step."""
    return model.weights if rows <= products.tuning().narrow_rows else "as-saved"


def prepare(model: Model, state: State, weights: Weights | None = None) -> Decoder:
    """The decoder of a model, for states like this one (only its shapes matter).

    `weights`: how it keeps matrices; by default what is fast for the rows of the state.
    """
    wave = distance_wave(model.config, state.capacity)
    weights = weights or kept_weights(model, state.position.shape[0])

    def unit(i: int) -> PreparedUnit:
        params, codebook = jax.tree.map(lambda a: a[i], (model.params["units"], model.codebook))
        return prepare_unit(
            params, codebook, wave, i, model.config, layout="decode", weights=weights
        )

    params = {name: array for name, array in model.params.items() if name != "units"}
    tied = model.config.tie_embeddings
    w_out = products.for_few_rows(params["embedding"].T if tied else params["w_out"], weights)
    if not tied or isinstance(w_out, Narrow):  # else the embedding serves as it is
        params["w_out"] = w_out
    return Decoder(
        params=params,
        units=tuple(unit(i) for i in range(model.config.num_units)),
        config=model.config,
    )


def decode_step(
    decoder: Decoder,
    state: State,
    tokens: PerRow,
    active: PerRowFlag | None = None,
    document_ids: PerRow | None = None,
) -> State:
    """Consume one token per row; the prediction of the next is in `state.logits`.

    Rows that are not `active` keep their state, to the bit.
    """
    config = decoder.config
    if active is None:
        active = jnp.ones(tokens.shape, bool)
    documents = None if document_ids is None else document_ids[:, None]
    timeline, document_start, document_id = make_timeline(
        config, state, active.astype(jnp.int32), 1, documents
    )
    x = embedded = embed(decoder.params, tokens[:, None], timeline, config)
    units = []
    for unit, unit_state in zip(decoder.units, state.units, strict=True):
        x = unit_input(unit, x, embedded)
        x, unit_state = _step_unit(unit, x, unit_state, timeline, config)
        units.append(unit_state)
    logits = to_logits(decoder.params, x[:, 0], config)
    return replace(
        state,
        position=state.position + active.astype(jnp.int32),
        document_start=document_start,
        document_id=document_id,
        logits=jnp.where(active[:, None], logits, state.logits),
        units=tuple(units),
    )


@functools.partial(jax.jit, static_argnames="config")
def _step_unit(
    unit: PreparedUnit, x: Features, unit_state: UnitState, timeline: Timeline, config: ModelConfig
) -> tuple[Features, UnitState]:
    """One unit. Jitted, so that all units are traced and lowered once; XLA inlines the calls."""
    out = apply_unit(unit, x, unit_state, timeline, config)
    return out.x, out.state
