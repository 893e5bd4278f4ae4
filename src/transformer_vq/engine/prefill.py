"""Prompts: checked, and read into a state.

A prompt is read in chunks of a few fixed sizes, which depend on its length only. So few programs
serve all prompts, and the same programs make the same state of a prompt, to the bit, whatever else
is in the batch.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer_vq import sharding
from transformer_vq.config import ModelConfig
from transformer_vq.engine.decoders import model_on
from transformer_vq.engine.slots import num_rows, take_rows
from transformer_vq.errors import UserError
from transformer_vq.nn.attention import FullAttentionState
from transformer_vq.nn.model import Model, State, init_state
from transformer_vq.ops.decode import empty_state, prefill

PREFILL_SIZES = (16, 128, 1024)  # tokens a prefill program takes: prompts of any length use these
MIN_CAPACITY = 256  # tokens that a new state of full attention holds at least


def read(
    model: Model, state: State | None, prompts: Sequence[Sequence[int]], *, mesh: Mesh | None = None
) -> State:
    """The state after the prompts, one row each.

    Args:
      model: from `init_model` or a checkpoint.
      state: what came before the prompts, one row each, or one row that all continue (a fork). It
        stays as it is. None: nothing came before; with full attention the new state then holds the
        prompts and hardly more, so make one with `init_state` if more is to come.
      prompts: tokens of each row. With a state, a prompt may be empty.
      mesh: as in `generate`.

    Raises `ValueError` as `generate` does.
    """
    tokens = check_prompts(prompts, model.config.vocab_size, state)
    need = [len(prompt) for prompt in tokens]
    begun = begin(model.config, state, need, batch_size(len(tokens), mesh), mesh)
    return first_rows(read_chunks(model_on(model, mesh), begun, tokens, mesh), len(tokens), mesh)


def check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, state: State | None
) -> list[list[int]]:
    """The prompts as lists of tokens. Raises `ValueError` for any that cannot be read."""
    given = [list(prompt) for prompt in prompts]
    if not given:
        raise UserError("there are no prompts: give at least one")
    used = None if state is None else np.asarray(state.position)
    for row, prompt in enumerate(given):
        if not prompt and (used is None or not used[row % len(used)]):
            raise UserError(
                f"prompt {row} is empty and there is no state to continue: give at least one token"
            )
        check_vocabulary(f"prompt {row}", prompt, vocab_size)
    return given


def check_vocabulary(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raise `ValueError`, with the name of the list, for a token that the model does not have."""
    bad = next((t for t in tokens if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise UserError(
            f"{name} has the token {bad}, outside of the vocabulary: tokens go from 0 to "
            f"{vocab_size - 1}"
        )


def batch_size(count: int, mesh: Mesh | None) -> int:
    """Rows of the arrays for so many requests: few compiled shapes serve all batches."""
    devices = 1 if mesh is None else mesh.size
    return devices * _next_power_of_two(-(-count // devices))


def begin(
    config: ModelConfig, state: State | None, need: Sequence[int], batch: int, mesh: Mesh | None
) -> State:
    """Where requests begin: a new state `[batch, ...]`, or a copy of one, forked and padded.

    `need`: how many tokens each request is to consume.
    """
    if state is not None:
        return _fork(state, need, batch, mesh)
    capacity = None
    if config.attention == "full":
        capacity = max(MIN_CAPACITY, _next_power_of_two(max(need)))
    if mesh is None:
        return init_state(config, batch, capacity=capacity)
    return empty_state(config, batch, capacity, mesh)


def _fork(state: State, need: Sequence[int], batch: int, mesh: Mesh | None) -> State:
    """A copy of the state, one row per request (a single row serves all), padded to the batch."""
    given, rows = num_rows(state), len(need)
    if given not in (1, rows):
        raise UserError(f"the state has {given} rows for {rows} prompts: 1 or {rows} are needed")
    unit = state.units[0]
    if isinstance(unit, FullAttentionState):
        end = int(np.max(np.asarray(state.position) + np.array(need)))
        if end > unit.capacity:
            raise UserError(
                f"prompt and output would reach {end} tokens, and this state of full attention "
                f"holds {unit.capacity}: make one with a larger capacity"
            )
    index = np.zeros(batch, np.int32)
    if given > 1:
        index[:rows] = np.arange(rows)
    return take_rows(state, index) if mesh is None else sharding.spread(mesh, state, index)


def read_chunks(
    model: Model, state: State, prompts: Sequence[Sequence[int]], mesh: Mesh | None
) -> State:
    """The state `[batch, ...]` after the prompts of its first rows. The given one is donated."""
    for tokens, lengths in prompt_chunks(prompts, num_rows(state)):
        if mesh is not None:
            tokens, lengths = sharding.spread(mesh, (tokens, lengths))
        state = prefill(model, state, tokens, lengths, mesh=mesh)
    return state


def first_rows(state: State, rows: int, mesh: Mesh | None) -> State:
    """A copy of the rows that are no padding; from a mesh, they are gathered."""
    if mesh is not None:
        state = sharding.fetch(state)
    return jax.tree.map(lambda x: jnp.array(x[:rows], copy=True), state)


def prompt_chunks(
    prompts: Sequence[Sequence[int]], batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of prompts: tokens `[batch, size]` and how many of each row are real, `[batch]`.

    The rows whose next chunk is the largest go first, the others wait.
    """
    left = list(prompts)
    while any(map(len, left)):
        sizes = [_chunk_size(len(prompt)) for prompt in left]
        size = max(sizes)
        tokens, lengths = np.zeros((batch, size), np.int32), np.zeros(batch, np.int32)
        for row, prompt in enumerate(left):
            if sizes[row] == size:
                chunk, left[row] = prompt[:size], prompt[size:]
                tokens[row, : len(chunk)], lengths[row] = chunk, len(chunk)
        yield tokens, lengths


def _chunk_size(length: int) -> int:
    """Size of the next chunk of a prompt of which so many tokens are left; 0 for none."""
    if not length:
        return 0
    return next((size for size in PREFILL_SIZES if size >= length), PREFILL_SIZES[-1])


def _next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
