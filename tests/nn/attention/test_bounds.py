"""What bounds far keys: the mass that a state holds, and what queries lose."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import close, far, make_config, random_model
from transformer_vq import extend, init_state
from transformer_vq.nn.attention import bounds

TAU = 6.0
CONFIG = make_config("mqa", window_len=3, block_len=4, far_decay=TAU)
STEP = jax.jit(extend)


def mass_after(config, tokens):
    """Of all codes together, in each unit, after so many tokens in calls of 7 and of 1."""
    model = random_model(config)
    rng = np.random.default_rng(0)
    text = rng.integers(0, config.vocab_size, (1, tokens)).astype(np.int32)
    state, at = init_state(config, 1), 0
    while at < tokens:
        size = 7 if tokens - at >= 7 and at % 2 == 0 else 1
        _, state = STEP(model, state, text[:, at : at + size])
        at += size
    return [np.asarray(unit.counts).sum() for unit in state.units]


def test_mass_is_the_sum_of_what_is_left(double):
    tokens, ring = 40, CONFIG.ring_len
    expected = sum(np.exp(-(tokens - 1 - key) / TAU) for key in range(tokens - ring))
    close(mass_after(CONFIG, tokens), [np.float64(expected)] * CONFIG.num_units)
    other = mass_after(CONFIG.replace(far_decay=TAU + 0.1), tokens)
    far(other, [np.float64(expected)] * CONFIG.num_units)


def test_mass_stays_below_the_time_constant(double):
    (first, *_), (last, *_) = mass_after(CONFIG, 100), mass_after(CONFIG, 400)
    assert last < TAU
    close(last, first, 1e-6)  # it has come to rest
    unbounded = mass_after(CONFIG.replace(far_decay=0.0), 400)
    assert unbounded[0] == 400 - CONFIG.ring_len  # control: the number of far keys


def test_cap_begins_where_there_are_more_keys(double):
    config = make_config(window_len=3, far_cap=5)
    beyond = bounds.keys_beyond(jnp.array([2, 3, 8, 9, 13]), jnp.array([0] * 5), config)
    assert beyond.tolist() == [0, 0, 5, 6, 10]
    offsets = bounds.cap_offsets(beyond, config)
    close(offsets, np.array([0, 0, 0, -np.log(6 / 5), -np.log(2)]))


def test_nothing_is_added_where_nothing_is_bounded():
    config = make_config(window_len=3)
    beyond = jnp.zeros((1, 1, 4), jnp.int32)
    assert bounds.block_offsets(jnp.zeros((4, 7), jnp.int32), beyond, config) == (None, None)
