"""Requests: `generate` against a slow loop that starts from scratch for every token."""

import dataclasses
import functools
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq import (
    Model,
    ModelConfig,
    SamplingParams,
    Token,
    extend,
    generate,
    init_state,
    load_state,
    save_state,
    stream,
)
from transformer_vq.engine.batch import STEPS_PER_DISPATCH, Session
from transformer_vq.engine.prefill import PREFILL_SIZES
from transformer_vq.errors import ConfigError, shown
from transformer_vq.nn.model import model_specs

BATCH = 8  # the one batch shape of these tests: each shape is compiled
LENGTH = 96  # the longest sequence of the slow loop
VOCAB = 64  # so that digits and spaces are tokens

SIZES = dict(
    vocab_size=VOCAB,
    d_model=16,
    d_k=8,
    num_layers=1,
    codebook_size=6,
    window_len=7,
    block_len=32,
)


@functools.cache
def make_model(**fields):
    """A model of random numbers, made without a compilation; its predictions are not flat."""
    config = ModelConfig(**{**SIZES, **fields})
    rng = np.random.default_rng(0)

    def numbers(spec):
        if spec.init == "ones":
            return jnp.ones(spec.shape)
        return jnp.asarray(spec.scale * rng.normal(size=spec.shape), jnp.float32)

    params, codebook = jax.tree.map(numbers, model_specs(config))
    return Model({**params, "w_out": 1.5 * params["w_out"]}, codebook, config)


MODEL = make_model()
FULL = make_model(attention="full")
EXTEND = jax.jit(extend)


