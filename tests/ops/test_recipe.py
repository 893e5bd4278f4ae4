"""The recipe of a run: optimizers, schedules, accumulation, averages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tests.ops.test_train as test_train
from tests.ops.test_train import CONFIG, START, TOKENS, raw, replace
from transformer_vq import Model
from transformer_vq.config import TrainConfig
from transformer_vq.data import Batch
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.nn import pieces
from transformer_vq.nn.model import DropoutKeys
from transformer_vq.nn.vq import Places
from transformer_vq.ops import train as train_module
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.loss import LossTerms
from transformer_vq.ops.optimizer import (
    MUON_RMS,
    decayed,
    learning_rate_at,
    make_optimizer,
)
from transformer_vq.ops.train import _in_turns, make_train_step
from transformer_vq.run import loop
from transformer_vq.run.folder import RunError, load_run
from transformer_vq.sharding import data_mesh

TRAIN = TrainConfig(
    batch_size=4, sequence_len=16, update_len=8, steps=20, warmup_steps=0, learning_rate=0.02
)
OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")


def one_batch(train=TRAIN, index=0) -> Batch:
    return test_train.one_batch(train, index)


# Schedules


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
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


# Optimizers


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


# Accumulation


def test_parts_of_a_batch_add_up_to_the_whole():
    """Two updates with dropout, in float64: parameters, codebook, metrics; a part's memory."""
    with jax.enable_x64(True):
        names = ("compute_dtype", "param_dtype", "state_dtype")
        rates = (f"dropout_{name}" for name in ("embedding", "sinusoid", "residual", "layer"))
        config = CONFIG.replace(**dict.fromkeys(names, "float64"), **dict.fromkeys(rates, 0.2))
        train = replace(TRAIN, batch_size=16)
        batch = one_batch(train)
        batch.loss_mask[1, 5:] = False  # parts are uneven

        def compiled(accumulate):
            plan = replace(train, accumulate=accumulate)
            return make_train_step(config, plan).lower(START(config, plan), batch).compile()

        def result(step, batch):
            state, metrics = step(START(config, train), batch)
            return jax.tree.leaves((state.params, state.codebook, metrics))

        whole, parts = compiled(1), compiled(4)
        expected = result(whole, batch)
        for a, b in zip(result(parts, batch), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-10)  # metrics are float32
        # Control: a row that is lost, and another taken twice, would be noticed.
        doubled = jax.tree.map(lambda x: x[np.minimum(np.arange(16), 14)], batch)
        pairs = zip(result(parts, doubled), expected, strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) > 1e-4
        used, least = (x.memory_analysis().temp_size_in_bytes for x in (whole, parts))
        assert least < 0.7 * used


def test_by_default_the_rows_of_a_piece_take_a_turn(monkeypatch):
    """In as many parts as bring one down to what goes through a unit at once."""
    train, made = replace(TRAIN, batch_size=8), []
    state, batch = jax.eval_shape(lambda: START(CONFIG, train)), one_batch(train)

    def in_turns(gradient, parts):
        made.append(parts)
        return gradient

    monkeypatch.setattr(train_module, "_in_turns", in_turns)
    for accumulate, rows in ((0, 8), (0, 4), (0, 3), (0, 1), (2, 8), (2, 1), (1, 1)):
        monkeypatch.setattr(pieces, "TOKENS_PER_PIECE", {"others": rows * TRAIN.update_len})
        step = make_train_step(CONFIG, replace(train, accumulate=accumulate))
        jax.eval_shape(step, state, batch)
    assert made == [2, 4, 8, 2, 2]  # of one part, there are no turns


def test_every_part_has_rows_and_places_of_its_own():
    def gradient(state, piece, dropout, places):
        drawn = dropout.rows.sum() / 3.0
        keys = jnp.where(places.here > 0, piece.inputs[places.rows, places.times], 0)
        return drawn, LossTerms(drawn**2, drawn, drawn, {}, state, keys)

    rows = jnp.arange(6, dtype=jnp.int32)
    batch = Batch(*[10 * rows[:, None] + jnp.arange(4)] * 4)
    places = Places(jnp.array([5, 0, 3]), jnp.array([1, 2, 3]), jnp.ones(3))
    dropout = DropoutKeys(jax.random.key(0), jax.random.key(1), rows)
    mean, terms = _in_turns(gradient, 3)({"x": rows}, batch, dropout, places)
    assert terms.state["x"].tolist() == rows.tolist()
    assert terms.keys.tolist() == [51, 2, 33]  # of the whole batch
    # Rows 0 and 3, 1 and 4, 2 and 5.
    assert float(mean) == pytest.approx((3 + 5 + 7) / 9)
    assert float(terms.nll) == pytest.approx((3**2 + 5**2 + 7**2) / 27)


# Averages


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    train = replace(TRAIN, ema_decay=0.6, sequence_len=8, steps=6, log_every=2)
    train = replace(train, evaluate_tokens=50, checkpoint_every=1, keep_checkpoints=9)
    mesh = data_mesh(jax.devices()[:1])
    result = loop.train(CONFIG, train, TOKENS[:540], TOKENS[540:], folder, mesh=mesh)
    return folder, train, result


def test_average_by_hand(averaged_run):
    """Of the weights after every update, against numpy."""
    folder, train, _ = averaged_run
    state = START(CONFIG, train)
    expected = jax.tree.map(np.asarray, {"params": state.params, "codebook": state.codebook})
    for i in range(train.steps):
        state, _ = Checkpoints(folder / "checkpoints").restore(i + 1, state)
        now = {"params": state.params, "codebook": state.codebook}
        d = min(0.6, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda old, new, d=d: d * old + (1 - d) * new, expected, now)
        for a, b in zip(*map(jax.tree.leaves, (state.average, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert raw(state.average["params"]) != raw(state.params)


def test_the_average_is_what_is_evaluated_and_loaded(averaged_run):
    folder, train, result = averaged_run
    model, info = load_run(folder)
    latest, _ = load_run(folder, average=False)
    state, _ = Checkpoints(folder / "checkpoints").restore(None, START(CONFIG, train))
    assert info.train.ema_decay == 0.6
    assert raw((model.codebook, model.params)) == raw(state.average)
    assert raw(latest.params) == raw(state.params)
    assert raw(model) != raw(latest)
    scored = [
        evaluate(x, TOKENS[540:], max_tokens=train.evaluate_tokens).loss for x in (model, latest)
    ]
    assert scored[0] == pytest.approx(result.validation_loss, abs=1e-6)
    assert abs(scored[1] - result.validation_loss) > 1e-4


def test_without_an_average_a_checkpoint_is_as_before(averaged_run):
    folder, train, _ = averaged_run

    def names(state):
        return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)}

    with_average = names(START(CONFIG, train))
    without = names(START(CONFIG, TRAIN))
    assert without < with_average
    assert {name.split("[")[0].split(".")[1] for name in without} == {
        "step",
        "params",
        "codebook",
        "opt_state",
    }
    for changes, message in (
        (dict(ema_decay=0), "has ema_decay 0.6, not 0"),
        (dict(optimizer="lion"), "has optimizer adamw, not lion"),
    ):
        with pytest.raises(RunError, match=message):
            other = replace(train, **changes)
            loop.train(
                CONFIG, other, TOKENS, None, folder, resume=True, mesh=data_mesh(jax.devices()[:1])
            )
    assert isinstance(load_run(folder)[0], Model)
