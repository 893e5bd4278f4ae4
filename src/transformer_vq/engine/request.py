"""One request: how it is sampled, and its tokens. Neither imports JAX."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformer_vq.engine.tokens import (
    check_vocabulary,
    text_tokens,
    token_list,
    whole_token,
)
from transformer_vq.errors import ConfigError, UserError, is_listed, shown
from transformer_vq.fields import check, free, real, refusal, switch, whole

MAX_STOP_TOKENS = 8  # single tokens that end a request
MAX_BIAS = 1e9  # above it a biased logit would not be finite everywhere

StopEntry = int | str | bytes | Sequence[int]


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled. Defaults draw from the model's own distribution.

    Numbers and lists may be those of Python, NumPy or JAX; they are kept as Python's.
    Raises `ValueError`, naming the field, the value and the limit, if a value makes no sense.
    """

    max_tokens: int = whole(128, "tokens to write", low=1)
    temperature: float = real(1.0, "below 1 plainer, above 1 wilder; 0: the likeliest", "[0, inf)")
    top_k: int = whole(0, "draw from so many likeliest tokens; 0: all")
    top_p: float = real(1.0, "draw from the likeliest tokens of this total probability", "(0, 1]")
    min_p: float = real(
        0.0, "leave out tokens below this fraction of the likeliest's probability", "[0, 1]"
    )
    typical_p: float = real(
        1.0, "draw from the most typical tokens of this total probability", "(0, 1]"
    )
    repetition_penalty: float = real(
        1.0, "above 1: discourage what is in prompt or output", "(0, inf)"
    )
    presence_penalty: float = real(0.0, "taken from scores of what was written")
    frequency_penalty: float = real(0.0, "the same, for each time it was written")
    logit_bias: Mapping[int, float] = free(
        "what is added to the scores of tokens; -inf: never", default_factory=dict
    )
    allowed_tokens: Sequence[int] | None = free("draw from these tokens only", default=None)
    banned_tokens: Sequence[int] = free("never draw these tokens", default=())
    min_tokens: int = whole(0, "write at least so many tokens, whatever stops it")
    stop: Sequence[StopEntry] | str | bytes = free(
        "end before one of these: tokens, lists of tokens, or texts as their UTF-8", default=()
    )
    seed: int = whole(0, "of what is drawn", high=2**63 - 1)
    logprobs: bool = switch(
        False, "log-probabilities of the tokens, and of the likeliest, under the model itself"
    )

    def __post_init__(self) -> None:
        check(self)
        self._keep("logit_bias", _biases(self.logit_bias))
        self._keep("banned_tokens", tuple(token_list("banned_tokens", self.banned_tokens)))
        if self.allowed_tokens is not None:
            self._keep("allowed_tokens", tuple(token_list("allowed_tokens", self.allowed_tokens)))
        if isinstance(self.stop, Iterator):  # it could be read only once
            self._keep("stop", tuple(self.stop))
        if any(not sequence for sequence in self.stop_sequences()):
            raise UserError("a stop sequence is empty: give at least one token")
        if len(self.stop_tokens()) > MAX_STOP_TOKENS:
            raise UserError(
                f"there are {len(self.stop_tokens())} stop tokens: at most {MAX_STOP_TOKENS} fit"
            )

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def stop_sequences(self) -> list[tuple[int, ...]]:
        """Every entry of `stop` as tokens; text as its UTF-8 bytes."""
        if isinstance(self.stop, str | bytes):
            return [_stop_sequence(self.stop)]
        if isinstance(self.stop, Mapping) or not is_listed(self.stop):
            limit = "a list of tokens, lists of tokens and texts, or one text"
            raise refusal("stop", self.stop, limit)
        return [_stop_sequence(entry) for entry in self.stop]

    def stop_tokens(self) -> list[int]:
        """Stop sequences of one token: these stop on the device."""
        return [entry[0] for entry in self.stop_sequences() if len(entry) == 1]


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise `ValueError` for tokens that the model does not have, or if none can be drawn."""
    for stop in params.stop_sequences():
        check_vocabulary("stop", stop, vocab_size)
    check_vocabulary("logit_bias", list(params.logit_bias), vocab_size)
    check_vocabulary("banned_tokens", params.banned_tokens, vocab_size)
    allowed = set(range(vocab_size))
    if params.allowed_tokens is not None:
        check_vocabulary("allowed_tokens", params.allowed_tokens, vocab_size)
        allowed = set(params.allowed_tokens)
    allowed -= set(params.banned_tokens)
    if not allowed or (params.min_tokens and not allowed - set(params.stop_tokens())):
        raise UserError(
            "no token can be drawn: allow one that is not banned, nor a stop before min_tokens"
        )


def _stop_sequence(entry: Any) -> tuple[int, ...]:
    if isinstance(entry, str):
        return tuple(text_tokens("stop", entry))
    if is_listed(entry):
        return tuple(token_list("stop", entry))
    return (whole_token("stop", entry),)


def _biases(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise refusal("logit_bias", given, "a dictionary, {token: number}")
    biases = {}
    for token, value in given.items():
        number = _number(value)
        if not number < MAX_BIAS:
            raise ConfigError(
                f"logit_bias is {shown(value)} for {shown(token)}: it must be a number below "
                f"{MAX_BIAS:g}",
                "logit_bias",
            )
        biases[whole_token("logit_bias", token)] = number
    return biases


def _number(value: Any) -> float:
    """A number of any library as a float, which may be infinite; NaN for what is no number."""
    if isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return math.nan


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
