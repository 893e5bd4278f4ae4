"""One request: how it is sampled, and its tokens. Neither imports JAX."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transformer_vq.errors import UserError

MAX_STOP_TOKENS = 8  # single tokens that end a request


def _doc(default: Any, text: str) -> Any:
    """A dataclass field whose help text the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled. Defaults draw from the model's own distribution.

    Raises `ValueError`, naming the field, the value and the limit, if a value makes no sense.
    """

    max_tokens: int = _doc(128, "tokens to write")
    temperature: float = _doc(1.0, "below 1 plainer, above 1 wilder; 0: the likeliest")
    top_k: int = _doc(0, "draw from so many likeliest tokens; 0: all")
    top_p: float = _doc(1.0, "draw from the likeliest tokens of this total probability")
    min_p: float = _doc(0.0, "leave out tokens below this fraction of the likeliest's probability")
    typical_p: float = _doc(1.0, "draw from the most typical tokens of this total probability")
    repetition_penalty: float = _doc(1.0, "above 1: discourage what is in prompt or output")
    presence_penalty: float = _doc(0.0, "taken from scores of what was written")
    frequency_penalty: float = _doc(0.0, "the same, for each time it was written")
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "added to the scores of tokens; -inf: never"}
    )
    allowed_tokens: Sequence[int] | None = _doc(None, "draw from these tokens only")
    banned_tokens: Sequence[int] = _doc((), "never draw these tokens")
    min_tokens: int = _doc(0, "tokens that are written, whatever stops it")
    stop: Sequence[int | str | bytes | Sequence[int]] | str | bytes = _doc(
        (), "end before these tokens, sequences of tokens, or texts (as UTF-8 bytes)"
    )
    seed: int = _doc(0, "of what is drawn")
    logprobs: bool = _doc(
        False, "log-probabilities of the tokens, and of the likeliest, under the model itself"
    )

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, limit: str) -> None:
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)}: it must be {limit}")

        for name, low in (("max_tokens", 1), ("top_k", 0), ("min_tokens", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            check(name, bool(whole and low <= value < 2**31), f"a whole number, {low} or more")
        check("temperature", 0 <= self.temperature < math.inf, "a finite number, 0 or more")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1")
        check("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, math.isfinite(getattr(self, name)), "a finite number")
        check("seed", isinstance(self.seed, int | np.integer) and 0 <= self.seed < 2**63,
              "a whole number from 0 to 2^63 - 1")  # fmt: skip
        if any(math.isnan(value) or value >= 1e9 for value in self.logit_bias.values()):
            raise UserError(f"logit_bias is {self.logit_bias}: it must be numbers below 1e9")
        if any(not sequence for sequence in self.stop_sequences()):
            raise UserError("a stop sequence is empty: give at least one token")
        if len(self.stop_tokens()) > MAX_STOP_TOKENS:
            raise UserError(
                f"there are {len(self.stop_tokens())} stop tokens: at most {MAX_STOP_TOKENS} fit"
            )

    def stop_sequences(self) -> list[tuple[int, ...]]:
        """Every entry of `stop` as tokens; text as its UTF-8 bytes."""
        entries = [self.stop] if isinstance(self.stop, str | bytes) else self.stop
        return [_as_tokens(entry) for entry in entries]

    def stop_tokens(self) -> list[int]:
        """Stop sequences of one token: these stop on the device."""
        return [entry[0] for entry in self.stop_sequences() if len(entry) == 1]


def _as_tokens(entry: int | str | bytes | Sequence[int]) -> tuple[int, ...]:
    if isinstance(entry, int | np.integer):
        return (int(entry),)
    return tuple(entry.encode() if isinstance(entry, str) else entry)


class Token(int):
    """A token as `stream` yields it: a whole number that knows its request."""

    row: int  # index of the prompt
    logprob: float | None  # natural logarithm, if `logprobs` was asked for
    top_logprobs: dict[int, float] | None  # of the most probable tokens, best first

    def __new__(
        cls,
        token: int,
        row: int,
        logprob: float | None = None,
        top_logprobs: dict[int, float] | None = None,
    ) -> "Token":
        self = super().__new__(cls, token)
        self.row, self.logprob, self.top_logprobs = row, logprob, top_logprobs
        return self
