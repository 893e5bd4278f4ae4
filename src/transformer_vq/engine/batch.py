"""Requests in batches: prompts in, tokens out."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer_vq import sharding
from transformer_vq.engine.controls import controls_batch
from transformer_vq.engine.decoders import decoder_for, model_on
from transformer_vq.engine.draft import Drafts, check_draft
from transformer_vq.engine.output import Output
from transformer_vq.engine.pace import SIZES
from transformer_vq.engine.prefill import (
    Prompts,
    batch_size,
    begin,
    check_model,
    check_prompts,
    first_rows,
    read_chunks,
)
from transformer_vq.engine.request import SamplingParams, Token, check_params
from transformer_vq.engine.slots import num_rows
from transformer_vq.errors import UserError, is_listed, shown
from transformer_vq.fields import MOST
from transformer_vq.nn.model import Model, State
from transformer_vq.ops.decode import Controls, Generated, Rows, generate_tokens

STEPS_PER_DISPATCH = 32  # tokens per call of the decoding program

_PARAMS = "give SamplingParams, such as SamplingParams(max_tokens=20), or a list with one each"


def generate(
    model: Model,
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    state: State | None = None,
    *,
    mesh: Mesh | None = None,
    draft: bool | Model = False,
) -> list[list[int]]:
    """Continue every prompt: a list of tokens each, without the prompt and without the stop.

    Args:
      model: from `init_model` or a checkpoint.
      prompts: tokens of each request: a list of lists or arrays, or an array of rows. For a model
        of bytes (256 tokens) bytes are tokens, and text is its UTF-8.
      params: of all requests, or one each. Requests with equal prompt, parameters and seed get
        equal tokens, whatever else is in the batch.
      state: what came before the prompts, one row each, or one row that all continue (a fork).
        With a state, a prompt may be empty. The state itself is left as it is.
      mesh: devices that share the requests (`sharding.data_mesh`), each with the whole model; one
        device by default. Its processes make the same call and get the outputs of all.
      draft: guess tokens ahead and try them together, which gives the same tokens faster: True
        looks guesses up in the text itself, a small `Model` of the same vocabulary makes its own.
        In float32 rounding decides a draw otherwise once in a long while. On one device.

    Raises:
      ValueError: for an empty prompt without a state, a token outside of the vocabulary, numbers
        of prompts, parameters and states that differ, tokens beyond a state's capacity, a state
        whose shapes are of another model, and whatever else cannot be used.
    """
    session = Session(model, prompts, params, state, mesh=mesh, draft=draft)
    outputs: list[list[int]] = [[] for _ in session.prompts]
    for token in session:
        outputs[token.row].append(int(token))
    return outputs


def stream(
    model: Model,
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    state: State | None = None,
    *,
    mesh: Mesh | None = None,
    draft: bool | Model = False,
) -> Iterator[Token]:
    """`generate`, yielding tokens as they come; each is an int that knows its `row`.

    A token that may be the start of a stop sequence comes once it is known not to be.
    """
    session = Session(model, prompts, params, state, mesh=mesh, draft=draft)
    return (token for token in session)


class Session:
    """A batch of requests being decoded: an iterator of their tokens, as `stream` yields them.

    As of a file, there is one iteration: a second loop goes on where the first one stopped, and
    finds nothing after its end. `state` is what the requests have left so far. A row that ends at a
    stop sequence may have consumed up to `steps` tokens more than it yielded.

    Args:
      model, prompts, params, state, mesh, draft: as in `generate`.
      steps: tokens of each row that are decoded in one call of the device.

    Raises `ValueError` as `generate` does.
    """

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        state: State | None = None,
        *,
        steps: int = STEPS_PER_DISPATCH,
        mesh: Mesh | None = None,
        draft: bool | Model = False,
    ):
        check_model(model, state)
        check_draft(draft, model.config)
        if draft and mesh is not None:
            raise UserError("draft is for one device, and there is a mesh: give one of them")
        self.prompts = check_prompts(prompts, model.config, state)
        self.params = _one_each(params, len(self.prompts), model.config.vocab_size)
        if not isinstance(steps, int) or not 1 <= steps <= MOST:
            raise UserError(f"steps is {shown(steps)}: it must be a whole number from 1 on")
        self.steps, self.mesh = steps, mesh
        need = [
            len(prompt) + p.max_tokens for prompt, p in zip(self.prompts, self.params, strict=True)
        ]
        batch = batch_size(len(need), mesh)
        self._state = begin(model.config, state, need, batch, mesh)
        self._model = model_on(model, mesh)
        at_once = batch * SIZES[-1] if draft else None  # drafts are read together
        self._decoder = decoder_for(self._model, self._state, at_once)
        self._drafts: Drafts | None = None
        if draft:
            guide = draft if isinstance(draft, Model) else None
            self._drafts = Drafts(guide, self.prompts, need, batch)
        self._read = False  # the prompts
        self._started: tuple[Controls, Rows] | None = None
        self._outputs = [Output(p) for p in self.params]
        self._active = np.ones(len(self.params), bool)
        self._ready: deque[Token] = deque()

    @property
    def state(self) -> State:
        """State of the requests, one row each, after all that was decoded. A copy."""
        return first_rows(self._state, len(self.prompts), self.mesh)

    @property
    def drafted(self) -> tuple[int, int]:
        """How many tokens were guessed so far, and how many of them were right."""
        return (0, 0) if self._drafts is None else (self._drafts.guessed, self._drafts.right)

    def read_prompts(self) -> None:
        """Consume the prompts now, and not when the first token is asked for."""
        if not self._read:
            self._read = True
            self._state = read_chunks(self._model, self._state, self.prompts, self.mesh)

    def __iter__(self) -> "Session":
        return self

    def __next__(self) -> Token:
        while not self._ready:
            if not self._active.any():
                raise StopIteration
            self._ready += self._decode()
        return self._ready.popleft()

    def _decode(self) -> list[Token]:
        """One call of the device: up to `steps` tokens of every active row, step by step."""
        if self._started is None:
            self.read_prompts()
            self._started = self._controls(), self._rows()
        controls, rows = self._started
        with_logprobs = any(p.logprobs for p in self.params)
        if self._drafts is not None:
            rows, new, active = self._drafts.dispatch(
                self._decoder, controls, rows, self._active, self.steps, with_logprobs
            )
        else:
            rows, new = generate_tokens(
                self._decoder,
                controls,
                rows,
                steps=self.steps,
                with_logprobs=with_logprobs,
                mesh=self.mesh,
            )
            new, active = sharding.fetch((new, rows.active))
        self._state = rows.state
        tokens: list[Token] = []
        for step in range(new.tokens.shape[1]):
            for row, (output, p) in enumerate(zip(self._outputs, self.params, strict=True)):
                if step < new.lengths[row]:
                    tokens += output.push(_token(new, row, step, p.logprobs))
        active = np.array(active)
        for row, output in enumerate(self._outputs):
            if output.ended:
                active[row] = False
            elif not active[row]:
                tokens += output.flush()
        self._active = active
        rows = dataclasses.replace(rows, active=self._place(jnp.asarray(active)))
        self._started = controls, rows
        return tokens

    def _place(self, tree: Any) -> Any:
        """Arrays of the host `[batch, ...]` where their rows are decoded."""
        return tree if self.mesh is None else sharding.spread(self.mesh, tree)

    def _controls(self) -> Controls:
        vocab_size = self._model.config.vocab_size
        return self._place(controls_batch(self.params, num_rows(self._state), vocab_size))

    def _rows(self) -> Rows:
        batch, vocab = num_rows(self._state), self._model.config.vocab_size
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


def _token(new: Generated, row: int, step: int, with_logprobs: bool) -> Token:
    """A token of one dispatch (arrays of the host), as it is passed on."""
    token = int(new.tokens[row, step])
    if not with_logprobs:
        return Token(token, row)
    best = zip(new.top_tokens[row, step], new.top_logprobs[row, step], strict=True)
    top_logprobs = {int(t): float(p) for t, p in best}
    return Token(token, row, float(new.logprobs[row, step]), top_logprobs)


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, vocab_size: int
) -> list[SamplingParams]:
    """The parameters of every request, checked for this vocabulary."""
    if params is None or isinstance(params, SamplingParams):
        given = [params or SamplingParams()] * count
    elif isinstance(params, str | bytes | Mapping) or not is_listed(params):
        raise UserError(f"params is {shown(params)}: {_PARAMS}")
    else:
        given = list(params)
    for p in given:
        if not isinstance(p, SamplingParams):
            raise UserError(f"params has {shown(p)}: {_PARAMS}")
    if len(given) != count:
        raise UserError(f"there are {len(given)} params for {count} prompts: give one, or {count}")
    for p in {id(p): p for p in given}.values():
        check_params(p, vocab_size)
    return given
