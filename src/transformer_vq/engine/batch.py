"""Requests in batches: prompts in, tokens out. The host's side of `ops/sample.py`."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer_vq import sharding
from transformer_vq.engine.request import Output, SamplingParams, Token, as_controls
from transformer_vq.errors import UserError
from transformer_vq.nn.attention import FullAttentionState
from transformer_vq.nn.decode import Decoder
from transformer_vq.nn.model import Model, State, init_state
from transformer_vq.ops.sample import (
    Rows,
    empty_state,
    generate_tokens,
    prefill,
    prepare_decoder,
)

PREFILL_SIZES = (16, 128, 1024)  # tokens a prefill program takes: prompts of any length use these
STEPS_PER_DISPATCH = 32  # tokens per call of the decoding program


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    state: State | None = None,
    *,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continue every prompt: a list of tokens each, without the prompt and without the stop.

    Args:
      model: from `init_model` or a checkpoint.
      prompts: tokens of each request; bytes are tokens of a byte model.
      params: of all requests, or one each. Requests with equal prompt, parameters and seed get
        equal tokens, whatever else is in the batch.
      state: what came before the prompts, one row each, or one row that all continue (a fork).
        With a state, a prompt may be empty. The state itself is left as it is.
      mesh: devices that share the requests (`sharding.data_mesh`), each with the whole model; one
        device by default. Its processes make the same call and get the outputs of all.

    Raises:
      ValueError: for an empty prompt without a state, a token outside of the vocabulary, numbers
        of prompts, parameters and states that differ, or tokens beyond a state's capacity.
    """
    session = Session(model, prompts, params, state, mesh=mesh)
    outputs: list[list[int]] = [[] for _ in prompts]
    for token in session:
        outputs[token.row].append(int(token))
    return outputs


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    state: State | None = None,
    *,
    mesh: Mesh | None = None,
) -> Iterator[Token]:
    """`generate`, yielding tokens as they come; each is an int that knows its `row`.

    A token that may be the start of a stop sequence comes once it is known not to be.
    """
    return iter(Session(model, prompts, params, state, mesh=mesh))


