"""The forget gate: rates, their start, and what fades at padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import close, make_config
from transformer_vq import extend, init_model, init_state
from transformer_vq.errors import ConfigError
from transformer_vq.nn.forget import LEAST, ForgetGate, fades, forget_start, time_constants
from transformer_vq.nn.timeline import make_timeline

CONFIG = make_config("mha", window_len=8, forget="gated", forget_horizon=400.0)


def timeline(lengths, size):
    state = init_state(CONFIG, len(lengths))
    return make_timeline(CONFIG, state, jnp.asarray(lengths, jnp.int32), size, None)[0]


def test_time_constants_at_the_start(double):
    """From twice the window to half of the horizon, in equal ratios; the gate sees no token yet."""
    model = init_model(CONFIG, 0)
    found = np.sort(np.asarray(time_constants(model.params["units"], CONFIG)).ravel())
    close(found, np.geomspace(16.0, 200.0, found.size), 1e-9)
    assert not np.asarray(model.params["units"]["w_forget"]).any()
    short = CONFIG.replace(forget_horizon=10.0)  # shorter than twice the window
    assert np.isfinite(forget_start(short)).all()


def test_rates(double):
    """Never above the horizon's, nor below the least; 0 at padding."""
    groups = CONFIG.num_kv_heads
    weight = jnp.zeros((CONFIG.d_model, groups)).at[0, 0].set(1.0)
    gate = ForgetGate(weight, jnp.zeros(groups))
    x = jnp.zeros((2, 3, CONFIG.d_model)).at[0, :, 0].set(jnp.array([0.0, 1e3, -1e3]))
    found = np.asarray(fades(gate, x, timeline([3, 1], 3), CONFIG))
    half = -np.log(2) - 1 / CONFIG.forget_horizon
    close(found[0, :, 0], np.array([half, -1 / CONFIG.forget_horizon, LEAST]), 1e-12)
    close(found[1], np.array([[half] * groups, [0] * groups, [0] * groups]), 1e-12)
    both = CONFIG.replace(far_decay=2.0)
    close(np.asarray(fades(gate, x, timeline([3, 1], 3), both))[0, 0], found[0, 0] - 0.5, 1e-12)
    assert fades(None, x, timeline([3, 1], 3), make_config()) is None


@pytest.mark.slow
def test_long_units(double):
    """Whatever the gate has learned: here to forget at once, all but the last unit."""
    config = make_config(window_len=2, forget="gated", forget_horizon=30.0, long_units=1)
    model = init_model(config, 0)
    units = {**model.params["units"], "b_forget": jnp.full((config.num_units, 1), -50.0)}
    model = type(model)({**model.params, "units": units}, model.codebook, config)
    close(np.asarray(time_constants(units, config))[-1], np.array([30.0]), 1e-12)
    assert (time_constants(units, config)[:-1] < 0.1).all()
    text = np.random.default_rng(0).integers(0, config.vocab_size, (1, 12)).astype(np.int32)
    _, whole = jax.jit(extend)(model, init_state(config, 1), text)
    _, first = jax.jit(extend)(model, init_state(config, 1), text[:, :11])
    _, stepped = jax.jit(extend)(model, first, text[:, 11:])
    kept = np.exp(-np.arange(3, 12) / 30.0).sum()  # of the keys at these distances
    for state in (whole, stepped):
        close(np.asarray(state.units[-1].counts).sum(), kept, 1e-9)
        assert all(np.asarray(unit.counts).sum() < 1e-9 for unit in state.units[:-1])
    with pytest.raises(ConfigError, match="long_units is 9, and there are 2 units"):
        config.replace(long_units=9)


def test_mass_stays_below_the_horizon(double):
    """Whatever the gate has learned: here never to forget."""
    config = make_config(window_len=2, block_len=16, forget="constant", forget_horizon=30.0)
    model = init_model(config, 0)
    units = {**model.params["units"], "b_forget": jnp.full((config.num_units, 1), 50.0)}
    model = type(model)({**model.params, "units": units}, model.codebook, config)
    step = jax.jit(extend)
    state = init_state(config, 1)
    text = np.random.default_rng(0).integers(0, config.vocab_size, (1, 400)).astype(np.int32)
    _, early = step(model, state, text[:, :200])
    _, late = step(model, early, text[:, 200:])
    early, late = (float(s.units[0].counts.sum()) for s in (early, late))
    assert 20 < early < 31
    close(late, early, 1e-2)
