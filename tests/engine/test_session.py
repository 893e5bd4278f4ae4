"""Sessions: the states they leave, and what goes on from them."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from tests.engine.plain import (
    EXTEND,
    LENGTH,
    MODEL,
    empty_state,
    logits_after,
    padded,
    prompts_and_seeds,
    random_prompt,
)
from transformer_vq import (
    SamplingParams,
    generate,
    load_state,
    save_state,
    stream,
)
from transformer_vq.engine.batch import STEPS_PER_DISPATCH, Session
from transformer_vq.errors import UserError


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


def test_a_session_has_one_iteration():
    """A second loop goes on where the first one stopped, and finds nothing after the end."""
    prompts, params = prompts_and_seeds(seed=5, max_tokens=40)
    whole = [(int(t), t.row) for t in stream(MODEL, prompts, params)]
    session = Session(MODEL, prompts, params)
    first = [(int(t), t.row) for t in itertools.islice(session, 100)]
    rest = [(int(t), t.row) for t in session]
    assert first + rest == whole
    assert iter(session) is session and list(session) == []
    with pytest.raises(UserError, match="steps is 0: it must be at least 1"):
        Session(MODEL, prompts, params, steps=0)
