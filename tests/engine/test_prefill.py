"""Prompts: what is taken for one, and the state that is left by reading it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.plain import (
    EXTEND,
    FULL,
    LENGTH,
    MODEL,
    VOCAB,
    empty_state,
    padded,
)
from transformer_vq import (
    SamplingParams,
    generate,
    init_state,
)
from transformer_vq.engine import prefill
from transformer_vq.engine.batch import Session
from transformer_vq.engine.prefill import PREFILL_SIZES, check_model, check_prompts, read
from transformer_vq.errors import UserError


def apart(logits):
    """How far each row is from the one before it, at least."""
    logits = np.asarray(logits)
    return np.abs(logits - np.roll(logits, 1, axis=0)).max(1).min()


def test_ragged_prompts():
    """Prompts of one token to several of the largest prefill pieces, each as if it were alone.

    The state after reading is that of `extend` in small pieces.
    """
    rng = np.random.default_rng(3)
    small, few, middle, large = PREFILL_SIZES
    lengths = [1, small + 1, few, 3 * few, middle + 1, large, large + 1, 2500]
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in lengths]
    session = Session(MODEL, prompts, SamplingParams(max_tokens=1))
    session.read_prompts()
    state = empty_state(MODEL)
    for start in range(0, 2500, LENGTH):
        tokens, counts = padded([p[start : start + LENGTH] for p in prompts], LENGTH)
        _, state = EXTEND(MODEL, state, tokens, lengths=counts)
    assert session.state.position.tolist() == lengths
    np.testing.assert_allclose(session.state.logits, state.logits, atol=1e-4)
    assert apart(session.state.logits) > 0.1  # control
    for mine, plain in zip(session.state.units, state.units, strict=True):
        np.testing.assert_array_equal(mine.counts, plain.counts)
        np.testing.assert_allclose(mine.values, plain.values, atol=1e-4)
    other = Session(MODEL, [prompts[7], *[[3]] * 7], SamplingParams(max_tokens=1))
    other.read_prompts()
    assert np.array_equal(other.state.logits[0], session.state.logits[7])


@pytest.mark.parametrize("largest", PREFILL_SIZES)
def test_chunks_of_a_prompt(largest):
    """Few, hardly padded, and full ones until less than the largest is left."""
    known = {1: [16], 48: [16] * 3, 49: [64], 193: [256], 512: [256] * 2, 769: [1024]}
    known[2500] = [1024, 1024, 256, 256]
    for length in (*known, *range(1, 1200)):
        left, sizes = length, []
        while left > 0:
            sizes.append(prefill.chunk_size(left, largest))
            left -= sizes[-1]
        assert sizes[: length // largest] == [largest] * (length // largest)
        assert sorted(sizes, reverse=True) == sizes and sizes[0] <= largest
        assert -left < max(16, length / 3)
        if largest == PREFILL_SIZES[-1]:
            assert sizes == known.get(length, sizes) and len(sizes) <= 10
    assert prefill.chunk_size(0) == 0


def test_kinds_of_prompts():
    """Lists, tuples, bytes and arrays of the same tokens are the same prompt."""
    prompts = [[48, 49], (48, 49), b"01", np.asarray([48, 49]), jnp.asarray([48, 49])]
    outputs = generate(MODEL, prompts, SamplingParams(max_tokens=6))
    assert len({tuple(x) for x in outputs}) == 1
    assert all(type(token) is int for token in outputs[0])
    assert outputs[0] == generate(MODEL, [b"01"] * 8, SamplingParams(max_tokens=6))[5]
    assert len(generate(MODEL, [b"01"] * 8)[0]) == 128  # without parameters: the defaults


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


def test_an_empty_prompt_needs_its_own_row_of_the_state():
    tokens, lengths = padded([[1, 2], []], LENGTH)
    _, state = EXTEND(MODEL, empty_state(MODEL), tokens, lengths=lengths)
    params = SamplingParams(max_tokens=3)
    output = generate(MODEL, [[], *[[3]] * 7], params, state)
    assert output[0] == generate(MODEL, [[1, 2]] * 8, params)[0]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(MODEL, [[], [], *[[3]] * 6], params, state)


def test_read():
    """The state after prompts is that of `extend`; it continues, it forks, and stays as it is."""
    prompts = [[1, 2, 3], [4] * 20, [5]]
    tokens, lengths = padded(prompts, LENGTH)
    _, state = EXTEND(MODEL, empty_state(MODEL), tokens, lengths=lengths)
    found = read(MODEL, None, prompts)
    np.testing.assert_allclose(found.logits, state.logits[:3], atol=1e-4)
    assert apart(found.logits) > 0.1  # control
    again = read(MODEL, read(MODEL, None, [[1]]), [[2, 3], [4], []])
    np.testing.assert_allclose(again.logits[0], found.logits[0], atol=1e-4)
    assert again.position.tolist() == [3, 2, 1] and found.position.tolist() == [3, 20, 1]


NO_PROMPTS = [
    ([1, 2, 3], "prompts is one prompt, [1, 2, 3]: give a list of them, [prompt]"),
    (b"Call me", "prompts is one prompt, b'Call me': give a list of them"),
    ("Call me", "prompts is one prompt, 'Call me': give a list of them"),
    (np.arange(3), "prompts is one prompt, array([0, 1, 2])"),
    (jnp.arange(3), "prompts is one prompt, Array([0, 1, 2]"),
    (["Call me"], "prompt 0 is text, and the 64 tokens of this model are not bytes: encode it"),
    ([[1], [1.5]], "prompt 1 has 1.5: tokens are whole numbers"),
    ([[True, False]], "prompt 0 has True: tokens are whole numbers"),
    (np.ones((1, 2)), "prompt 0 has 1.0: tokens are whole numbers"),
    ([[2**70]], f"prompt 0 has the token {2**70}, outside of the vocabulary"),
    ([[1], 5], "prompt 1 is 5: it must be a list of tokens"),
    ([{1, 2}], "prompt 0 is {1, 2}: a set has no order"),
    ([None], "prompt 0 is None: it must be a list of tokens"),
    (None, "prompts is None: it must be a list of prompts"),
    ({1: 2}, "prompts is {1: 2}: it must be a list of prompts"),
]


@pytest.mark.parametrize(("prompts", "sentence"), NO_PROMPTS, ids=[s for _, s in NO_PROMPTS])
def test_what_is_no_list_of_prompts(prompts, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_prompts(prompts, MODEL.config, None)


def test_what_is_a_list_of_prompts():
    """Rows of arrays, generators, and text for a model of bytes."""
    for given in ([[1, 2]] * 2, np.ones((2, 2), int) * [1, 2], ((i for i in (1, 2)) for _ in "ab")):
        assert check_prompts(given, MODEL.config, None) == [[1, 2]] * 2
    assert check_prompts(jnp.asarray([[3]]), MODEL.config, None) == [[3]]
    config = MODEL.config.replace(vocab_size=256)
    assert check_prompts(["é", b"\xff"], config, None) == [[195, 169], [255]]


def test_what_is_no_state_or_no_model():
    state = init_state(MODEL.config, 1)
    check_model(MODEL, state)
    gone = jax.tree.map(jnp.array, state)
    for leaf in jax.tree.leaves(gone):
        leaf.delete()
    wider = MODEL.config.replace(window_len=9)
    for given, sentence in (
        ("runs/s.tvq", "state is 'runs/s.tvq': it must be a State, from init_state, extend or"),
        ({}, "state is {}: it must be a State"),
        (gone, "the arrays of the state are deleted"),
        (init_state(wider, 1), "the state is of another model"),
        (init_state(FULL.config, 1), "the state is of another model"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            check_model(MODEL, given)
    with pytest.raises(UserError, match="model is 'runs/demo': it must be a Model"):
        check_model("runs/demo", None)


def test_full_attention_that_memory_does_not_hold():
    """2^31 tokens "until it stops" cost nothing with VQ, and all memory here."""
    sentence = r"full attention keeps every token: .* 2,147,483,648 .* \(max_tokens\)"
    with pytest.raises(UserError, match=sentence):
        Session(FULL, [[1]], SamplingParams(max_tokens=2**31 - 1))
    Session(MODEL, [[1]], SamplingParams(max_tokens=2**31 - 1))
    with pytest.raises(UserError, match=f"draft does not fit: {sentence}"):
        Session(MODEL, [[1]], SamplingParams(max_tokens=2**31 - 1), draft=FULL)


PARAMS = [
    {"max_tokens": 3},
    [None],
    "greedy",
    5,
    SamplingParams,
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_what_is_no_parameters(params):
    with pytest.raises(UserError, match=r"params .*give SamplingParams, such as"):
        Session(MODEL, [[1]], params)


def test_a_new_state_is_one_program():
    """One for each shape of an array would take milliseconds each, at every start of `tvq`."""
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    begun = prefill.begin(MODEL.config, None, [1] * 9, 9, None)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1 and begun.position.shape == (9,)
