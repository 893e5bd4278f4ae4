"""Continuous batching: requests join and leave a batch of rows that is being decoded. No JAX here.

A `Scheduler` does one thing after another, a `step` at a time: it takes the oldest request, reads a
chunk of its prompt alone, at one row, puts it into free slots, and decodes all slots for a while.
So the state of a prompt does not depend on what else runs, and rows that run are not touched by it.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from transformer_vq.data.tokenizer import Tokens
from transformer_vq.engine.request import SamplingParams, Token
from transformer_vq.engine.running import (
    MOST_STEPS,
    NO_NUMBERS,
    Answer,
    Finish,
    Running,
    Slots,
    Snapshot,
)

STREAMING, ALONE = 0.06, 0.25  # seconds of a dispatch, where somebody reads along and where nobody
AFTER_A_CHUNK = 0.015  # the same where who reads along has just waited for a chunk of a prompt
FIRST_STEPS = 1  # of a dispatch in which somebody waits for the first token
NARROW_AFTER = 1.0  # seconds that a request is alone in many slots before it gets a batch of one


class Scores(NamedTuple):
    """How probable the tokens of a prompt were, in nats, and the likeliest in their places."""

    logprobs: np.ndarray  # float32 [T]; of the first token of all, without meaning
    top_tokens: np.ndarray  # int32 [T, alternatives]
    top_logprobs: np.ndarray  # float32, same shape


class Device(Protocol):
    """What a scheduler asks of `engine.device.Device`."""

    largest: int
    vocab_size: int

    @property
    def slots(self) -> Mapping[int, Slots]: ...  # by how many they are

    def prepare(self) -> None: ...
    def begin(self, start: Snapshot | None) -> Any: ...
    def copy(self, state: Any) -> Any: ...
    def read(self, state: Any, tokens: Tokens) -> Any: ...
    def read_scored(self, state: Any, tokens: Tokens) -> tuple[Any, Scores]: ...
    def wait(self, state: Any) -> None: ...
    def is_sound(self, state: Any) -> bool: ...


@dataclass(eq=False)
class Request:
    """A prompt, and how to go on from it: once for each of `params`.

    `prompt` and `params` have been checked: tokens of the vocabulary, and not both a `start` and a
    prompt missing. What a request is given stays as it is; the rest is the scheduler's.
    """

    prompt: Tokens
    params: Sequence[SamplingParams]  # none: the prompt is read, and that is all
    start: Snapshot | None = None  # what came before the prompt
    known: int = 0  # `start` is the state of so many tokens of the prompt, which came after nothing
    written: int = 0  # so many tokens at the end of the prompt count as written, not as read
    scored: bool = False  # with the probabilities of the prompt's tokens
    streams: bool = False  # somebody reads along
    keep: frozenset[int] = frozenset()  # ends of chunks, in tokens of the prompt: their snapshots
    keep_answers: bool = False  # snapshots after what was written, where it ended by itself
    live: int = field(default=0, init=False)  # answers that have not ended

    @property
    def rows(self) -> int:
        """How many rows it takes, all in all."""
        return max(1, len(self.params))


@dataclass(frozen=True)
class Event:
    """News of a request: its prompt was read (`choice` is None), or an answer grew or ended."""

    request: Request
    choice: int | None
    tokens: Sequence[Token] = ()
    finish: Finish | None = None
    scores: Scores | None = None
    snapshots: dict[int, Snapshot] = field(default_factory=dict)  # by tokens of the prompt
    snapshot: Snapshot | None = None  # after the answer
    error: str = ""  # why it ended, where `finish` is error
    last: bool = False  # nothing more will come of the request


@dataclass
class _Reading:
    """The request whose prompt is being read, or has been and waits for slots."""

    request: Request
    state: Any
    done: int  # tokens of the prompt
    scores: list[Scores] = field(default_factory=list)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    ready: Snapshot | None = None  # the prompt is read
    inserted: int = 0  # samples that have got a slot


class Scheduler:
    """Requests over the rows of a device.

    Args:
      device: of `engine.device`; the slots of one of its widths run at a time.
      exact: always the largest width: what a request gives then does not depend, to the bit, on
        what else there is.
      clock: seconds that go on. It decides how long a dispatch is, and never what is in it.
    """

    def __init__(
        self, device: Device, *, exact: bool = False, clock: Callable[[], float] = time.monotonic
    ):
        self.device, self._clock = device, clock
        self._wide = max(device.slots)
        self._narrow = self._wide if exact else min(device.slots)
        self._running = Running(device.slots[self._narrow])
        self._waiting: deque[Request] = deque()
        self._reading: _Reading | None = None
        self._owed = 0.0  # seconds of reading that decoding has not had yet
        self._has_read = False  # a chunk in this step, while rows waited
        self._reads_on = False  # the device may still be at the chunk of this step
        self.hurries = False  # the last step brought the first token of a stream
        self._alone_since: float | None = None
        # Of one step, as measured; of a width that is not: one step of it is tried.
        self.step_seconds = dict.fromkeys(device.slots, math.inf)
        self.prompt_tokens = self.written_tokens = self.dispatches = 0  # so far

    @property
    def running(self) -> int:
        """Rows that are being decoded."""
        return len(self._running.live)

    @property
    def width(self) -> int:
        """How many slots there are now."""
        return self._running.slots.width

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, that whose prompt is being read included."""
        return len(self._waiting) + (self._reading is not None)

    @property
    def drafted(self) -> tuple[int, int]:
        """How many tokens were guessed so far, and how many of them were right."""
        guessed, right = zip(*(slots.drafted for slots in self.device.slots.values()), strict=True)
        return sum(guessed), sum(right)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        """Queue a request; first come, first served."""
        request.live = request.rows
        self._waiting.append(request)

    def cancel(self, request: Request, choice: int | None = None) -> bool:
        """Forget a request, or one of its answers: nothing more comes of it.

        Wherever it is, its row is free before the next thing is done on the device. Whether the
        request has ended by this.
        """
        if not request.live:
            return False
        for slot, answer in self._running.live:
            if answer.request is request and choice in (None, answer.row):
                self._running.answers[slot] = None
                request.live -= 1
        if choice is None:
            request.live = 0
            if request in self._waiting:
                self._waiting.remove(request)
            if self._reading and self._reading.request is request:
                self._reading = None
        return not request.live

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Event]:
        """Read a chunk, fill slots, decode for a while: what came of it.

        `meanwhile` is called once, soon: where rows are only decoded, while the device is at work.
        """
        events: list[Event] = []
        ended = None
        self._has_read = self._reads_on = self.hurries = False
        only_decodes = self.running and not self.waiting
        if not only_decodes:
            meanwhile()
        if self._reading is None and self._waiting:
            request = self._waiting.popleft()
            self._reading = _Reading(request, self.device.begin(request.start), request.known)
        if self._reading and self._reading.ready is None:
            ended = self._read(self._reading, events)
        if self._reading and self._reading.ready:
            self._insert(self._reading)
        self._fit_width()
        if self.running:
            self._decode(events, meanwhile if only_decodes else lambda: None)
        if ended and not self.device.is_sound(ended.state):
            self._fail(ended.request, events)
        return events

    # Prompts.

    def _read(self, reading: _Reading, events: list[Event]) -> _Reading | None:
        """One chunk of the prompt, unless decoding has had less than half of the time. The prompt,
        if that was its last chunk: whether its state is sound is not known yet."""
        request = reading.request
        left = request.prompt[reading.done : reading.done + self.device.largest]
        if len(left):
            if self.running and self._owed > 0:
                return None
            began = self._clock()
            if request.scored:
                reading.state, scores = self.device.read_scored(reading.state, left)
                reading.scores.append(scores)
            else:
                reading.state = self.device.read(reading.state, left)
            reading.done += len(left)
            self.prompt_tokens += len(left)
            # Where nothing runs, what a first token needs is called for while the device reads.
            self._reads_on = not self.running and reading.done == len(request.prompt)
            if not self._reads_on:
                self.device.wait(reading.state)
            self._owed = self._clock() - began if self.running else 0.0
            self._has_read = self.running > 0
        ends = reading.done == len(request.prompt)
        if reading.done in request.keep:
            state = reading.state if ends else self.device.copy(reading.state)
            reading.snapshots[reading.done] = self._snapshot(request, reading.done, state)
        if not ends:
            return None
        self._end_prompt(reading, events)
        return reading

    def _snapshot(self, request: Request, done: int, state: Any) -> Snapshot:
        """The state after so many tokens of a prompt, with what penalties are to count."""
        seen = np.zeros(self.device.vocab_size, bool)
        tokens = np.asarray(request.prompt[:done], np.int64)
        first_written = len(request.prompt) - request.written
        seen[tokens[:first_written]] = True
        counts = np.bincount(tokens[first_written:], minlength=len(seen)).astype(np.int32)
        if request.start and not request.known:
            seen, counts = seen | request.start.seen, counts + request.start.counts
        return Snapshot(state, seen, counts)

    def _end_prompt(self, reading: _Reading, events: list[Event]) -> None:
        """The prompt is read: it says so, and may have answers now."""
        request = reading.request
        scores = None
        if reading.scores:
            scores = Scores(*map(np.concatenate, zip(*reading.scores, strict=True)))
        if not request.params:
            self._reading, request.live = None, 0
        reading.ready = self._snapshot(request, reading.done, reading.state)
        last = not request.params
        events.append(Event(request, None, scores=scores, snapshots=reading.snapshots, last=last))

    def _fail(self, request: Request, events: list[Event]) -> None:
        """The prompt has left a state that is not numbers: nothing else is told of its request."""
        self.cancel(request)
        events[:] = [event for event in events if event.request is not request]
        events.append(Event(request, None, finish="error", error=NO_NUMBERS, last=True))

    # Slots.

    def _insert(self, reading: _Reading) -> None:
        """As many samples of the prompt that is read as slots are free."""
        assert reading.ready
        request = reading.request
        wanted = self.running + len(request.params) - reading.inserted
        if not self.running or wanted > self.width:
            self._change_width(self._narrow if wanted <= self._narrow else self._wide)
        for slot in self._running.free[: len(request.params) - reading.inserted]:
            answer = Answer(request.params[reading.inserted], reading.inserted, request)
            self._running.slots.insert(slot, reading.ready, answer.params, request.prompt)
            self._running.answers[slot] = answer
            reading.inserted += 1
        if reading.inserted == len(request.params):
            self._reading = None

    def _fit_width(self) -> None:
        """Back to the batch of one, once at most one request has been there for a while."""
        if self.width == self._narrow or not 0 < self.running <= self._narrow or self.waiting:
            self._alone_since = None
            return
        now = self._clock()
        if self._alone_since is None:
            self._alone_since = now
        if now - self._alone_since >= NARROW_AFTER:
            self._change_width(self._narrow)

    def _change_width(self, width: int) -> None:
        """All that runs goes on in the slots of another width."""
        if width != self.width:
            others = Running(self.device.slots[width])
            self._running.move(others)
            self._running, self._alone_since = others, None

    # Decoding.

    def _decode(self, events: list[Event], meanwhile: Callable[[], None]) -> None:
        """One dispatch, and what it brought to each request."""
        news: dict[Answer, list[Token]] = {answer: [] for _, answer in self._running.live}
        streams = [answer for answer in news if answer.request.streams]
        seconds = (AFTER_A_CHUNK if self._has_read else STREAMING) if streams else ALONE
        of_a_step = self.step_seconds[self.width]
        steps = int(seconds / of_a_step)
        if self._reading and self._owed > 0:  # the next chunk of a prompt waits for so much
            seconds = max(self._owed, AFTER_A_CHUNK)
            steps = min(steps, math.ceil(seconds / of_a_step))
        first = any(not answer.written for answer in streams)
        self.hurries = first
        most = FIRST_STEPS if first else MOST_STEPS
        began = self._clock()
        wrote = self._running.decode(
            max(1, min(most, steps)),
            at_end=self.waiting > 0,
            meanwhile=meanwhile,
        )
        took = self._clock() - began
        self._owed = max(0.0, self._owed - took)
        if not self._reads_on and (not first or math.isinf(self.step_seconds[self.width])):
            self._measure(took / max(1, wrote.steps))
        self.dispatches += 1
        self.written_tokens += wrote.total
        for answer, token in wrote.tokens:
            news[answer].append(token)
        for answer, tokens in news.items():
            if tokens or answer.finish:
                events.append(self._event(answer, tokens, wrote.ended.get(answer)))

    def _measure(self, seconds: float) -> None:
        """A moving average of the time of a step. (Of a few steps at the start of a stream, what
        comes of every dispatch is too large a part: they count only where nothing is known.)"""
        old = self.step_seconds[self.width]
        old = seconds if math.isinf(old) else old
        self.step_seconds[self.width] = max(0.7 * old + 0.3 * seconds, 1e-6)

    def _event(self, answer: Answer, tokens: Sequence[Token], ended: int | None) -> Event:
        """An answer has grown, or ended; its row is in the slot `ended`."""
        request, finish, snapshot = answer.request, answer.finish, None
        request.live -= finish is not None
        by_itself = finish and finish != "error" and not answer.output.ended
        if ended is not None and by_itself and request.keep_answers:
            snapshot = self._running.slots.snapshot(ended)
        return Event(
            request,
            answer.row,
            tokens,
            finish,
            snapshot=snapshot,
            error=NO_NUMBERS if finish == "error" else "",
            last=not request.live,
        )
