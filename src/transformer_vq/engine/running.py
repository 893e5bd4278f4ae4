"""Answers that are being written: in slots, decoded together until each ends. No JAX here.

This is the core of the engine. Whoever runs requests, a `Scheduler` or a `Session`, starts them
here and gets their tokens from here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from transformer_vq.data.tokenizer import Tokens
from transformer_vq.engine.output import Output
from transformer_vq.engine.request import SamplingParams, Token

MOST_STEPS = 128  # of a dispatch
NO_NUMBERS = "the model gives no probabilities here but not-a-number (NaN)"

Finish = Literal["stop", "length", "error"]


class Dispatch(NamedTuple):
    """What a call of the device has done: `ops.decode.Generated` as arrays of the host."""

    tokens: np.ndarray  # int32 [B, steps or more]
    lengths: np.ndarray  # int32 [B]
    logprobs: np.ndarray  # float32 [B, steps]
    top_tokens: np.ndarray  # int32 [B, steps, alternatives]
    top_logprobs: np.ndarray
    active: np.ndarray  # bool [B]: rows that go on
    unsound: np.ndarray  # bool [B]: rows whose logits are not numbers


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a sequence has left: its state, and what penalties count. It never changes."""

    state: Any  # nn.model.State of one row
    seen: np.ndarray  # bool [vocab]: tokens of its prompts
    counts: np.ndarray  # int32 [vocab]: how often each token was written

    @property
    def position(self) -> int:
        """How many tokens were consumed."""
        return int(np.asarray(self.state.position)[0])


class Slots(Protocol):
    """What is asked of `engine.device.Slots`."""

    width: int

    @property
    def drafted(self) -> tuple[int, int]: ...
    def insert(self, slot: int, start: Snapshot, params: SamplingParams, text: Tokens) -> None: ...
    def move(self, slot: int, to: Any, to_slot: int) -> None: ...
    def snapshot(self, slot: int) -> Snapshot: ...
    def decode(
        self,
        keep: np.ndarray,
        *,
        steps: int,
        at_end: bool,
        with_logprobs: bool,
        meanwhile: Callable[[], None] = ...,
    ) -> Dispatch: ...


@dataclass(eq=False)
class Answer:
    """What is written for a request, with some parameters."""

    params: SamplingParams
    row: int  # of its tokens (`Token.row`)
    request: Any = None  # whose it is
    written: int = field(default=0, init=False)  # tokens, those that are held back included
    finish: Finish | None = field(default=None, init=False)  # why it ended
    output: Output = field(init=False)

    def __post_init__(self) -> None:
        self.output = Output(self.params)

    def take(self, new: Dispatch, slot: int, step: int) -> list[Token]:
        """The token of a step is written: the tokens that are certain to be output now."""
        self.written += 1
        token = int(new.tokens[slot, step])
        if not self.params.logprobs:
            return self.output.push(Token(token, self.row))
        best = zip(new.top_tokens[slot, step], new.top_logprobs[slot, step], strict=True)
        top_logprobs = {int(t): float(p) for t, p in best}
        return self.output.push(
            Token(token, self.row, float(new.logprobs[slot, step]), top_logprobs)
        )

    def end(self, new: Dispatch, slot: int) -> list[Token]:
        """A dispatch is over, which may have ended it: the tokens that were held back till then."""
        if self.output.ended:
            self.finish = "stop"
        elif not new.active[slot]:
            if self.written == self.params.max_tokens:
                self.finish = "length"
            else:
                self.finish = "error" if new.unsound[slot] else "stop"
            return self.output.flush()
        return []


class Wrote(NamedTuple):
    """What a dispatch brought."""

    tokens: list[tuple[Answer, Token]]  # certain to be output; step by step, slot by slot
    ended: dict[Answer, int]  # answers that have a `finish`, and where their rows still are
    steps: int  # tokens of the row that got most
    total: int  # tokens of all rows


class Running:
    """The answers in the slots of one batch."""

    def __init__(self, slots: Slots):
        self.slots = slots
        self.answers: list[Answer | None] = [None] * slots.width

    @property
    def live(self) -> list[tuple[int, Answer]]:
        """The answers that have not ended, each with its slot."""
        return [(slot, answer) for slot, answer in enumerate(self.answers) if answer]

    @property
    def free(self) -> list[int]:
        """Slots in which nothing runs."""
        return [slot for slot, answer in enumerate(self.answers) if answer is None]

    def move(self, to: "Running") -> None:
        """All that runs goes on in free slots of another batch."""
        for (slot, answer), to_slot in zip(self.live, to.free, strict=False):
            self.slots.move(slot, to.slots, to_slot)
            self.answers[slot], to.answers[to_slot] = None, answer

    def decode(
        self,
        steps: int,
        *,
        at_end: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Wrote:
        """One dispatch of all rows, up to `steps` tokens each; `at_end`: until one of them ends.

        Slots of answers that ended are free. `meanwhile`: as of `engine.device.Slots.decode`.
        """
        live = self.live
        new = self.slots.decode(
            np.array([answer is not None for answer in self.answers]),
            steps=steps,
            at_end=at_end,
            with_logprobs=any(answer.params.logprobs for _, answer in live),
            meanwhile=meanwhile,
        )
        lengths = new.lengths.tolist()
        most = max(lengths)
        tokens: list[tuple[Answer, Token]] = []
        for step in range(most):
            for slot, answer in live:
                if step < lengths[slot]:
                    tokens += ((answer, token) for token in answer.take(new, slot, step))
        ended = {}
        for slot, answer in live:
            tokens += ((answer, token) for token in answer.end(new, slot))
            if answer.finish:
                self.answers[slot], ended[answer] = None, slot
        return Wrote(tokens, ended, most, sum(lengths))
