"""Prompts: checked, and read into a state.

A prompt is read in chunks of a few fixed sizes, which depend on its length only. So few programs
serve all prompts, and the same programs make the same state of a prompt, to the bit, whatever else
is in the batch.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer_vq import costs, sharding
from transformer_vq.config import ModelConfig
from transformer_vq.data.tokenizer import Tokens
from transformer_vq.engine import ready
from transformer_vq.engine.decoders import decoder_for, model_on
from transformer_vq.engine.slots import num_rows, take_rows
from transformer_vq.engine.tokens import prompt_lists
from transformer_vq.errors import UserError, require_kind
from transformer_vq.nn.model import Model, State, init_state
from transformer_vq.ops.decode import empty_state, prefill, prefill_few

PREFILL_SIZES = (16, 64, 256, 1024)  # tokens a prefill program takes: all prompts use these
FEW = PREFILL_SIZES[1]  # up to so many are read by `prefill_few`, which rewrites no state
MOST_SMALLER = 3  # chunks of the size below, instead of one that is not full
MIN_CAPACITY = 256  # tokens that a new state of full attention holds at least

Prompts = Sequence[Sequence[int] | str] | np.ndarray | jax.Array  # tokens of each

_take = jax.jit(take_rows)  # one program, and not one for each shape of an array


def read(model: Model, state: State | None, prompts: Prompts, *, mesh: Mesh | None = None) -> State:
    """The state after the prompts, one row each.

    Args:
      model: from `init_model` or a checkpoint.
      state: what came before the prompts, one row each, or one row that all continue (a fork). It
        stays as it is. None: nothing came before; with full attention the new state then holds the
        prompts and hardly more, so make one with `init_state` if more is to come.
      prompts: tokens of each row, as in `generate`. With a state, a prompt may be empty.
      mesh: as in `generate`.

    Raises `ValueError` as `generate` does.
    """
    check_model(model, state)
    tokens = check_prompts(prompts, model.config, state)
    need = [len(prompt) for prompt in tokens]
    begun = begin(model.config, state, need, batch_size(len(tokens), mesh), mesh)
    return first_rows(read_chunks(model_on(model, mesh), begun, tokens, mesh), len(tokens), mesh)


def check_model(model: Model, state: State | None) -> None:
    """Raise `UserError` for what is no model, or no state of such a model that can be read.

    A state does not say which model made it: only its shapes are compared. (A saved one does:
    `load_state`.)
    """
    require_kind("model", model, Model, "from init_model or of a run (load)")
    if state is None:
        return
    require_kind("state", state, State, "from init_state, extend or load_state")
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(state)):
        raise UserError(
            "the arrays of the state are deleted: it was given away (donated) to another call, so "
            "use the state that this call returned"
        )
    if not _fits(state, model.config):
        raise UserError("the state is of another model: make one with init_state(model.config, 1)")


def _fits(state: State, config: ModelConfig) -> bool:
    """Whether the state has the arrays of this configuration's states, in any dtype."""
    like = jax.eval_shape(
        lambda: jax.tree.leaves(init_state(config, num_rows(state), room=state.capacity))
    )
    return [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in like]


def check_prompts(
    prompts: Prompts, config: ModelConfig, state: State | None, what: str = "prompt"
) -> list[list[int]]:
    """The prompts as lists of tokens. Raises `UserError` for any that cannot be read.

    `what`: the word for a prompt.
    """
    given = prompt_lists(prompts, config.vocab_size, what)
    used = None if state is None else np.asarray(state.position)
    for row, prompt in enumerate(given):
        if not prompt and (used is None or not used[row % len(used)]):
            raise UserError(
                f"{what} {row} is empty and there is no state to continue: give at least one token"
            )
    return given


