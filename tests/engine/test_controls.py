"""Controls: `generate` against a slow loop that starts from scratch for every token."""

import math

import numpy as np
import pytest

from tests.engine.plain import (
    MODEL,
    plain_generate,
    prompts_and_seeds,
)
from transformer_vq import (
    SamplingParams,
    generate,
)

FILTERS = [
    dict(),
    dict(temperature=0.6),
    dict(top_k=3),
    dict(top_p=0.6),
    dict(min_p=0.3),
    dict(typical_p=0.4),
    dict(temperature=1.4, top_k=20, top_p=0.9, min_p=0.02, typical_p=0.95),
    dict(temperature=2.5, top_k=6),
]


HISTORIES = [
    dict(repetition_penalty=3.0),
    dict(repetition_penalty=0.4, top_p=0.9),
    dict(presence_penalty=2.0, frequency_penalty=0.7),
    dict(presence_penalty=-1.0, frequency_penalty=-0.3, top_k=5),
    dict(logit_bias={3: 4.0, 7: -2.0, 9: -math.inf}),
    dict(allowed_tokens=[4, 8, 15, 16, 23, 42], banned_tokens=[8], repetition_penalty=1.5),
    dict(banned_tokens=range(2, 64), presence_penalty=0.5),
    dict(allowed_tokens=np.asarray([5]), temperature=9.0),
]


ORDERS = [  # two filters that would keep other tokens the other way round
    dict(top_p=0.5, typical_p=0.5),
    dict(min_p=0.4, typical_p=0.4),
    dict(top_k=4, typical_p=0.5),
    dict(top_k=4, top_p=0.7),
    dict(top_p=0.7, min_p=0.5, typical_p=0.7),
    dict(temperature=0.5, top_p=0.7),
    dict(temperature=0.5, repetition_penalty=1.8, top_p=0.8),
    dict(repetition_penalty=2.0, presence_penalty=1.5, top_k=3),
]


@pytest.mark.parametrize(
    "fields", [FILTERS, HISTORIES, ORDERS], ids=["filters", "histories", "orders"]
)
def test_every_control(fields):
    """Each row its own controls, in one batch: the tokens of the slow loop with the same keys."""
    prompts, _ = prompts_and_seeds(seed=1)
    params = [
        SamplingParams(max_tokens=40, seed=10 + i + (i << 35), **f) for i, f in enumerate(fields)
    ]
    outputs = generate(MODEL, prompts, params)
    assert outputs == plain_generate(MODEL, prompts, params)
    # Control: every row has controls that matter, but the first of the filters.
    free = generate(MODEL, prompts, [SamplingParams(max_tokens=40, seed=p.seed) for p in params])
    assert [a == b for a, b in zip(outputs, free, strict=True)] == [not f for f in fields]


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=3e38),
        dict(temperature=1e-38),
        dict(repetition_penalty=1e-9),
        dict(repetition_penalty=1e30, presence_penalty=1e30),
        dict(frequency_penalty=-1e30, temperature=1e5),
        dict(top_p=1 - 1e-7, min_p=1e-30, typical_p=1 - 1e-7, top_k=2**31 - 1),
        dict(top_p=1e-30, min_p=1, typical_p=1e-30),
        dict(logit_bias={0: -1e30, 1: -math.inf, 2: -1e8}),
    ],
    ids=str,
)
def test_banned_tokens_stay_banned(fields):
    """Whatever the other controls do to the logits."""
    params = SamplingParams(banned_tokens=range(3, 64), max_tokens=20, **fields)
    for output in generate(MODEL, [[1], [2], [9, 9], [4]] * 2, params):
        assert set(output) <= {0, 1, 2} and len(output) == 20
