"""Parameters of a request: what is taken, how it is kept, and what is refused."""

import math
import re

import numpy as np
import pytest

from transformer_vq import (
    SamplingParams,
)
from transformer_vq.errors import ConfigError, shown


def test_sequences_of_stops():
    given = ["01", b"2", 5, [6, 7], np.int32(8), "é"]
    params = SamplingParams(stop=given)
    expected = [(48, 49), (50,), (5,), (6, 7), (8,), (195, 169)]
    assert params.stop_sequences() == expected
    assert params.stop_tokens() == [50, 5, 8]
    for text in ("ab", b"ab"):
        assert SamplingParams(stop=text).stop_sequences() == [(97, 98)]


WRONG = {  # parameter: values that make no sense, and the sentence
    "max_tokens": (
        (0, -1, 1.5, True, 2**31, "5", None),
        r"max_tokens is {}: it must be a whole number from 1 to 2\^31 - 1",
    ),
    "top_k": (
        (-1, 0.5, 2**31, 10**5000),
        r"top_k is {}: it must be a whole number from 0 to 2\^31 - 1",
    ),
    "min_tokens": ((-1, 2.0), "min_tokens is {}: it must be a whole number from 0 to"),
    "temperature": (
        (-0.1, math.inf, math.nan, 10**400),
        "temperature is {}: it must be a finite number, 0 or more",
    ),
    "top_p": ((0, 0.0, -1, 1.5, math.nan), "top_p is {}: it must be above 0 and at most 1"),
    "typical_p": ((0, 1.1, math.nan), "typical_p is {}: it must be above 0 and at most 1"),
    "min_p": ((-0.1, 1.1, math.nan), "min_p is {}: it must be"),
    "repetition_penalty": (
        (0, -1, math.inf),
        "repetition_penalty is {}: it must be a finite numbe",
    ),
    "presence_penalty": ((math.inf, math.nan), "presence_penalty is {}: it must be a finite nu"),
    "frequency_penalty": ((-math.inf,), "frequency_penalty is {}: it must be a finite number"),
    "seed": ((-1, 2**63, 0.5, True), r"seed is {}: it must be a whole number from 0 to 2\^63 - 1"),
    "logprobs": (("yes", 1), "logprobs is {}: it must be true or false"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parameters_that_make_no_sense(name):
    values, sentence = WRONG[name]
    for value in values:
        with pytest.raises(ConfigError, match=sentence.format(re.escape(shown(value)))) as refused:
            SamplingParams(**{name: value})
        assert refused.value.field == name


def test_too_many_stop_tokens():
    SamplingParams(stop=[*range(8), [1, 2]])
    with pytest.raises(ValueError, match="there are 9 stop tokens: at most 8 fit"):
        SamplingParams(stop=range(9))
