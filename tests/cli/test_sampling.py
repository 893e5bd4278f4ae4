"""Options for sampling: every field of `SamplingParams` is one, and means the same."""

import dataclasses

import pytest

from transformer_vq import SamplingParams
from transformer_vq.cli.draw import Draw
from transformer_vq.cli.parse import options
from transformer_vq.cli.sample import Sample
from transformer_vq.cli.sampling import sampling_values

GIVEN = {
    "max_tokens": (["9"], 9),
    "temperature": (["0.5"], 0.5),
    "top_k": (["4"], 4),
    "top_p": (["0.9"], 0.9),
    "min_p": (["0.1"], 0.1),
    "typical_p": (["0.7"], 0.7),
    "repetition_penalty": (["1.5"], 1.5),
    "presence_penalty": (["-1"], -1.0),
    "frequency_penalty": (["2"], 2.0),
    "logit_bias": (["3", "-inf", "--logit-bias", "4", "2.5"], {3: -float("inf"), 4: 2.5}),
    "allowed_tokens": (["1", "2"], (1, 2)),
    "banned_tokens": (["7"], (7,)),
    "min_tokens": (["5"], 5),
    "stop": (["a", "--stop", "b"], ("a", "b")),
    "seed": (["8"], 8),
    "logprobs": ([], True),
}
TEXT_ONLY = {"max_tokens", "min_tokens", "stop", "logprobs"}


def test_no_field_is_left_out():
    fields = {f.name for f in dataclasses.fields(SamplingParams)}
    assert fields == GIVEN.keys()
    assert fields == sampling_values(Sample("x").sampling).keys()
    assert fields - TEXT_ONLY == sampling_values(Draw("x").sampling).keys()


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_sets_its_field(name):
    words, value = GIVEN[name]
    arguments = ["--run", "x", f"--{name.replace('_', '-')}", *words]
    values = sampling_values(options(Sample, "sample", arguments).sampling)
    assert values[name] == value
    usual = sampling_values(Sample("x").sampling)
    assert values == {**usual, name: value} and usual[name] != value
    assert getattr(SamplingParams(**values), name) == value


def test_what_is_not_given_is_the_default():
    usual = sampling_values(Sample("x").sampling)
    assert SamplingParams(**usual) == SamplingParams(max_tokens=256)
