"""`extend`: continue sequences by some tokens. The one function that everything is built on."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from transformer_vq.config import ModelConfig
from transformer_vq.errors import UserError, require_kind, shown
from transformer_vq.nn.attention import AttentionState, FullAttentionState
from transformer_vq.nn.decode import decode_step, prepare
from transformer_vq.nn.embedding import to_logits
from transformer_vq.nn.forward import forward
from transformer_vq.nn.model import Model, State
from transformer_vq.types import Logits


def extend(
    model: Model,
    state: State,
    tokens: ArrayLike | Sequence[Any],
    *,
    lengths: ArrayLike | Sequence[Any] | None = None,
    document_ids: ArrayLike | Sequence[Any] | None = None,
) -> tuple[Logits, State]:
    """Continue B sequences by T tokens each: logits of what follows every token, and the new state.

    Any split of a sequence into calls means the same: a prompt at once, in chunks, or one token at
    a time give the same logits and the same final state, up to float rounding.

    Args:
      model: from `init_model` or a checkpoint.
      state: from `init_state`, or an earlier call.
      tokens: int32 `[B, T]`, any T of at least 1: of JAX or numpy, or a list of lists.
      lengths: int32 `[B]`, how many tokens of each row are real; all of them by default. The rest
        is padding at the end of the row: it changes nothing, and its logits mean nothing.
      document_ids: int32 `[B, T]`, growing along a row; used if `config.reset_at_document`. Without
        it the tokens belong to the document that the state is in.

    Returns:
      `(logits, state)`: float32 `[B, T, vocab_size]`, where `logits[:, t]` predicts token t + 1.

    Raises:
      ValueError: if shapes do not fit. Where values are known (outside of `jit`) also for a token
        outside of the vocabulary, a length outside of 0..T and, with `attention = "full"`, tokens
        beyond the capacity of the state.
    """
    require_kind("model", model, Model, "from init_model or of a run (load)")
    require_kind("state", state, State, "from init_state, extend or load_state")
    given = [_as_array("tokens", tokens)]
    for name, array in (("lengths", lengths), ("document_ids", document_ids)):
        given.append(None if array is None else _as_array(name, array))
    check_tokens(model.config, state, *given)
    return _extend(model, state, *given)


def _as_array(name: str, x: Any) -> Any:
    """x as it is if it is a JAX array; numpy for the rest, of which no bit may get lost."""
    try:
        return x if isinstance(x, jax.Array) else np.asarray(x)
    except (ValueError, TypeError, OverflowError):  # rows of unequal lengths, say
        raise UserError(
            f"{name} is {shown(x)}: it must be an array of whole numbers; rows that are shorter "
            f"are padded, and lengths says so"
        ) from None


@jax.jit  # people call `extend` as it is, and its loops must not be compiled at every call
def _extend(model, state, tokens, lengths, document_ids):
    tokens = tokens.astype(jnp.int32)
    lengths = None if lengths is None else lengths.astype(jnp.int32)
    document_ids = None if document_ids is None else document_ids.astype(jnp.int32)
    if tokens.shape[1] == 1:
        active = None if lengths is None else lengths > 0
        documents = None if document_ids is None else document_ids[:, 0]
        state = decode_step(prepare(model, state), state, tokens[:, 0], active, documents)
        return state.logits[:, None], state
    out = forward(model, state, tokens, lengths=lengths, document_ids=document_ids)
    return to_logits(model.params, out.features, model.config), out.state


def _fits(config: ModelConfig, state: State) -> bool:
    """Whether the state has the structure and shapes of this configuration's states."""
    lead = (state.position.shape[0], config.num_kv_heads)
    ring, size = config.ring_len, config.codebook_size

    def unit_fits(unit: AttentionState | FullAttentionState) -> bool:
        if isinstance(unit, FullAttentionState):
            shapes = ((*lead, unit.capacity, config.d_k), (*lead, unit.capacity, config.d_v))
            full = config.attention == "full"
            return full and (unit.keys.shape, unit.values.shape) == shapes
        shapes = ((*lead, ring), (*lead, size), (*lead, config.table_rows, config.d_v))
        found = (unit.codes.shape, unit.counts.shape, unit.values.shape)
        fades = unit.ages is not None
        return config.attention == "vq" and found == shapes and fades == config.fades

    return (
        state.logits.shape[1] == config.vocab_size
        and len(state.units) == config.num_units
        and all(map(unit_fits, state.units))
        and all((unit.previous is not None) == config.key_shift for unit in state.units)
    )


def check_tokens(
    config: ModelConfig, state: State, tokens: Any, lengths: Any, document_ids: Any
) -> None:
    """Raise `ValueError` for arguments of `extend` that do not fit, as far as they are known."""
    batch = state.position.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
        raise UserError(
            f"tokens have shape {tokens.shape}: the state has {batch} rows, so [{batch}, T] is "
            f"needed, with T at least 1"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens are {tokens.dtype}: they must be whole numbers")
    for name, array, shape in (
        ("lengths", lengths, (batch,)),
        ("document_ids", document_ids, tokens.shape),
    ):
        if array is not None and jnp.shape(array) != shape:
            raise UserError(f"{name} have shape {jnp.shape(array)}: it must be {shape}")
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise UserError(f"{name} are {array.dtype}: they must be whole numbers")
    if not _fits(config, state):
        raise UserError(
            "the state is of another model: make one with init_state(model.config, batch_size)"
        )

    def known(array: Any) -> np.ndarray | None:
        return None if isinstance(array, Tracer) else np.asarray(array)

    length = tokens.shape[1]
    values = known(tokens)
    if values is not None and (values.min() < 0 or values.max() >= config.vocab_size):
        bad = values[(values < 0) | (values >= config.vocab_size)][0]
        raise UserError(
            f"token {bad} is outside of the vocabulary: tokens go from 0 to {config.vocab_size - 1}"
        )
    counts = known(length if lengths is None else lengths)
    if counts is not None and (counts.min() < 0 or counts.max() > length):
        bad = counts[(counts < 0) | (counts > length)][0]
        raise UserError(
            f"a length is {bad}: it must be from 0 to {length}, the number of tokens in a row"
        )
    ids = None if document_ids is None else known(document_ids)
    if ids is not None and counts is not None:
        real = np.arange(1, length) < np.reshape(counts, (-1, 1))  # the rest is padding
        falls = ((ids[:, 1:] < ids[:, :-1]) & real).any(axis=1)
        if falls.any():
            raise UserError(
                f"document_ids fall in row {int(np.argmax(falls))}: along a row they stay or grow"
            )
    capacity = state.capacity
    if capacity is not None:
        used = known(state.position)
        end = 0 if counts is None else int(np.max(counts + (0 if used is None else used)))
        if end > capacity:
            raise UserError(
                f"the sequence would reach {end} tokens, and this state of full attention holds "
                f"{capacity}: give init_state a larger capacity"
            )
