"""A few tokens per row for one reading of the weights and of the state.

`read_few` makes the logits of all, and leaves the state as it is; `commit` makes the state after
the first of them, as many as turn out to be right. So drafted tokens are tried
(`ops/draft.py`), and short prompts are read, at little more than the cost of one token.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer_vq.config import ModelConfig
from transformer_vq.nn.decode import Decoder
from transformer_vq.nn.embedding import embed, to_logits
from transformer_vq.nn.model import State
from transformer_vq.nn.timeline import Timeline, make_timeline
from transformer_vq.nn.unit import (
    PendingUnit,
    PreparedUnit,
    UnitState,
    commit_unit,
    read_unit,
    unit_input,
)
from transformer_vq.types import Features, PerRow, Tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pending:
    """Tokens that were read, and that a state has not taken in."""

    # In wide: of what follows each token, [B, T, vocab]; or the last real one, [B, 1, vocab].
    logits: Float[jax.Array, "B seen vocab"]
    tokens: Tokens
    units: tuple[PendingUnit, ...]
    document_ids: Tokens | None


def read_few(
    decoder: Decoder,
    state: State,
    tokens: Tokens,
    lengths: PerRow | None = None,
    document_ids: Tokens | None = None,
    *,
    all_stay: bool = False,
) -> Pending:
    """Read T tokens per row, `[B, T]`, of which the first `lengths` are real; all by default.

    Their logits are those of T calls of `decode_step`; those at padding mean nothing. `all_stay`:
    all real ones are to be committed, so only the last ones' logits are made. Meant for 2 to 64
    tokens: scores of all of them are held at once.
    """
    config = decoder.config
    batch, length = tokens.shape
    if lengths is None:
        lengths = jnp.full(batch, length, jnp.int32)
    timeline, _, _ = make_timeline(config, state, lengths, length, document_ids)
    x = embedded = embed(decoder.params, tokens, timeline, config)
    units = []
    for unit, unit_state in zip(decoder.units, state.units, strict=True):
        x = unit_input(unit, x, embedded)
        x, pending = _read_unit(unit, x, unit_state, timeline, config)
        units.append(pending)
    if all_stay:
        x = jnp.take_along_axis(x, jnp.clip(lengths - 1, 0)[:, None, None], axis=1)
    return Pending(to_logits(decoder.params, x, config), tokens, tuple(units), document_ids)


def commit(config: ModelConfig, state: State, pending: Pending, accepted: PerRow) -> State:
    """The state after the first `accepted` of the tokens read, `[B]`, from 0 to all that are real:
    that of as many calls of `decode_step`. `state` is the one that they were read after.
    """
    length = pending.tokens.shape[1]
    # Changes nothing, but says that all was read before anything is written: XLA would copy the
    # tables where it cannot see that (a barrier does not tell it).
    known = (pending.logits.max((1, 2)) > 0).astype(jnp.int32)
    accepted = jnp.minimum(accepted, length + known)
    timeline, document_start, document_id = make_timeline(
        config, state, accepted, length, pending.document_ids
    )
    units = (
        _commit_unit(unit, new, timeline, config)
        for unit, new in zip(state.units, pending.units, strict=True)
    )
    last = jnp.clip(accepted - 1, 0, pending.logits.shape[1] - 1)[:, None, None]
    logits = jnp.take_along_axis(pending.logits, last, axis=1)[:, 0]
    return replace(
        state,
        position=state.position + accepted,
        document_start=document_start,
        document_id=document_id,
        logits=jnp.where(accepted[:, None] > 0, logits, state.logits),
        units=tuple(units),
    )


# Jitted, so that all units are traced and lowered once, as in `decode_step`.


@functools.partial(jax.jit, static_argnames="config")
def _read_unit(
    unit: PreparedUnit, x: Features, unit_state: UnitState, timeline: Timeline, config: ModelConfig
) -> tuple[Features, PendingUnit]:
    return read_unit(unit, x, unit_state, timeline, config)


@functools.partial(jax.jit, static_argnames="config")
def _commit_unit(
    unit_state: UnitState, new: PendingUnit, timeline: Timeline, config: ModelConfig
) -> UnitState:
    return commit_unit(unit_state, new, timeline, config)
