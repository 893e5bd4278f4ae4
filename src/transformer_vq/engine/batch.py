"""Requests in batches: prompts in, tokens out."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from jax.sharding import Mesh

from transformer_vq.engine.decoders import model_on
from transformer_vq.engine.device import Slots, seen_tokens
from transformer_vq.engine.draft import Drafts, check_draft
from transformer_vq.engine.prefill import (
    Prompts,
    batch_size,
    begin,
    check_model,
    check_prompts,
    check_start,
    first_rows,
    next_power_of_two,
    read_chunks,
)
from transformer_vq.engine.request import SamplingParams, Token, check_params
from transformer_vq.engine.running import MOST_STEPS, NO_NUMBERS, Answer, Running
from transformer_vq.engine.slots import num_rows, take_rows
from transformer_vq.errors import UserError, is_listed, shown
from transformer_vq.fields import require_count
from transformer_vq.nn.model import Model, State

STEPS_PER_DISPATCH = 32  # tokens per call of the decoding program

_PARAMS = "give SamplingParams, such as SamplingParams(max_tokens=20), or a list with one each"


class NoProbabilities(UserError):
    """A model gives not-a-number (NaN): say, its training has diverged."""


def generate(
    model: Model,
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    state: State | None = None,
    *,
    mesh: Mesh | None = None,
    draft: bool | Model = False,
    slots: int | None = None,
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
      slots: how many requests are decoded together, rounded up to a power of two on each device;
        the next one joins where one has ended. All by default.

    Raises:
      ValueError: for an empty prompt without a state, a token outside of the vocabulary, numbers
        of prompts, parameters and states that differ, tokens beyond a state's capacity, a state
        whose shapes are of another model, and whatever else cannot be used. Also at the end, if the
        model came to give no probabilities but not-a-number (NaN) for a request, which ends there.
    """
    session = Session(model, prompts, params, state, mesh=mesh, draft=draft, slots=slots)
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
    slots: int | None = None,
) -> Iterator[Token]:
    """`generate`, yielding tokens as they come; each is an int that knows its `row`.

    A token that may be the start of a stop sequence comes once it is known not to be.
    """
    session = Session(model, prompts, params, state, mesh=mesh, draft=draft, slots=slots)
    return (token for token in session)


class Session:
    """A batch of requests being decoded: an iterator of their tokens, as `stream` yields them.

    As of a file, there is one iteration: a second loop goes on where the first one stopped, and
    finds nothing after its end. `state` is what the requests have left so far. A row that ends at a
    stop sequence may have consumed more tokens than it yielded: up to `steps`, and the guesses of a
    draft.

    Args:
      model, prompts, params, state, mesh, draft, slots: as in `generate`.
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
        slots: int | None = None,
    ):
        check_model(model, state)
        check_draft(draft, model.config)
        if draft and mesh is not None:
            raise UserError("draft is for one device, and there is a mesh: give one of them")
        self.prompts = check_prompts(prompts, model.config, state)
        self.params = _one_each(params, len(self.prompts), model.config.vocab_size)
        require_count("steps", steps)
        require_count("slots", 1 if slots is None else slots)
        self.steps, self.mesh, self._config = int(steps), mesh, model.config
        count = len(self.prompts)
        batch = batch_size(min(count, int(slots or count)), mesh)
        joining = batch < count
        need = [
            len(prompt) + p.max_tokens for prompt, p in zip(self.prompts, self.params, strict=True)
        ]
        if joining and state is not None:
            check_start(state, need)
        self._given, self._need, self._joining = state, need, joining
        now = self._begin(range(min(batch, count)), batch)
        self._model = model_on(model, mesh)
        most_steps = max(MOST_STEPS, next_power_of_two(steps))
        drafts = Drafts(draft, batch, max(need), most_steps) if draft else None
        here = ([], []) if joining else (self.params, self.prompts)
        self._slots = Slots(
            self._model, now, *here, most_steps=most_steps, mesh=mesh, drafts=drafts
        )
        self._running = Running(self._slots)
        self._unread = here[1]  # prompts of the first rows
        self._waiting = deque(range(count) if joining else ())  # requests
        for row, p in enumerate(here[0]):
            self._running.answers[row] = Answer(p, row)
            if drafts is not None:
                drafts.begin(row, self.prompts[row])
        self._lost = -1  # a request that ended in numbers that are none
        self._ready: deque[Token] = deque()

    def _begin(self, requests: Sequence[int], batch: int) -> State:
        """The state `[batch, ...]` in which some requests begin, before their prompts."""
        state, need = self._given, self._need
        if state is not None and self._joining:
            need = [need[row] for row in requests]
            state = take_rows(state, requests) if num_rows(state) > 1 else state
        return begin(self._config, state, need, batch, self.mesh)

    @property
    def state(self) -> State:
        """State of the requests, one row each, after all that was decoded. A copy.

        Raises `UserError` if there are more requests than slots: those that ended left none.
        """
        if self._joining:
            raise UserError(
                f"there are {len(self.prompts)} requests in {self._slots.width} slots, so the "
                f"states of those that ended are gone: leave slots out"
            )
        return first_rows(self._slots.rows.state, len(self.prompts), self.mesh)

    @property
    def drafted(self) -> tuple[int, int]:
        """How many tokens were guessed so far, and how many of them were right."""
        return self._slots.drafted

    def read_prompts(self) -> None:
        """Consume the prompts now, and not when the first token is asked for."""
        if self._unread:
            self._slots.read(self._unread)
            self._unread = []
        while self._waiting and self._running.free:
            self._join()

    def __iter__(self) -> "Session":
        return self

    def __next__(self) -> Token:
        while not self._ready:
            self.read_prompts()
            if not self._running.live:
                if self._lost >= 0:
                    raise NoProbabilities(f"request {self._lost} ends early: {NO_NUMBERS}")
                raise StopIteration
            wrote = self._running.decode(self.steps, at_end=bool(self._waiting))
            self._ready += (token for _, token in wrote.tokens)
            for answer in wrote.ended:
                if answer.finish == "error":
                    self._lost = answer.row
        return self._ready.popleft()

    def _join(self) -> None:
        """The next requests join, one on each device that has a free slot. Their prompts are read
        alone, at one row of each device, so what else runs changes nothing in them."""
        devices = 1 if self.mesh is None else self.mesh.size
        each = self._slots.width // devices  # slots
        slots, requests = [each] * devices, [self._waiting[0]] * devices  # no slot: left out
        prompts: list[list[int]] = [[]] * devices
        for slot in self._running.free:
            device, own = divmod(slot, each)
            if slots[device] == each and self._waiting:
                row = self._waiting.popleft()
                slots[device], requests[device], prompts[device] = own, row, self.prompts[row]
                self._running.answers[slot] = Answer(self.params[row], row)
                if self._slots.drafts is not None:
                    self._slots.drafts.begin(slot, self.prompts[row])
        state = self._begin(requests, devices)
        state = read_chunks(self._model, state, prompts, self.mesh)
        params = [self.params[row] for row in requests]
        seen = seen_tokens(prompts, devices, self._config.vocab_size)
        self._slots.join(slots, state, params, seen)


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
        prompts, way = (
            ("1 prompt", "one") if count == 1 else (f"{count} prompts", f"one, or {count}")
        )
        raise UserError(f"there are {len(given)} params for {prompts}: give {way}")
    for p in {id(p): p for p in given}.values():
        check_params(p, vocab_size)
    return given
