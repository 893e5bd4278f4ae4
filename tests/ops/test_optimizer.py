"""Optimizers and schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import CONFIG, START, raw, replace
from transformer_vq import init_model
from transformer_vq.config import TrainConfig
from transformer_vq.ops.optimizer import (
    MUON_RMS,
    decayed,
    learning_rate_at,
    make_optimizer,
)

TRAIN = TrainConfig(
    batch_size=4, sequence_len=16, update_len=8, steps=20, warmup_steps=0, learning_rate=0.02
)
OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")


# Schedules


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        (dict(schedule="cosine"), {0: 0, 5: 0.25, 10: 0.5, 60: 0.275, 110: 0.05, 1000: 0.05}),
        (dict(schedule="cosine", warmup_steps=0), {0: 0.5}),
        (dict(schedule="cosine", steps=5), {5: 0.25}),  # ends while it warms up
        (dict(schedule="linear"), {0: 0, 5: 0.25, 10: 0.5, 60: 0.275, 110: 0.05, 999: 0.05}),
        (dict(schedule="inverse-sqrt"), {5: 0.25, 10: 0.5, 40: 0.25, 90: 1 / 6, 10**6: 0.05}),
        (dict(schedule="inverse-sqrt", warmup_steps=0), {0: 0.5, 3: 0.25, 99: 0.05}),
        (dict(schedule="wsd", decay_steps=20), {5: 0.25, 10: 0.5, 90: 0.5, 100: 0.275, 110: 0.05}),
        (dict(schedule="wsd"), {88: 0.5, 99: 0.275, 110: 0.05}),  # a fifth of 110
        (dict(schedule="wsd", decay_steps=500), {9: 0.45, 10: 0.5, 60: 0.275, 110: 0.05}),
        (dict(schedule="wsd", steps=5), {4: 0.2, 5: 0.25}),  # ends while it warms up
    ],
)
def test_schedules(fields, rates):
    train = TrainConfig(**{"learning_rate": 0.5, "warmup_steps": 10, "steps": 110, **fields})
    actual = [float(learning_rate_at(train, step)) for step in rates]
    np.testing.assert_allclose(actual, list(rates.values()), rtol=1e-5)


def test_steps_are_numbers_of_python_or_of_a_device():
    """At step 0 the curve after the warm-up, which is not used yet, divides by 0."""
    train = TrainConfig(schedule="inverse-sqrt", warmup_steps=20)
    for step in (0, 1, 30):
        rate = learning_rate_at(train, step)
        assert rate == learning_rate_at(train, jnp.int32(step))
        assert rate.dtype == jnp.float32


# Optimizers


def test_weight_decay_is_for_what_is_not_a_vector():
    config = CONFIG.replace(absolute_positions=True, head_type="mha")
    flags = decayed(config)
    params = jax.eval_shape(lambda: init_model(config, 0).params)
    assert jax.tree.structure(flags) == jax.tree.structure(params)
    units = flags["units"]
    for name in ("w_q", "w_k", "w_v", "w_r", "w_o"):
        assert units[name]
    assert units["mlp"]["w_in"] and flags["embedding"] and flags["w_out"]
    assert flags["position_scale"]  # a scalar decays, as in the reference implementation
    vectors = [flags["output_bias"], units["u"], units["w"], units["norm"], units["mlp"]["norm"]]
    assert not any(jax.tree.leaves(vectors))


def test_adam_by_hand_in_float32():
    """Two updates of bfloat16 parameters, against the formulas; and clipping changes the second."""
    train = replace(TRAIN, warmup_steps=0, weight_decay=0.0, grad_clip=1.0, steps=10**6)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), START(CONFIG, TRAIN).params)
    optimizer = make_optimizer(train, CONFIG)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    gradients = [jax.tree.map(lambda p, c=c: jnp.full_like(p, c), params) for c in (0.5, -2.0)]
    for grads in gradients:
        changes, state = update(grads, state, params)
    assert {x.dtype for x in jax.tree.leaves((changes, state))} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    each = 1.0 / np.sqrt(sum(p.size for p in jax.tree.leaves(params)))  # both were above 1: clipped
    m = train.beta1 * (1 - train.beta1) * each - (1 - train.beta1) * each
    v = (train.beta2 + 1) * (1 - train.beta2) * each**2
    m_hat, v_hat = m / (1 - train.beta1**2), v / (1 - train.beta2**2)
    expected = -train.learning_rate * m_hat / (np.sqrt(v_hat) + train.epsilon)
    for change in jax.tree.leaves(changes):
        np.testing.assert_allclose(change, expected, rtol=2e-3)  # gradients came in bfloat16
    free = make_optimizer(replace(train, grad_clip=0.0), CONFIG)
    state, update = free.init(params), jax.jit(free.update)
    for grads in gradients:
        changes, state = update(grads, state, params)
    assert abs(float(changes["output_bias"][0]) - expected) > 0.1 * abs(expected)


@functools.cache
def some_gradients(seed=0):
    params = START(CONFIG, TRAIN).params
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return params, tree.unflatten([0.01 * jax.random.normal(key, x.shape) for key, x in pairs])


def changes_of(train, params, gradients):
    optimizer = make_optimizer(train, CONFIG)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grads in gradients:
        changes, state = update(grads, state, params)
    return changes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_not_scaled_by_the_learning_rate(name):
    train = replace(TRAIN, optimizer=name, weight_decay=0.25, warmup_steps=4)
    params, grads = some_gradients()
    expected = jax.tree.map(lambda p, d: -0.25 * d * p, params, decayed(CONFIG))
    at_rate_0 = changes_of(train, params, [grads])
    jax.tree.map(np.testing.assert_array_equal, at_rate_0, expected)
    later = changes_of(train, params, [grads, grads])
    assert all(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (later, expected)), strict=True)
    )


def test_lion_is_a_sign():
    params, first = some_gradients()
    _, second = some_gradients(1)
    train = replace(TRAIN, optimizer="lion", weight_decay=0, schedule="wsd", grad_clip=0)
    b1, b2 = train.beta1, train.beta2
    signs = jax.tree.map(lambda a, b: np.sign(b1 * (1 - b2) * a + (1 - b1) * b), first, second)
    changes = changes_of(train, params, [first, second])
    jax.tree.map(
        lambda x, sign: np.testing.assert_allclose(x, -0.02 * sign, rtol=1e-6), changes, signs
    )


def test_adafactor_takes_each_unit_by_itself():
    """As optax's own, on the units one by one; on the stack of them it would be another."""
    params, grads = some_gradients()
    units = params["units"]
    params = {**params, "units": {**units, "w_q": units["w_q"].at[0].mul(50.0)}}
    train = replace(TRAIN, optimizer="adafactor", weight_decay=0, schedule="wsd", grad_clip=0)
    changes = changes_of(train, params, [grads])
    optax_own = optax.adafactor(0.02)

    def own(name, take):
        params_part, grads_part = take(params["units"][name]), take(grads["units"][name])
        return optax_own.update(grads_part, optax_own.init(params_part), params_part)[0]

    for name in ("w_q", "w_o", "u"):
        for unit in range(CONFIG.num_units):
            expected = own(name, lambda x, unit=unit: x[unit])
            np.testing.assert_allclose(changes["units"][name][unit], expected, rtol=1e-5)
    stack = own("w_q", lambda x: x)
    assert np.abs(changes["units"]["w_q"] - stack).max() > 0.1 * np.abs(stack).max()


