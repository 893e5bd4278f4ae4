"""Requests in batches: each as if it were alone, token by token as it comes."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.plain import (
    BATCH,
    EXTEND,
    FULL,
    LENGTH,
    MODEL,
    empty_state,
    log_softmax,
    make_model,
    padded,
    plain_generate,
    prompts_and_seeds,
    random_request,
)
from transformer_vq import (
    Model,
    SamplingParams,
    Token,
    generate,
    init_state,
    stream,
)
from transformer_vq.engine.batch import Session
from transformer_vq.errors import UserError


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        pytest.param(
            make_model(head_type="mqa", use_cache=False, absolute_positions=True),
            marks=pytest.mark.slow,
        ),
        FULL,
    ],
    ids=["shga", "mqa", "full"],
)
def test_greedy(model):
    """Prompts of different lengths, each continued with the best token."""
    prompts, _ = prompts_and_seeds()
    params = [
        SamplingParams(temperature=0, max_tokens=n, repetition_penalty=1 + row % 2)
        for row, n in enumerate((1, 2, 33, 40, 40, 40, 50, 64))
    ]
    outputs = generate(model, prompts, params, empty_state(model))
    assert outputs == plain_generate(model, prompts, params)
    assert [len(x) for x in outputs] == [p.max_tokens for p in params]
    assert len({token for x in outputs for token in x}) > 8  # control: not one token for ever


def test_seeds():
    """Every bit of a seed counts; equal requests are equal wherever they stand."""
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, np.int32(1), np.uint64(2**32)]
    outputs = generate(MODEL, [[5]] * 8, [SamplingParams(max_tokens=12, seed=s) for s in seeds])
    assert len({tuple(x) for x in outputs[:6]}) == 6
    assert outputs[6] == outputs[1] and outputs[7] == outputs[3]


def run(requests):
    """For each request its tokens with their log-probabilities, and the state that is left."""
    session = Session(MODEL, [prompt for prompt, _ in requests], [p for _, p in requests])
    outputs = [[] for _ in requests]
    for token in session:
        outputs[token.row].append((int(token), token.logprob))
    leaves = [np.asarray(x) for x in jax.tree.leaves(session.state)]
    return [(output, [x[row] for x in leaves]) for row, output in enumerate(outputs)]


def test_a_request_is_alone():
    """Tokens, log-probabilities and the state left behind: exactly those of the request alone.

    Alone is the same program with seven rows that hardly do anything. Over mixes of random
    requests in random places, prompts from one token to several prefill pieces.
    """
    rng = np.random.default_rng(2)
    requests = [random_request(rng) for _ in range(40)]
    filler = ([0], SamplingParams(max_tokens=1))
    alone = [run([request] + [filler] * (BATCH - 1))[0] for request in requests]
    assert len({tuple(t for t, _ in tokens) for tokens, _ in alone}) > 33  # control
    for _ in range(80):
        chosen = rng.choice(len(requests), rng.choice([5, 6, 7, 8, 8]))  # 5 to 7 rows are padded
        for i, (tokens, leaves) in zip(chosen, run([requests[i] for i in chosen]), strict=True):
            assert tokens == alone[i][0]
            assert all(np.array_equal(a, b) for a, b in zip(leaves, alone[i][1], strict=True))


def test_log_probabilities():
    """Those of the model itself, whatever the controls; the best ones first."""
    prompts, params = prompts_and_seeds(seed=8, max_tokens=35)
    params = [dataclasses.replace(p, logprobs=i != 2) for i, p in enumerate(params)]
    params[0] = dataclasses.replace(params[0], temperature=0.3, banned_tokens=range(30))
    outputs = [[] for _ in prompts]
    for token in stream(MODEL, prompts, params):
        outputs[token.row].append(token)
    tokens, lengths = padded([[*p, *o] for p, o in zip(prompts, outputs, strict=True)], LENGTH)
    logits, _ = EXTEND(MODEL, empty_state(MODEL), tokens, lengths=lengths)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        assert len(output) == 35
        for i, token in enumerate(output):
            if row == 2:
                assert token.logprob is None and token.top_logprobs is None
                continue
            expected = log_softmax(logits[row, len(prompt) + i - 1])
            assert token.logprob == pytest.approx(expected[token], abs=1e-4)
            best = token.top_logprobs
            assert len(best) == 20 and list(best.values()) == sorted(best.values(), reverse=True)
            assert set(best) == set(np.argsort(-expected)[:20].tolist())
            for other, value in best.items():
                assert value == pytest.approx(expected[other], abs=1e-4)
    # Asking for them changes no token.
    assert outputs == generate(
        MODEL, prompts, [dataclasses.replace(p, logprobs=False) for p in params]
    )


def test_stream():
    """As they come: step by step, rows in order, long before the last; and what they are."""
    prompts, params = prompts_and_seeds(seed=9, max_tokens=40)
    params[1] = dataclasses.replace(params[1], max_tokens=3)
    tokens = list(stream(MODEL, prompts, params))
    steps = [[row for row in range(8) if step < params[row].max_tokens] for step in range(40)]
    assert [t.row for t in tokens] == list(itertools.chain(*steps))
    assert [[int(t) for t in tokens if t.row == row] for row in range(8)] == generate(
        MODEL, prompts, params
    )
    token = tokens[0]
    assert type(token) is Token and isinstance(token, int)
    assert token.logprob is None and token.top_logprobs is None
    assert json.dumps([token]) == f"[{int(token)}]" and f"{token:d}" == str(int(token))

    endless = stream(MODEL, prompts, SamplingParams(max_tokens=2**31 - 1))
    head = list(itertools.islice(endless, 8 * 70))
    endless.close()
    assert [t.row for t in head] == list(range(8)) * 70


def many_requests(count, **fields):
    """More requests than slots, of all kinds; the first one is the longest."""
    rng = np.random.default_rng(3)
    drawn = [random_request(rng) for _ in range(count)]
    params = [dataclasses.replace(p, **fields) for _, p in drawn]
    params[0] = dataclasses.replace(params[0], max_tokens=300, stop=())
    return [prompt for prompt, _ in drawn], params


def test_more_requests_than_slots():
    """The next one joins where one has ended, while others go on; the same to the bit in any order,
    and the tokens of a batch of all."""
    prompts, params = many_requests(20, logprobs=True)
    tokens = list(stream(MODEL, prompts, params, slots=BATCH))
    assert 19 in [t.row for t in tokens] and tokens[-1].row == 0
    found = [[(int(t), t.logprob) for t in tokens if t.row == row] for row in range(20)]
    back = list(stream(MODEL, prompts[::-1], params[::-1], slots=BATCH))
    assert found == [[(int(t), t.logprob) for t in back if t.row == 19 - row] for row in range(20)]
    whole = generate(MODEL, prompts[:BATCH], params[:BATCH])
    assert [[t for t, _ in row] for row in found[:BATCH]] == whole
    one = generate(MODEL, prompts, params[1], slots=5)  # rounded up to the same eight
    assert one[1] == generate(MODEL, prompts[1:9], params[1])[0]


@pytest.mark.parametrize(
    "model", [MODEL, pytest.param(FULL, marks=pytest.mark.slow)], ids=["shga", "full"]
)
def test_more_requests_than_slots_go_on_from_states(model):
    """Each from its own row, or all from one; where there is no room, that is said before."""
    tokens, lengths = padded([[i] * 3 for i in range(8)], LENGTH)
    _, state = EXTEND(model, empty_state(model), tokens, lengths=lengths)
    states = jax.tree.map(lambda x: jnp.concatenate([x, x[1:2]]), state)
    params = [SamplingParams(max_tokens=5 + i, seed=i) for i in range(9)]
    prompts = [[]] * 9
    whole = generate(model, [[i] * 3 for i in (*range(8), 1)], params)
    assert generate(model, prompts, params, states, slots=8) == whole
    forked = generate(model, prompts, params, jax.tree.map(lambda x: x[:1], state), slots=8)
    assert forked[0] == whole[0] and forked[1] != whole[1]
    if model is FULL:
        long = [*params[:8], SamplingParams(max_tokens=LENGTH)]
        with pytest.raises(ValueError, match=f"would reach {LENGTH + 3} tokens"):
            generate(model, prompts, long, state=jax.tree.map(lambda x: x[:1], state), slots=8)


def test_what_slots_cannot_do():
    with pytest.raises(UserError, match="slots is 0: it must be at least 1"):
        generate(MODEL, [[1]] * 3, slots=0)
    with pytest.raises(UserError, match=r"slots is 1\.5: it must be a whole number"):
        generate(MODEL, [[1]] * 3, slots=1.5)
    session = Session(MODEL, [[1]] * 9, SamplingParams(max_tokens=2), slots=np.int64(8))
    assert len(list(session)) == 18
    with pytest.raises(UserError, match=r"9 requests in 8 slots, so the states .* leave slots out"):
        session.state  # noqa: B018


def test_a_model_of_no_numbers():
    """All that is sound comes, and then what is wrong."""
    params = {**MODEL.params, "embedding": MODEL.params["embedding"].at[7].set(jnp.nan)}
    bad = Model(params, MODEL.codebook, MODEL.config)
    never = SamplingParams(max_tokens=4, banned_tokens=[7])
    tokens = stream(bad, [[1], [7], [2], *[[3]] * 5], never)
    rows = list(itertools.islice(tokens, 7 * 4))
    assert sorted(t.row for t in rows) == sorted(
        [*[0] * 4, *[i for i in range(2, 8) for _ in "abcd"]]
    )
    with pytest.raises(UserError, match="request 1 ends early: the model gives no probabilities"):
        next(tokens)


def make(**fields):
    return SamplingParams(**{"max_tokens": 2, **fields})


REFUSED = {
    "there are no prompts: give at least one": lambda: ([], None),
    "prompt 1 is empty and there is no state to continue": lambda: ([[1], []], None),
    "there are 2 params for 3 prompts: give one, or 3": lambda: ([[1]] * 3, [make()] * 2),
    "prompt 1 has the token 64, outside of the vocabulary: tokens go from 0 to 63": lambda: (
        [[1], [2, 64]],
        None,
    ),
    "prompt 0 has the token -1, outside": lambda: ([[-1]], None),
    "stop has the token 97, outside": lambda: ([[1]], make(stop="a")),
    "logit_bias has the token 99, outside": lambda: ([[1]], make(logit_bias={99: 1.0})),
    "banned_tokens has the token -2, outside": lambda: ([[1]], make(banned_tokens=[-2])),
    "allowed_tokens has the token 64, outside": lambda: ([[1]], make(allowed_tokens=[1, 64])),
    "no token can be drawn: allow one that is not banned": lambda: (
        [[1]],
        make(allowed_tokens=[1], banned_tokens=[1]),
    ),
    "no token can be drawn": lambda: ([[1]], make(allowed_tokens=[])),
    "no token can be drawn: .*": lambda: ([[1]], make(banned_tokens=range(64))),
    "no token can be drawn: .* nor a stop before min_tokens": lambda: (
        [[1]],
        make(allowed_tokens=[3, 4], stop=[3, 4], min_tokens=1),
    ),
    "there are 2 params for 1 prompt: give one$": lambda: ([[1]], [make()] * 2),
    "the state has 2 rows for 1 prompt: 1 is needed": lambda: (
        [[1]],
        None,
        init_state(MODEL.config, 2),
    ),
    "the state has 2 rows for 3 prompts: 1 or 3 are needed": lambda: (
        [[1]] * 3,
        None,
        init_state(MODEL.config, 2),
    ),
    "prompt 0 is empty and there is no state": lambda: ([[]], None, init_state(MODEL.config, 1)),
}


@pytest.mark.parametrize("sentence", REFUSED)
@pytest.mark.parametrize("function", [generate, stream])
def test_requests_that_make_no_sense(function, sentence):
    """Refused when the function is called, not when the first token is asked for."""
    with pytest.raises(ValueError, match=sentence):
        function(MODEL, *REFUSED[sentence]())
