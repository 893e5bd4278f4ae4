"""Fields of configurations: what their limits take, refuse, and say."""

import dataclasses
import math
from typing import Literal

import numpy as np
import pytest

from transformer_vq.errors import ConfigError, cut, plain, shown
from transformer_vq.fields import MOST_SEED, check, choice, real, switch, whole


@dataclasses.dataclass(frozen=True)
class Example:
    rows: int = whole(8, "rows of a batch", low=1)
    width: int = whole(0, "width", low=2, high=9, also={0: "as wide as it is high"})
    seed: int = whole(0, "seed", high=MOST_SEED)
    rate: float = real(0.5, "rate", "[0, 1)")
    share: float = real(1.0, "share", "(0, 1]")
    scale: float = real(1.0, "scale", "(0, inf)")
    clip: float = real(1.0, "clip", "(0, inf)", also={0: "no limit"})
    bias: float = real(0.0, "bias")
    kind: Literal["a", "b"] = choice("a", "kind")
    fast: bool = switch(True, "fast")

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("rows", 0, "a whole number from 1 to 2^31 - 1"),
        ("rows", 2**31, "a whole number from 1 to 2^31 - 1"),
        ("rows", 2.0, "a whole number from 1 to 2^31 - 1"),
        ("rows", True, "a whole number from 1 to 2^31 - 1"),
        ("rows", "2", "a whole number from 1 to 2^31 - 1"),
        ("rows", None, "a whole number from 1 to 2^31 - 1"),
        ("rows", np.float32(2), "a whole number from 1 to 2^31 - 1"),
        ("width", 1, "a whole number from 2 to 9, or 0 (as wide as it is high)"),
        ("width", 10, "a whole number from 2 to 9, or 0 (as wide as it is high)"),
        ("seed", 2**32, "a whole number from 0 to 2^32 - 1"),
        ("rate", 1, "at least 0 and below 1"),
        ("rate", math.nan, "at least 0 and below 1"),
        ("rate", -0.1, "at least 0 and below 1"),
        ("rate", "0.5", "a number"),
        ("rate", True, "a number"),
        ("rate", None, "a number"),
        ("share", 0.0, "above 0 and at most 1"),
        ("scale", 0, "a finite number above 0"),
        ("scale", math.inf, "a finite number above 0"),
        ("scale", 10**400, "a finite number above 0"),
        ("clip", -1, "a finite number above 0, or 0 (no limit)"),
        ("bias", math.nan, "a finite number"),
        ("kind", "c", "one of a, b"),
        ("kind", None, "one of a, b"),
        ("fast", 1, "true or false"),
    ],
)
def test_refusals(name, value, limit):
    with pytest.raises(ConfigError) as error:
        Example(**{name: value})
    assert str(error.value) == f"{name} is {shown(value)}: it must be {limit}"
    assert error.value.field == name


@pytest.mark.parametrize(
    ("name", "value", "single"),
    [
        ("rate", 1 - 1e-9, "1"),
        ("scale", 1e-60, "0"),
        ("scale", 1e39, "inf"),
        ("bias", -1e39, "-inf"),
    ],
)
def test_what_a_device_would_round_beyond_a_limit(name, value, single):
    with pytest.raises(ConfigError, match=rf"^{name} is .*, which is {single} in float32: it must"):
        Example(**{name: value})


def test_values_just_inside_are_kept_as_they_are():
    edges = dict(rows=2**31 - 1, width=9, seed=2**32 - 1, rate=1 - 2**-24, scale=2.0**-126, clip=0)
    example = Example(**edges)
    assert {name: getattr(example, name) for name in edges} == edges
    assert Example(width=0, rate=0, share=1, bias=-3e38).width == 0
    several = Example(rows=np.int64(3), rate=np.float32(0.5), clip=1)
    assert [type(x) for x in (several.rows, several.rate, several.clip)] == [int, float, float]


def test_help_says_what_other_values_mean():
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(Example)}
    assert helps["width"] == "width; 0: as wide as it is high"
    assert helps["rows"] == "rows of a batch"


def test_values_in_sentences_are_short_and_plain():
    assert shown("a\x1b]0;x\x07") == r"'a\x1b]0;x\x07'"
    assert len(shown("x" * 10_000)) == 100 and shown("x" * 10_000).endswith("xxx'")
    assert shown(10**5000) == "a number of thousands of digits"
    assert cut("abcdefghij", 7) == "ab...ij" and cut("abc", 3) == "abc"
    assert plain("naïve\u202e\n\udcff 中") == r"naïve\u202e\n\udcff 中"
