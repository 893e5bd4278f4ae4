"""Fields of configurations: each is declared once, with its default, its help and its limit.

    @dataclass(frozen=True)
    class Example:
        rows: int = whole(8, "rows of a batch", low=1)
        rate: float = real(0.5, "share that is dropped", "[0, 1)")
        kind: Literal["a", "b"] = choice("a", "which of the two")
        fast: bool = switch(True, "do not wait")

        def __post_init__(self) -> None:
            check(self)

`check` compares every field with its limit. The command line makes an option of a field, whose
text is `metadata["help"]`. Standard library only.
"""

import dataclasses
import functools
import math
import numbers
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformer_vq.errors import ConfigError, shown

MOST = 2**31 - 1  # arrays, positions and counts of steps have indices of 32 bits
MOST_SIZE = 2**30 - 1  # of an axis: twice as much, or one more, is an index too
MOST_SEED = 2**32 - 1  # `jax.random.key` keeps 32 bits
_SMALLEST = 2.0**-126  # in float32: what is nearer to 0 becomes 0


def whole(
    default: Any,
    help: str,
    low: int = 0,
    high: int = MOST,
    *,
    also: Mapping[int, str] | None = None,
) -> Any:
    """A field for whole numbers from `low` to `high`. `also`: other values, and what they mean.

    `default` is a number, or `dataclasses.MISSING` where one must be given.
    """
    return _field(default, help, _Whole(low, high, also or {}))


def size(default: int, help: str, low: int = 1, *, also: Mapping[int, str] | None = None) -> Any:
    """A field for the length of an axis of arrays, or what one is computed from."""
    return whole(default, help, low, MOST_SIZE, also=also)


def real(
    default: float, help: str, limits: str = "(-inf, inf)", *, also: Mapping[int, str] | None = None
) -> Any:
    """A field for numbers in an interval such as `[0, 1)`, as float32 too. `also`: as in `whole`.

    The value is a Python float. Infinity and NaN are in no interval.
    """
    return _field(default, help, _Real.parse(limits, also or {}))


def choice(default: Any, help: str) -> Any:
    """A field for one of the values of its type, which is a `Literal`."""
    return _field(default, help, None)


def switch(default: bool, help: str) -> Any:
    """A field that is true or false."""
    return _field(default, help, None)


def free(help: str, **how: Any) -> Any:
    """A field that its class checks itself. `how`: `default` or `default_factory`."""
    return field(**how, metadata={"help": help})


def check(config: Any) -> None:
    """Compare every field with its limit. Raises `ConfigError`, which names field, value and limit.

    Numbers of other libraries (numpy's) become Python's.
    """
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        if "rule" in f.metadata:
            rule = f.metadata["rule"] or _Choice.of(hints[f.name])
            object.__setattr__(config, f.name, rule.taken(f.name, getattr(config, f.name)))


def limits(config: type) -> dict[str, str]:
    """Of each field for whole numbers, what its values are: "1 to 26"."""
    rules = {f.name: f.metadata.get("rule") for f in dataclasses.fields(config)}
    return {
        name: f"{rule.low:,} to {rule.high:,}"
        for name, rule in rules.items()
        if isinstance(rule, _Whole)
    }


def refusal(name: str, value: Any, limit: str) -> ConfigError:
    """The error for a field whose value is beyond a limit."""
    return ConfigError(f"{name} is {shown(value)}: it must be {limit}", name)


def require_count(name: str, value: Any) -> None:
    """Raise `ConfigError` for what is no whole number of at least 1."""
    number = _index(value)
    if number is None or number > MOST:
        raise refusal(name, value, whole_limit(1, MOST))
    if number < 1:
        raise refusal(name, value, "at least 1")


def as_amount(name: str, value: Any) -> float:
    """A number of at least 0, or infinity, as Python's. Raises `ConfigError` for anything else."""
    number = _float(value)
    if number is None or not number >= 0:
        raise refusal(name, value, "a number of at least 0")
    return number