class Session:
    """A batch of requests being decoded. Iterate it for tokens; then `state` is what they left.

    `steps` is how many tokens are decoded between looks at what came; a row that ends at a stop
    sequence may have consumed up to so many tokens more. With a `mesh`, every device decodes its
    own rows, as it would alone; the host sees all of them.
    """

    def __init__(
        self, model, prompts, params=None, state=None, *, steps=STEPS_PER_DISPATCH, mesh=None
    ):
        self.prompts = [list(prompt) for prompt in prompts]
        self.params = _one_each(params, len(self.prompts))
        self._unread = list(self.prompts)
        self.steps, self.mesh = steps, mesh
        config = model.config
        _check_prompts(self.prompts, self.params, config.vocab_size, state)
        need = [
            len(prompt) + p.max_tokens for prompt, p in zip(self.prompts, self.params, strict=True)
        ]
        devices = 1 if mesh is None else mesh.size
        # Few compiled shapes serve all batches.
        batch = devices * _next_power_of_two(-(-len(self.prompts) // devices))
        if state is None:
            capacity = (
                max(256, _next_power_of_two(max(need))) if config.attention == "full" else None
            )
            if mesh is None:
                self._state = init_state(config, batch, capacity=capacity)
            else:
                self._state = empty_state(config, batch, capacity, mesh)
        else:
            self._state = _fork(state, len(self.prompts), batch, need, mesh)
        self.model, self._decoder = _decoder(model, self._state, mesh)

    @property
    def state(self) -> State:
        """State of the requests, one row each, after all that was yielded."""
        rows = len(self.prompts)
        fetch = sharding.fetch if self.mesh is not None else lambda x: x
        return jax.tree.map(lambda x: jnp.array(fetch(x)[:rows], copy=True), self._state)

    def read_prompts(self) -> None:
        """Consume the prompts, in pieces of a few fixed sizes.

        The pieces of a prompt depend on its length only, so that the same programs make the same
        state of it, to the bit, whatever else is in the batch.
        """
        for tokens, lengths in prompt_pieces(self._unread, self._state.position.shape[0]):
            tokens, lengths = self._place((tokens, lengths))
            self._state = prefill(self.model, self._state, tokens, lengths, mesh=self.mesh)

    def _place(self, tree: Any) -> Any:
        """Arrays of the host `[batch, ...]` where their rows are decoded."""
        return tree if self.mesh is None else sharding.spread(self.mesh, tree)

    def __iter__(self) -> Iterator[Token]:
        self.read_prompts()
        rows = self._rows()
        controls = as_controls(self.params, rows.active.shape[0], self.model.config.vocab_size)
        controls = self._place(controls)
        outputs = [Output(row, p) for row, p in enumerate(self.params)]
        with_logprobs = any(p.logprobs for p in self.params)
        active = np.ones(len(self.params), bool)
        while active.any():
            rows, new = generate_tokens(
                self._decoder,
                controls,
                rows,
                steps=self.steps,
                with_logprobs=with_logprobs,
                mesh=self.mesh,
            )
            self._state = rows.state
            new, active = sharding.fetch((new, rows.active))
            active = np.array(active)
            for step in range(new.tokens.shape[1]):
                for output in outputs:
                    if step < new.lengths[output.row]:
                        yield from output.push(new, step)
            for output in outputs:
                if output.ended:
                    active[output.row] = False
                elif not active[output.row]:
                    yield from output.flush()
            rows = dataclasses.replace(rows, active=self._place(jnp.asarray(active)))

    def _rows(self) -> Rows:
        batch, vocab = self._state.position.shape[0], self.model.config.vocab_size
        seen = np.zeros((batch, vocab), bool)
        remaining = np.zeros(batch, np.int32)
        for row, (prompt, p) in enumerate(zip(self.prompts, self.params, strict=True)):
            seen[row, prompt] = True
            remaining[row] = p.max_tokens
        host = dict(
            prompt=jnp.asarray(seen),
            counts=jnp.zeros((batch, vocab), jnp.int32),
            generated=jnp.zeros(batch, jnp.int32),
            remaining=jnp.asarray(remaining),
            active=jnp.asarray(remaining > 0),
        )
        return Rows(state=self._state, **self._place(host))


def _one_each(params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    params = list(params)
    if len(params) != count:
        raise UserError(f"there are {len(params)} params for {count} prompts: give one, or {count}")
    return params


def _check_prompts(
    prompts: list[list[int]],
    params: list[SamplingParams],
    vocab_size: int,
    state: State | None,
) -> None:
    if not prompts:
        raise UserError("there are no prompts: give at least one")
    used = None if state is None else np.asarray(state.position)
    for row, prompt in enumerate(prompts):
        if not prompt and (used is None or not used[row % len(used)]):
            raise UserError(
                f"prompt {row} is empty and there is no state to continue: give at least one token"
            )
    named: list[tuple[str, Sequence[int]]]
    named = [(f"prompt {row}", prompt) for row, prompt in enumerate(prompts)]
    for p in {id(p): p for p in params}.values():
        named += [("stop", s) for s in p.stop_sequences()]
        allowed = set(range(vocab_size) if p.allowed_tokens is None else p.allowed_tokens)
        allowed -= set(p.banned_tokens)
        if not allowed or (p.min_tokens and not allowed - set(p.stop_tokens())):
            raise UserError(
                "no token can be drawn: allow one that is not banned, nor a stop before min_tokens"
            )
        named += [("logit_bias", list(p.logit_bias)), ("banned_tokens", p.banned_tokens)]
        if p.allowed_tokens is not None:
            named.append(("allowed_tokens", p.allowed_tokens))
    for name, tokens in named:
        bad = next((t for t in tokens if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise UserError(
                f"{name} has the token {bad}, outside of the vocabulary: tokens go from 0 to "
                f"{vocab_size - 1}"
            )


def _fork(state: State, rows: int, batch: int, need: list[int], mesh: Mesh | None) -> State:
    """A copy of the state, one row per request (a single row serves all), padded to the batch."""
    given = state.position.shape[0]
    if given not in (1, rows):
        raise UserError(f"the state has {given} rows for {rows} prompts: 1 or {rows} are needed")
    cache = state.units[0]
    if isinstance(cache, FullAttentionState):
        end = int(np.max(np.asarray(state.position) + np.array(need)))
        if end > cache.capacity:
            raise UserError(
                f"prompt and output would reach {end} tokens, and this state of full attention "
                f"holds {cache.capacity}: make one with a larger capacity"
            )
    index = np.zeros(batch, np.int32)
    if given > 1:
        index[:rows] = np.arange(rows)
    if mesh is not None:
        return sharding.spread(mesh, state, index)
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0), state)


def prompt_pieces(left: list[list[int]], batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of prompts: tokens `[batch, size]` and how many of each row are real, `[batch]`.

    Takes them off the prompts in `left`. The sizes are few, whatever the lengths.
    """
    while any(left):
        sizes = [_piece(len(prompt)) for prompt in left]
        size = max(sizes)
        tokens, lengths = np.zeros((batch, size), np.int32), np.zeros(batch, np.int32)
        for row, prompt in enumerate(left):
            if sizes[row] == size:
                piece, left[row] = prompt[:size], prompt[size:]
                tokens[row, : len(piece)], lengths[row] = piece, len(piece)
        yield tokens, lengths


def _piece(length: int) -> int:
    """Size of the next piece of a prompt of which so many tokens are left; 0 for none."""
    if not length:
        return 0
    return next((size for size in PREFILL_SIZES if size >= length), PREFILL_SIZES[-1])


def _next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


_decoders: WeakKeyDictionary[Model, dict[Any, Decoder]] = WeakKeyDictionary()
_on_mesh: WeakKeyDictionary[Model, dict[Mesh, Model]] = WeakKeyDictionary()


def _decoder(model: Model, state: State, mesh: Mesh | None) -> tuple[Model, Decoder]:
    """The model where it is used, and prepared: made once and kept while the model lives."""
    if mesh is not None:
        copies = _on_mesh.setdefault(model, {})
        if mesh not in copies:
            copies[mesh] = jax.device_put(model, sharding.replicated(mesh))
        model = copies[mesh]
    cache = state.units[0]
    capacity = cache.capacity if isinstance(cache, FullAttentionState) else 0
    prepared = _decoders.setdefault(model, {})
    if capacity not in prepared:
        prepared[capacity] = prepare_decoder(model, state)
    return model, prepared[capacity]
