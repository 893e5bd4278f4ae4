"""Prompts: what is taken for one, and the state that is left by reading it."""

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
)
from transformer_vq.engine.batch import Session
from transformer_vq.engine.prefill import PREFILL_SIZES


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