def whole_limit(low: int, high: int) -> str:
    """What a sentence says of the limits of a whole number."""
    return f"a whole number from {low} to {_power(high)}"


# Rules: each has `taken(name, value)`, the value as it is kept, or an error.


@dataclass(frozen=True)
class _Whole:
    low: int
    high: int
    also: Mapping[int, str]

    def taken(self, name: str, value: Any) -> int:
        number = _index(value)
        if number is None or not (self.low <= number <= self.high or number in self.also):
            raise refusal(name, value, whole_limit(self.low, self.high) + _others(self.also))
        return number


@dataclass(frozen=True)
class _Real:
    low: float
    high: float
    low_belongs: bool
    high_belongs: bool
    also: Mapping[int, str]

    @classmethod
    def parse(cls, limits: str, also: Mapping[int, str]) -> "_Real":
        parts = re.fullmatch(r"([\[(])(.+), (.+)([\])])", limits)
        assert parts, limits
        return cls(float(parts[2]), float(parts[3]), parts[1] == "[", parts[4] == "]", also)

    def taken(self, name: str, value: Any) -> float:
        number = _float(value)
        if number is None:
            raise refusal(name, value, "a number")
        single = _single(number)
        if number in self.also or (self._holds(number) and self._holds(single)):
            return number
        error = refusal(name, value, self._limit() + _others(self.also))
        if self._holds(number):  # in the interval by less than float32 can tell
            said = str(error).replace(":", f", which is {single:g} in float32:", 1)
            raise ConfigError(said, name)
        raise error

    def _holds(self, number: float) -> bool:
        above = number >= self.low if self.low_belongs else number > self.low
        below = number <= self.high if self.high_belongs else number < self.high
        return above and below and math.isfinite(number)

    def _limit(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if math.isinf(self.low):
            return "a finite number"
        if math.isinf(self.high):
            return f"a finite number{f', {low} or more' if self.low_belongs else f' above {low}'}"
        below = f"{'at most' if self.high_belongs else 'below'} {high}"
        return f"{'at least' if self.low_belongs else 'above'} {low} and {below}"


@dataclass(frozen=True)
class _Choice:
    values: tuple[Any, ...]

    @classmethod
    def of(cls, hint: Any) -> "_Choice":
        assert hint is bool or get_origin(hint) is Literal, hint
        return cls((True, False) if hint is bool else get_args(hint))

    def taken(self, name: str, value: Any) -> Any:
        if self.values == (True, False):
            if not isinstance(value, bool):
                raise refusal(name, value, "true or false")
        elif not (isinstance(value, str) and value in self.values):
            raise refusal(name, value, f"one of {', '.join(self.values)}")
        return value


def _field(default: Any, help: str, rule: Any) -> Any:
    for value, meaning in getattr(rule, "also", {}).items():
        help += f"; {value}: {meaning}"
    return field(default=default, metadata={"help": help, "rule": rule})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _others(also: Mapping[int, str]) -> str:
    return "".join(f", or {value} ({meaning})" for value, meaning in also.items())


def _power(number: int) -> str:
    """A limit as people know it: 2^31 - 1."""
    bits = (number + 1).bit_length() - 1
    return f"2^{bits} - 1" if bits >= 16 and number + 1 == 1 << bits else str(number)


def _index(value: Any) -> int | None:
    """A whole number of any library, as Python's; None for anything else."""
    return int(value) if _is(value, numbers.Integral) else None


def _float(value: Any) -> float | None:
    """A number of any library, as Python's; None for text, switches and all that is no number."""
    if not _is(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond them all
        return math.inf if value > 0 else -math.inf


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _single(number: float) -> float:
    """The number as float32 has it on a device: those next to 0 are 0, those beyond infinite."""
    try:
        rounded = struct.unpack("f", struct.pack("f", number))[0]
    except OverflowError:
        return math.copysign(math.inf, number)
    return rounded if abs(rounded) >= _SMALLEST else 0.0
