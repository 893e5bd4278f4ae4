"""One request: how it is sampled, as arrays too, and its tokens on their way out."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from transformer_vq.errors import UserError
from transformer_vq.nn import prob
from transformer_vq.ops.sample import Controls, Generated

MAX_STOP_TOKENS = 8  # single tokens that end a request


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled. Defaults draw from the model's own distribution.

    Raises `ValueError`, naming the field, the value and the limit, if a value makes no sense.
    """

    max_tokens: int = 128
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # nucleus; 1: all
    min_p: float = 0.0  # fraction of the best token's probability; 0: all
    typical_p: float = 1.0  # locally typical; 1: all
    repetition_penalty: float = 1.0  # over prompt and output; 1: none
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed_tokens: Sequence[int] | None = None  # None: all
    banned_tokens: Sequence[int] = ()
    min_tokens: int = 0  # the output has at least so many, whatever stops it
    stop: Sequence[int | str | bytes | Sequence[int]] | str | bytes = ()
    seed: int = 0
    logprobs: bool = False  # of the tokens drawn, and of the best ones, under the model itself

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

    def __new__(cls, token: int, row: int, logprob=None, top_logprobs=None) -> "Token":
        self = super().__new__(cls, token)
        self.row, self.logprob, self.top_logprobs = row, logprob, top_logprobs
        return self


class Output:
    """The tokens of one request on their way out: ends at stop sequences, holds back beginnings."""

    def __init__(self, row: int, params: SamplingParams):
        self.row, self.params = row, params
        self.stops = [stop for stop in params.stop_sequences() if len(stop) > 1]
        self.held: list[Token] = []
        self.seen = 0
        self.ended = False

    def push(self, new: Generated, step: int) -> Iterator[Token]:
        """Take the row's token of this step; yield what is certain to be output."""
        if self.ended:
            return
        self.held.append(self._token(new, step))
        self.seen += 1
        for stop in self.stops:
            if self._may_end(len(stop)) and self._tail(len(stop)) == stop:
                del self.held[-len(stop) :]
                self.ended = True
                yield from self.flush()
                return
        keep = max(map(self._overlap, self.stops), default=0)
        ready = len(self.held) - keep
        yield from self.held[:ready]
        del self.held[:ready]

    def flush(self) -> Iterator[Token]:
        """Yield what was held back."""
        yield from self.held
        self.held = []

    def _tail(self, length: int) -> tuple[int, ...]:
        return tuple(self.held[-length:])

    def _may_end(self, length: int) -> bool:
        """Whether enough tokens are left if the last so many are the stop sequence."""
        return self.seen - length >= self.params.min_tokens

    def _overlap(self, stop: tuple[int, ...]) -> int:
        """Length of the longest end of what is held that begins this stop sequence."""
        lengths = range(min(len(stop) - 1, len(self.held)), 0, -1)
        return next((n for n in lengths if self._may_end(n) and self._tail(n) == stop[:n]), 0)

    def _token(self, new: Generated, step: int) -> Token:
        token, row = int(new.tokens[self.row, step]), self.row
        if not self.params.logprobs:
            return Token(token, row)
        best = zip(new.top_tokens[row, step], new.top_logprobs[row, step], strict=True)
        return Token(
            token, row, float(new.logprobs[row, step]), {int(t): float(p) for t, p in best}
        )


def as_controls(params: list[SamplingParams], batch: int, vocab_size: int) -> Controls:
    """The parameters as arrays; rows that pad the batch get those of the first request."""
    params = params + params[:1] * (batch - len(params))

    def column(name: str, dtype: DTypeLike = np.float32) -> jax.Array:
        return jnp.asarray([min(getattr(p, name), 2**31 - 1) for p in params], dtype)

    stops = np.full((batch, MAX_STOP_TOKENS), -1, np.int32)
    bias = np.zeros((batch, vocab_size), np.float32)
    for row, p in enumerate(params):
        single = p.stop_tokens()
        stops[row, : len(single)] = single
        for token, value in p.logit_bias.items():
            bias[row, token] = max(value, prob.REMOVED)
        if p.allowed_tokens is not None:
            banned = np.setdiff1d(np.arange(vocab_size), np.asarray(p.allowed_tokens, np.int64))
            bias[row, banned] = prob.REMOVED
        bias[row, list(p.banned_tokens)] = prob.REMOVED
    return Controls(
        key=jnp.asarray(np.array([divmod(int(p.seed), 1 << 32) for p in params], np.uint32)),
        temperature=column("temperature"),
        top_k=column("top_k", np.int32),
        top_p=column("top_p"),
        min_p=column("min_p"),
        typical_p=column("typical_p"),
        repetition_penalty=column("repetition_penalty"),
        presence_penalty=column("presence_penalty"),
        frequency_penalty=column("frequency_penalty"),
        bias=jnp.asarray(bias),
        stop_tokens=jnp.asarray(stops),
        min_tokens=column("min_tokens", np.int32),
    )