def test_muon_makes_matrices_of_units_orthogonal():
    params, grads = some_gradients()
    train = replace(TRAIN, optimizer="muon", weight_decay=0, schedule="wsd", grad_clip=0)
    muon, adam = (
        changes_of(t, params, [grads]) for t in (train, replace(train, optimizer="adamw"))
    )
    for name in ("w_q", "w_o", "w_g"):
        for change in np.asarray(muon["units"][name]):
            values = np.linalg.svd(change, compute_uv=False)
            values /= 0.02 * MUON_RMS * max(change.shape) ** 0.5
            assert values.min() > 0.5 and values.max() < 1.5  # what five iterations reach
            # Of about the size of Adam's changes, whose rates it shares.
            assert 0.1 < np.sqrt(np.mean(change**2)) / 0.02 < 0.3
    control = np.linalg.svd(adam["units"]["w_q"][0], compute_uv=False)
    assert control.max() > 3 * control.min()
    for name in ("embedding", "w_out", "output_bias"):
        assert raw(muon[name]) == raw(adam[name])
    assert raw(muon["units"]["u"]) == raw(adam["units"]["u"])


def test_the_momentum_of_muon_climbs():
    """In two updates from 0.85 to 0.95. The change is that of a first update by what the moments
    of these add up to, by hand; of a constant momentum it is another."""
    params, grads = some_gradients()
    constant = replace(TRAIN, optimizer="muon", weight_decay=0, schedule="wsd", grad_clip=0)
    climbing = replace(constant, momentum_warmup_steps=2)
    rng = np.random.default_rng(3)
    several = [jax.tree.map(lambda g: g + rng.normal(size=g.shape), grads) for _ in range(4)]
    momenta, moment = (0.85, 0.9, 0.95, 0.95), np.zeros_like(several[0]["units"]["w_q"])
    for count, (g, momentum) in enumerate(zip(several, momenta, strict=True), start=1):
        g = np.asarray(g["units"]["w_q"])
        moment = momentum * moment + (1 - momentum) * g
        ahead = momentum * moment / (1 - momentum ** (count + 1))
        ahead = ahead + (1 - momentum) * g / (1 - momentum**count)
        some = several[:count]
        found = changes_of(climbing, params, some)["units"]["w_q"]
        alone = {**grads, "units": {**grads["units"], "w_q": jnp.float32(ahead)}}
        expected = changes_of(constant, params, [alone])["units"]["w_q"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        other = np.asarray(changes_of(constant, params, some)["units"]["w_q"])
        assert count == 1 or np.abs(other - found).max() > 1e-3