def padded(sequences, length):
    tokens = np.zeros((BATCH, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    lengths = np.zeros(BATCH, np.int32)
    lengths[: len(sequences)] = [len(s) for s in sequences]
    return tokens, lengths


def logits_after(model, sequences):
    """What follows each sequence, from scratch: `[rows, vocab]`."""
    tokens, lengths = padded(sequences, LENGTH)
    logits, _ = EXTEND(model, empty_state(model), tokens, lengths=lengths)
    return np.stack([logits[row, len(s) - 1] for row, s in enumerate(sequences)])


def log_softmax(logits):
    x = np.float64(logits) - np.float64(logits).max()
    return x - np.log(np.exp(x).sum())


def plain_filters(logits, prompt, output, p):
    """All controls, one row, by lists and sorts; a token that may not be drawn gets -inf."""
    x = np.float64(logits)
    for token, value in p.logit_bias.items():
        x[token] += value
    banned = set(p.banned_tokens)
    if p.allowed_tokens is not None:
        banned |= set(range(VOCAB)) - set(p.allowed_tokens)
    if len(output) < p.min_tokens:
        banned |= set(p.stop_tokens())
    for token in {*prompt, *output}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else (
            x[token] * p.repetition_penalty
        )  # fmt: skip
    for token in set(output):
        x[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    x[list(banned)] = -np.inf
    if p.temperature == 0:
        return np.where(np.arange(VOCAB) == x.argmax(), x, -np.inf)
    x /= p.temperature
    if p.top_k:
        x[x < np.sort(x)[-min(p.top_k, VOCAB)]] = -np.inf
    if p.top_p < 1:
        order = np.argsort(-x)
        mass = np.exp(log_softmax(x))[order]
        x[order[np.cumsum(mass) - mass >= p.top_p]] = -np.inf
    if p.min_p:
        mass = np.exp(log_softmax(x))
        x[mass < p.min_p * mass.max()] = -np.inf
    if p.typical_p < 1:
        log_p = log_softmax(x)
        mass = np.exp(log_p)
        entropy = -(mass[mass > 0] * log_p[mass > 0]).sum()
        order = np.argsort(np.abs(-log_p - entropy))
        mass = mass[order]
        x[order[np.cumsum(mass) - mass >= p.typical_p]] = -np.inf
    return x


def noise(seed, position):
    data = jnp.asarray([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(data), position)
    return np.asarray(jax.random.gumbel(key, (VOCAB,), jnp.float32))


def ends(output, p):
    """Length of the output without the stop sequence that it ends with; None without one."""
    for stop in p.stop_sequences():
        rest = len(output) - len(stop)
        if rest >= p.min_tokens and tuple(output[rest:]) == stop:
            return rest
    return None


def plain_generate(model, prompts, params):
    """The same requests as `generate`, one token at a time, each from scratch."""
    outputs = [[] for _ in prompts]
    done = [False] * len(prompts)
    while not all(done):
        logits = logits_after(model, [[*a, *b] for a, b in zip(prompts, outputs, strict=True)])
        for row, (prompt, output, p) in enumerate(zip(prompts, outputs, params, strict=True)):
            if done[row]:
                continue
            x = plain_filters(logits[row], prompt, output, p)
            output.append(int(np.argmax(x + noise(p.seed, len(prompt) + len(output)))))
            rest = ends(output, p)
            if rest is not None:
                del output[rest:]
            done[row] = rest is not None or len(output) == p.max_tokens
    return outputs


def random_prompt(rng, longest=16):
    return rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist()


def prompts_and_seeds(count=BATCH, seed=0, longest=16, **fields):
    rng = np.random.default_rng(seed)
    prompts = [random_prompt(rng, longest) for _ in range(count)]
    return prompts, [SamplingParams(seed=row, **fields) for row in range(count)]


def empty_state(model, rows=BATCH):
    """Always of the same capacity: each is compiled."""
    capacity = LENGTH if model.config.attention == "full" else None
    return init_state(model.config, rows, capacity=capacity)


# ---------------------------------------------------------------- against the slow loop


@pytest.mark.parametrize(
    "model",
    [MODEL, make_model(head_type="mqa", use_cache=False, absolute_positions=True), FULL],
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


def test_seeds():
    """Every bit of a seed counts; equal requests are equal wherever they stand."""
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, np.int32(1), np.uint64(2**32)]
    outputs = generate(MODEL, [[5]] * 8, [SamplingParams(max_tokens=12, seed=s) for s in seeds])
    assert len({tuple(x) for x in outputs[:6]}) == 6
    assert outputs[6] == outputs[1] and outputs[7] == outputs[3]


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


# ---------------------------------------------------------------- nothing else in the batch


def random_request(rng):
    def choose(*values):
        return values[rng.integers(len(values))]

    longest = choose(3, 16, 16, 40, 150)
    params = SamplingParams(
        max_tokens=int(choose(1, 5, 20, 33)),
        temperature=choose(0.0, 0.7, 1.0, 1.0, 1.8),
        top_k=choose(0, 0, 5),
        top_p=choose(1.0, 1.0, 0.9, 0.5),
        min_p=choose(0.0, 0.0, 0.1),
        typical_p=choose(1.0, 1.0, 0.8),
        repetition_penalty=choose(1.0, 1.0, 1.4),
        presence_penalty=choose(0.0, 0.0, 0.5),
        frequency_penalty=choose(0.0, 0.0, 0.2),
        logit_bias=choose({}, {}, {4: 1.0}),
        banned_tokens=choose((), (), (1, 2)),
        min_tokens=choose(0, 0, 4),
        stop=choose((), (), (7, 8), ([9], [3, 4])),
        logprobs=choose(False, False, False, True),
        seed=int(rng.integers(0, 2**63)),
    )
    return random_prompt(rng, longest), params


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
    requests = [random_request(rng) for _ in range(60)]
    filler = ([0], SamplingParams(max_tokens=1))
    alone = [run([request] + [filler] * (BATCH - 1))[0] for request in requests]
    assert len({tuple(t for t, _ in tokens) for tokens, _ in alone}) > 50  # control
    for _ in range(200):
        chosen = rng.choice(len(requests), rng.choice([5, 6, 7, 8, 8]))  # 5 to 7 rows are padded
        for i, (tokens, leaves) in zip(chosen, run([requests[i] for i in chosen]), strict=True):
            assert tokens == alone[i][0]
            assert all(np.array_equal(a, b) for a, b in zip(leaves, alone[i][1], strict=True))


def test_ragged_prompts():
    """Prompts of one token to several of the largest prefill pieces, each as if it were alone.

    The state after reading is that of `extend` in small pieces.
    """
    rng = np.random.default_rng(3)
    small, middle, large = PREFILL_SIZES
    lengths = [1, small, small + 1, middle + 1, large, large + 1, 2 * large + small, 2500]
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in lengths]
    session = Session(MODEL, prompts, SamplingParams(max_tokens=1))
    session.read_prompts()
    state = empty_state(MODEL)
    for start in range(0, 2500, LENGTH):
        tokens, counts = padded([p[start : start + LENGTH] for p in prompts], LENGTH)
        _, state = EXTEND(MODEL, state, tokens, lengths=counts)
    assert session.state.position.tolist() == lengths
    np.testing.assert_allclose(session.state.logits, state.logits, atol=1e-4)
    for mine, plain in zip(session.state.units, state.units, strict=True):
        np.testing.assert_array_equal(mine.counts, plain.counts)
        np.testing.assert_allclose(mine.values, plain.values, atol=1e-4)
    other = Session(MODEL, [prompts[7], *[[3]] * 7], SamplingParams(max_tokens=1))
    other.read_prompts()
    assert np.array_equal(other.state.logits[0], session.state.logits[7])


# ---------------------------------------------------------------- states


def test_fork():
    """One state serves all requests; what it was made of need not be read again."""
    rng = np.random.default_rng(4)
    book = random_prompt(rng)
    tokens, lengths = padded([book], LENGTH)
    _, state = EXTEND(MODEL, empty_state(MODEL), tokens, lengths=lengths)
    one = jax.tree.map(lambda x: x[:1], state)
    prompts = [[], [], [], [1], [1, 2, 3], [4], [], [5]]
    params = [SamplingParams(seed=i // 2, max_tokens=20) for i in range(8)]
    before = jax.device_get(jax.tree.leaves(one))
    forked = generate(MODEL, prompts, params, one)
    assert forked == generate(MODEL, [book + p for p in prompts], params)
    assert forked[0] == forked[1] != forked[2]
    assert generate(MODEL, prompts, params, one) == forked  # the state itself is left as it is
    for a, b in zip(before, jax.tree.leaves(one), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("cut", [1, 7, STEPS_PER_DISPATCH, STEPS_PER_DISPATCH + 1])
def test_continue(cut, tmp_path):
    """From the state that a session left, also by way of a file: the tokens of an unbroken run."""
    prompts, params = prompts_and_seeds(seed=5, max_tokens=40, top_p=0.9)
    unbroken = generate(MODEL, prompts, params)
    session = Session(MODEL, prompts, [dataclasses.replace(p, max_tokens=cut) for p in params])
    first = [[] for _ in prompts]
    for token in session:
        first[token.row].append(int(token))
    save_state(tmp_path / "state", session.state, MODEL)
    rest = [dataclasses.replace(p, max_tokens=40 - cut) for p in params]
    for state in (session.state, load_state(tmp_path / "state", MODEL)):
        second = generate(MODEL, [[]] * 8, rest, state)
        assert [a + b for a, b in zip(first, second, strict=True)] == unbroken
    # Given as prompts, those tokens say the same.
    given = [p + t for p, t in zip(prompts, first, strict=True)]
    assert generate(MODEL, given, rest) == second


def test_state_after_a_stop_token():
    """The stop token is not consumed: the state is ready for what comes in its place."""
    prompts, params = prompts_and_seeds(seed=6, max_tokens=40, stop=range(8))
    session = Session(MODEL, prompts, params)
    outputs = [[] for _ in prompts]
    for token in session:
        outputs[token.row].append(int(token))
    assert any(len(x) < 40 for x in outputs)  # control
    expected = logits_after(MODEL, [p + x for p, x in zip(prompts, outputs, strict=True)])
    np.testing.assert_allclose(session.state.logits, expected, atol=1e-4)


def test_a_state_taken_in_the_middle_is_a_copy():
    prompts, params = prompts_and_seeds(max_tokens=80)
    session = Session(MODEL, prompts, params)
    tokens = iter(session)
    next(tokens)
    state = session.state
    position = state.position.tolist()
    assert len(list(tokens)) == 8 * 80 - 1
    assert np.isfinite(state.units[0].values).all() and state.position.tolist() == position
    done = [n - len(p) for n, p in zip(position, prompts, strict=True)]
    assert done == [STEPS_PER_DISPATCH] * 8


# ---------------------------------------------------------------- stops


def test_stop_tokens():
    """At the first of them, which is not returned; not before `min_tokens`."""
    prompts, _ = prompts_and_seeds(seed=7)
    params = [
        SamplingParams(max_tokens=60, seed=i, stop=stop, min_tokens=low)
        for i, (stop, low) in enumerate(
            [(range(8), 0), (range(8, 16), 0), ((3,), 0), ([[5], [6]], 20),
             ("0123", 40), (list("45678"), 0), (b"9", 5), (range(4, 12), 33)]
        )
    ]  # fmt: skip
    outputs = generate(MODEL, prompts, params)
    assert outputs == plain_generate(MODEL, prompts, params)
    assert any(len(x) < 60 for x in outputs) and all(
        len(x) >= p.min_tokens for x, p in zip(outputs, params, strict=True)
    )


@functools.cache
def coin_flips():
    """Eight unbroken runs of two tokens, 80 long: whatever is repeated overlaps itself."""
    params = [SamplingParams(seed=i, max_tokens=80, allowed_tokens=COIN) for i in range(BATCH)]
    return generate(MODEL, [[1]] * BATCH, params)


COIN = (48, 49)  # "0" and "1"


def cut_short(tokens, p):
    """What is left of an unbroken run with the stop sequences of p."""
    for n in range(1, len(tokens) + 1):
        rest = ends(tokens[:n], p)
        if rest is not None:
            return tokens[:rest]
    return tokens


STOPS = st.lists(st.lists(st.sampled_from(COIN), min_size=2, max_size=7), min_size=1, max_size=3)


@settings(max_examples=40)
@given(st.lists(st.tuples(STOPS, st.integers(0, 40)), min_size=BATCH, max_size=BATCH))
def test_stop_sequences(rows):
    """Any sequences, that overlap themselves and each other and span dispatches."""
    params = [
        SamplingParams(seed=i, max_tokens=80, allowed_tokens=COIN, stop=stop, min_tokens=low)
        for i, (stop, low) in enumerate(rows)
    ]
    outputs = [[] for _ in rows]
    for token in stream(MODEL, [[1]] * BATCH, params):
        outputs[token.row].append(int(token))
        # Never more than the final output, at no moment.
        whole = cut_short(coin_flips()[token.row], params[token.row])
        assert len(outputs[token.row]) <= len(whole)
    expected = [cut_short(run, p) for run, p in zip(coin_flips(), params, strict=True)]
    assert outputs == expected


def test_stop_strings():
    """Text is its UTF-8 bytes; a beginning that repeats is not lost: "001" in "0001"."""
    runs = ["".join(map(chr, run)) for run in coin_flips()]
    stops = ["0001", "1110", "00101", "10011", "011", "1010", "00", "11"]
    assert any("0001" in run and "00001" in run for run in runs)  # control
    params = [
        SamplingParams(seed=i, max_tokens=80, allowed_tokens=COIN, stop=stop)
        for i, stop in enumerate(stops)
    ]
    outputs = generate(MODEL, [[1]] * BATCH, params)
    assert ["".join(map(chr, x)) for x in outputs] == [
        run.split(stop)[0] for run, stop in zip(runs, stops, strict=True)
    ]
    as_bytes = [dataclasses.replace(p, stop=[p.stop.encode()]) for p in params]
    as_lists = [dataclasses.replace(p, stop=[list(p.stop.encode())]) for p in params]
    assert generate(MODEL, [[1]] * BATCH, as_bytes) == outputs
    assert generate(MODEL, [[1]] * BATCH, as_lists) == outputs


def test_a_beginning_of_a_stop_is_given_out_at_the_end():
    """If `max_tokens`, or a stop token, comes before the rest of it."""
    run = coin_flips()[0]
    never = (*run[29:40], 1 - run[40])
    params = SamplingParams(max_tokens=40, allowed_tokens=COIN, stop=[[*run[29:40], 50]])
    assert generate(MODEL, [[1]] * BATCH, params)[0] == run[:40], never
    first = run.index(COIN[1])
    params = SamplingParams(max_tokens=40, allowed_tokens=COIN, stop=[COIN[1], [COIN[0]] * 9])
    assert generate(MODEL, [[1]] * BATCH, params)[0] == run[:first]


def test_stop_across_dispatches():
    """A sequence that begins in one dispatch and ends in the next is held back between them."""
    run = coin_flips()[3]
    edge = STEPS_PER_DISPATCH
    stop = run[edge - 6 : edge + 6]
    params = SamplingParams(seed=3, max_tokens=80, allowed_tokens=COIN, stop=[stop])
    expected = cut_short(run, params)
    assert len(expected) == edge - 6  # control: it is the first
    assert generate(MODEL, [[1]] * BATCH, params)[0] == expected


def test_sequences_of_stops():
    given = ["01", b"2", 5, [6, 7], np.int32(8), "é"]
    params = SamplingParams(stop=given)
    expected = [(48, 49), (50,), (5,), (6, 7), (8,), (195, 169)]
    assert params.stop_sequences() == expected
    assert params.stop_tokens() == [50, 5, 8]
    for text in ("ab", b"ab"):
        assert SamplingParams(stop=text).stop_sequences() == [(97, 98)]


# ---------------------------------------------------------------- what a token knows


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


def test_kinds_of_prompts():
    """Lists, tuples, bytes and arrays of the same tokens are the same prompt."""
    prompts = [[48, 49], (48, 49), b"01", np.asarray([48, 49]), jnp.asarray([48, 49])]
    outputs = generate(MODEL, prompts, SamplingParams(max_tokens=6))
    assert len({tuple(x) for x in outputs}) == 1
    assert all(type(token) is int for token in outputs[0])
    assert outputs[0] == generate(MODEL, [b"01"] * 8, SamplingParams(max_tokens=6))[5]
    assert len(generate(MODEL, [b"01"] * 8)[0]) == 128  # without parameters: the defaults


# ---------------------------------------------------------------- full attention


def test_full_attention_has_a_capacity():
    """Rows are counted one by one: one that is nearly full may ask for little."""
    tokens, lengths = padded([[1] * 18, [1], [2], [3], [4], [5], [6], [7]], LENGTH)
    _, state = EXTEND(FULL, empty_state(FULL), tokens, lengths=lengths)
    params = [SamplingParams(max_tokens=n) for n in (78, 95, 1, 1, 1, 1, 1, 1)]
    output = generate(FULL, [[]] * 8, params, state)
    assert [len(x) for x in output] == [p.max_tokens for p in params]
    params[0] = SamplingParams(max_tokens=79)
    sentence = f"would reach {LENGTH + 1} tokens.* holds {LENGTH}: make one with a larger capacity"
    with pytest.raises(ValueError, match=sentence):
        generate(FULL, [[]] * 8, params, state)
    params[0] = SamplingParams(max_tokens=78)
    with pytest.raises(ValueError, match=sentence):
        generate(FULL, [[5], *[[]] * 7], params, state)


def test_without_a_state_the_capacity_suffices():
    for need, capacity in ((3, 256), (256, 256), (257, 512), (5000, 8192)):
        session = Session(FULL, [[1, 2]], SamplingParams(max_tokens=need - 2))
        assert session.state.units[0].capacity == capacity


# ---------------------------------------------------------------- refusals

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


def test_an_empty_prompt_needs_its_own_row_of_the_state():
    tokens, lengths = padded([[1, 2], []], LENGTH)
    _, state = EXTEND(MODEL, empty_state(MODEL), tokens, lengths=lengths)
    params = SamplingParams(max_tokens=3)
    output = generate(MODEL, [[], *[[3]] * 7], params, state)
    assert output[0] == generate(MODEL, [[1, 2]] * 8, params)[0]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(MODEL, [[], [], *[[3]] * 6], params, state)
