"""Parameters of a request: what is taken, how it is kept, and what is refused."""

import dataclasses
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from transformer_vq import (
    SamplingParams,
)
from transformer_vq.errors import ConfigError, UserError, shown


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


ODD = {  # values that float32 does not have, and things that are not what they are wanted for
    "temperature": [(1e39, "temperature is 1e+39, which is inf in float32"), ("1", "a number")],
    "top_p": [(1e-50, "which is 0 in float32: it must be above 0"), (True, "must be a number")],
    "repetition_penalty": [(1e39, "which is inf in float32"), (1e-50, "which is 0 in float32")],
    "presence_penalty": [(-1e39, "presence_penalty is -1e+39, which is -inf in float32")],
    "frequency_penalty": [(-1e39, "frequency_penalty is -1e+39, which is -inf in float32")],
    "logit_bias": [
        ([1, 2], "logit_bias is [1, 2]: it must be a dictionary"),
        ({1: math.nan}, "logit_bias is nan for 1: it must be a number below 1e+09"),
        ({1: 10**400}, "it must be a number below 1e+09"),
        ({1: "x"}, "logit_bias is 'x' for 1: it must be a number"),
        ({"1": 1.0}, "logit_bias has '1': tokens are whole numbers"),
    ],
    "allowed_tokens": [
        ([1.5], "allowed_tokens has 1.5: tokens are whole numbers"),
        ([True], "allowed_tokens has True: tokens are whole numbers"),
        (5, "allowed_tokens is 5: it must be a list of tokens"),
    ],
    "banned_tokens": [([None], "banned_tokens has None"), ("ab", "banned_tokens is 'ab'")],
    "stop": [
        (5, "stop is 5: it must be a list of tokens, lists of tokens and texts"),
        ({1: 2}, "stop is {1: 2}: it must be a list"),
        ([1.5], "stop has 1.5: tokens are whole numbers"),
        ([[True]], "stop has True: tokens are whole numbers"),
        ("", "a stop sequence is empty"),
        ([[]], "a stop sequence is empty"),
        ("\ud800", "half a character"),
    ],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_parameters(name):
    for value, sentence in ODD[name]:
        with pytest.raises(UserError, match=re.escape(sentence)):
            SamplingParams(**{name: value})


def test_parameters_are_kept_as_pythons_own():
    """Whatever library they came from; what can be read only once is read once."""
    params = SamplingParams(
        max_tokens=np.int64(3),
        temperature=np.float32(0.5),
        seed=np.uint64(2**63 - 1),
        logit_bias={np.int32(1): np.float32(2), 2: -(10**400)},
        allowed_tokens=np.asarray([5, 6]),
        banned_tokens=(i for i in (1, 2)),
        stop=(i for i in (3, [4, 5])),
    )
    assert params == SamplingParams(
        max_tokens=3,
        temperature=0.5,
        seed=2**63 - 1,
        logit_bias={1: 2.0, 2: -math.inf},
        allowed_tokens=(5, 6),
        banned_tokens=(1, 2),
        stop=(3, [4, 5]),
    )
    assert params.stop_sequences() == params.stop_sequences() == [(3,), (4, 5)]
    assert type(params.max_tokens) is int and type(params.temperature) is float


def test_every_parameter_has_a_help_text():
    assert all(field.metadata["help"] for field in dataclasses.fields(SamplingParams))


def test_requests_are_known_without_jax():
    program = (
        "import sys, transformer_vq.engine.output, transformer_vq.engine.request; "
        "assert 'jax' not in sys.modules; import transformer_vq.engine.batch; "
        "assert 'jax' in sys.modules"  # control
    )
    subprocess.run([sys.executable, "-c", program], check=True)