def batch_size(count: int, mesh: Mesh | None) -> int:
    """Rows of the arrays for so many requests: few compiled shapes serve all batches.

    Raises `UserError` for what is no mesh.
    """
    devices = 1 if mesh is None else sharding.as_mesh(mesh).size
    return devices * next_power_of_two(-(-count // devices))


def begin(
    config: ModelConfig, state: State | None, need: Sequence[int], batch: int, mesh: Mesh | None
) -> State:
    """Where requests begin: a new state `[batch, ...]`, or a copy of one, forked and padded.

    `need`: how many tokens each request is to consume.
    """
    if state is not None:
        return _fork(state, need, batch, mesh)
    room = None
    if config.default_capacity is not None:
        room = max(MIN_CAPACITY, next_power_of_two(max(need)))  # few shapes to compile for
        _check_memory(config, batch, room, mesh)
    return ready.call(empty_state, config=config, batch=batch, room=room, mesh=mesh)


def _check_memory(config: ModelConfig, batch: int, capacity: int, mesh: Mesh | None) -> None:
    """Raise `UserError` if a new state is larger than all memory: full attention keeps all tokens.

    "Until it stops" is a large `max_tokens`, which costs nothing with VQ.
    """
    devices = [jax.local_devices()[0]] if mesh is None else mesh.local_devices
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    memory = sum(limits) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = batch * costs.state_bytes(config, capacity)
    if size > memory:
        raise UserError(
            f"full attention keeps every token: a state for {capacity:,} of them, {batch} rows, "
            f"takes {size / 1e9:,.1f} GB, and there are {memory / 1e9:,.1f} GB of memory. Ask for "
            f"fewer tokens (max_tokens)"
        )


def check_start(state: State, need: Sequence[int]) -> None:
    """Raise `UserError` if so many requests, which are to consume so many tokens, cannot begin in
    a state: one row each, or one that serves all."""
    given, rows = num_rows(state), len(need)
    if given not in (1, rows):
        prompts, wanted = (
            ("1 prompt", "1 is") if rows == 1 else (f"{rows} prompts", f"1 or {rows} are")
        )
        raise UserError(f"the state has {given} rows for {prompts}: {wanted} needed")
    if state.capacity is not None:
        end = int(np.max(np.asarray(state.position, np.int64) + np.array(need)))
        if end > state.capacity:
            raise UserError(
                f"prompt and output would reach {end} tokens, and this state of full attention "
                f"holds {state.capacity}: make one with a larger capacity"
            )


def _fork(state: State, need: Sequence[int], batch: int, mesh: Mesh | None) -> State:
    """A copy of the state, one row per request (a single row serves all), padded to the batch."""
    check_start(state, need)
    index = np.zeros(batch, np.int32)
    if num_rows(state) > 1:
        index[: len(need)] = np.arange(len(need))
    return ready.call(_take, state, index) if mesh is None else sharding.spread(mesh, state, index)


def read_chunks(
    model: Model,
    state: State,
    prompts: Sequence[Sequence[int]],
    mesh: Mesh | None,
    ahead: Mapping[Any, Any] = MappingProxyType({}),
) -> State:
    """The state `[batch, ...]` after the prompts of its first rows. The given one is donated.

    `ahead`: programs that are compiled already, `("read", size)`.
    """
    for tokens, lengths in prompt_chunks(prompts, num_rows(state)):
        if mesh is not None:
            tokens, lengths = sharding.spread(mesh, (tokens, lengths))
        size = tokens.shape[1]
        reader = decoder_for(model, state) if size <= FEW else model
        usual = functools.partial(ready.call, prefill_few if size <= FEW else prefill, mesh=mesh)
        state = ahead.get(("read", size), usual)(reader, state, tokens, lengths)
    return state


def first_rows(state: State, rows: int, mesh: Mesh | None) -> State:
    """A copy of the rows that are no padding; from a mesh, they are gathered."""
    if mesh is None:
        return ready.call(_take, state, np.arange(rows, dtype=np.int32))
    leaves, tree = jax.tree.flatten(state)
    leaves = sharding.fetch(leaves)  # arrays of the host, of which no State is made
    return tree.unflatten([jnp.array(x[:rows], copy=True) for x in leaves])


def prompt_chunks(prompts: Sequence[Tokens], batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of prompts: tokens `[batch, size]` and how many of each row are real, `[batch]`.

    The rows whose next chunk is the largest go first, the others wait.
    """
    left = list(prompts)
    while any(map(len, left)):
        sizes = [chunk_size(len(prompt)) for prompt in left]
        size = max(sizes)
        tokens, lengths = np.zeros((batch, size), np.int32), np.zeros(batch, np.int32)
        for row, prompt in enumerate(left):
            if sizes[row] == size:
                chunk, left[row] = prompt[:size], prompt[size:]
                tokens[row, : len(chunk)], lengths[row] = chunk, len(chunk)
        yield tokens, lengths


def chunk_size(length: int, largest: int = PREFILL_SIZES[-1]) -> int:
    """Size of the next chunk of a prompt of which so many tokens are left; 0 for none.

    Sizes grow by four, and a chunk costs about what four of the size below do, full or not.
    """
    if not length:
        return 0
    below = [size for size in PREFILL_SIZES if size < min(length, largest)]
    if below and length <= MOST_SMALLER * below[-1]:
        return below[-1]
    return min(PREFILL_SIZES[len(below)], largest)


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
