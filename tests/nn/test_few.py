"""A few tokens at once, of which some stay: as so many single steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import close, far, make_config, quick_jit, random_inputs, random_model
from tests.nn.cases import BATCH, CASES, MEMORY, any_case, fresh, same_bits
from transformer_vq import init_state
from transformer_vq.nn.decode import decode_step, prepare
from transformer_vq.nn.few import commit, read_few

FEW = 7  # tokens of a call: more than most windows here, and than all blocks
ACCEPTED = [[7, 3, 0], [1, 0, 7], [0, 6, 2]]  # of each row, call by call
CONFIGS = {
    "documents": CASES["gated_heads_documents"],
    "memory_documents": CASES["memory_documents"],
    "memory_no_cache": make_config("mqa", window_len=4, use_cache=False, **MEMORY),
    "no_window": make_config("mha", num_heads=2, window_len=0, codebook_size=2, far_cap=2),
    "decay_cap": make_config(num_heads=2, window_len=8, block_len=4, far_decay=9.0, far_cap=3),
    "full_documents": CASES["full_documents"],
}

SLOW = ("documents", "no_window")  # what others among these have too
MOST = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CONFIGS]

ALL = np.full(BATCH, FEW, np.int32)

step = quick_jit(decode_step)
read = quick_jit(read_few)
last_only = quick_jit(functools.partial(read_few, all_stay=True))
keep = quick_jit(commit, static_argnums=0)


@functools.cache
def started(name):
    """A decoder, tokens with their documents, and a state after a few steps, ragged."""
    config = CONFIGS[name]
    model, state = random_model(config), fresh(config)
    tokens, ids, _ = random_inputs(config, seed=3, length=24)
    decoder = prepare(model, state)
    state, used = steps(decoder, state, tokens, ids, np.zeros(BATCH, int), [5, 2, 0])[:2]
    return decoder, state, tokens, ids, used


def steps(decoder, state, tokens, ids, used, counts):
    """As many single steps of each row, the new places, and the logits after each step."""
    logits = []
    for i in range(max(counts, default=0)):
        active = i < np.asarray(counts)
        at = np.minimum(used + i, tokens.shape[1] - 1)[:, None]
        token, document = (np.take_along_axis(x, at, axis=1)[:, 0] for x in (tokens, ids))
        state = step(decoder, state, token, active, document)
        logits.append(state.logits)
    return state, used + counts, logits


def some(x, used, count=FEW):
    """The next ones of each row."""
    at = np.minimum(used[:, None] + np.arange(count), x.shape[1] - 1)
    return np.take_along_axis(x, at, axis=1)


@pytest.mark.parametrize("name", MOST)
def test_as_single_steps(name, double):
    """Logits of all tokens, and the state after those that stay, tensor by tensor; call by call."""
    decoder, state, tokens, ids, used = started(name)
    for accepted in ACCEPTED:
        pending = read(decoder, state, some(tokens, used), ALL, some(ids, used))
        if name == "memory_documents":  # where all real ones stay, the last logits are enough
            counts = np.array(accepted, np.int32)
            last = last_only(decoder, state, some(tokens, used), counts, some(ids, used))
            assert last.logits.shape[1] == 1
            close(*(keep(decoder.config, state, p, counts) for p in (last, pending)), 1e-12)
        logits = steps(decoder, state, tokens, ids, used, [FEW] * BATCH)[2]
        close(pending.logits, np.stack(logits, axis=1), 1e-12)
        after = keep(decoder.config, state, pending, np.array(accepted, np.int32))
        expected, used, _ = steps(decoder, state, tokens, ids, used, accepted)
        close(after, expected, 1e-12)
        assert jax.tree.structure(after) == jax.tree.structure(expected)
        assert [x.dtype for x in jax.tree.leaves(after)] == [
            x.dtype for x in jax.tree.leaves(expected)
        ]
        none = np.asarray(accepted) == 0
        same_bits(*(jax.tree.map(lambda x, n=none: x[n], s) for s in (after, state)))
        # Control: one token more or fewer is another state.
        other = keep(decoder.config, state, pending, np.array([1, 2, 3], np.int32))
        far(other.units, expected.units)
        state = after


@pytest.mark.parametrize("name", MOST)
def test_what_does_not_stay_is_nothing(name, double):
    """Other tokens after those that stay, and padding: the same bits of the state."""
    decoder, state, tokens, ids, used = started(name)
    accepted = np.array(ACCEPTED[0], np.int32)
    text, documents = some(tokens, used), some(ids, used)
    pending = read(decoder, state, text, ALL, documents)
    stays = np.arange(FEW) < accepted[:, None]
    other = np.where(stays, text, (text + 1) % decoder.config.vocab_size)
    changed = read(decoder, state, other, accepted, np.where(stays, documents, 99))
    same_bits(changed.logits[stays], pending.logits[stays])
    same_bits(*(keep(decoder.config, state, p, accepted) for p in (changed, pending)))
    far(changed.logits[~stays], pending.logits[~stays])


def test_beyond_the_capacity(double):
    """Full attention: tokens that the state cannot hold have no logits; those before them do."""
    decoder, state, tokens, ids, used = started("full_documents")
    state = jax.tree.map(jnp.copy, state)
    for _ in range(2):
        pending = read(decoder, state, some(tokens, used), ALL, some(ids, used))
        state = keep(decoder.config, state, pending, ALL)
        used = used + FEW
    left = state.capacity - np.asarray(state.position)
    logits = np.asarray(read(decoder, state, some(tokens, used), ALL, some(ids, used)).logits)
    lost = np.arange(FEW) >= left[:, None]
    assert lost.any() and np.isnan(logits[lost]).all() and np.isfinite(logits[~lost]).all()


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(any_case(), st.integers(2, 16))
def test_any_configuration(case, few):
    """Calls of any size, with as many tokens of each row as it happens to be."""
    config, seed, batch, _ = case
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        model = random_model(config, seed)
        capacity = 4 * few if config.attention == "full" else None
        state = expected = init_state(config, batch, capacity=capacity)
        tokens, ids, _ = random_inputs(config, seed, batch, 3 * few)
        decoder, used = prepare(model, state), np.zeros(batch, int)
        for _ in range(3):
            accepted = rng.integers(0, few + 1, batch)
            pending = read(decoder, state, some(tokens, used, few), None, some(ids, used, few))
            logits = steps(decoder, expected, tokens, ids, used, [few] * batch)[2]
            close(pending.logits, np.stack(logits, axis=1), 1e-12)
            state = keep(config, state, pending, accepted.astype(np.int32))
            expected, used, _ = steps(decoder, expected, tokens, ids, used, accepted)
            close(state, expected, 1e-12)
    jax.clear_caches()
