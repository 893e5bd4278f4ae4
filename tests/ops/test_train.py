"""The train step: its losses and updates, its devices, its parts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import CONFIG, START, one_batch, raw, recorded, replace, tune
from tests.programs import temporary_bytes
from transformer_vq import Model, init_state
from transformer_vq.config import TrainConfig
from transformer_vq.data import Batch
from transformer_vq.data.loader import UNASKED
from transformer_vq.io.official import from_official
from transformer_vq.nn.dropout import DropoutKeys
from transformer_vq.nn.vq import SamplePositions
from transformer_vq.ops import train as train_module
from transformer_vq.ops.loss import LossTerms, loss_fn
from transformer_vq.ops.optimizer import make_optimizer
from transformer_vq.ops.train import (
    TrainState,
    _in_micro_batches,
    codebook_metrics,
    dropout_keys,
    make_train_step,
)
from transformer_vq.sharding import data_mesh

TRAIN = TrainConfig(
    batch_size=2, sequence_len=16, update_len=8, steps=20, warmup_steps=4, learning_rate=0.02
)
FOUR = replace(TRAIN, batch_size=4, warmup_steps=0)


# The train step


@pytest.fixture(scope="module")
def parity():
    arrays = recorded("f32_train_op")
    config = json.loads(arrays["config_json"].tobytes())

    def tree(prefix):
        return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}

    def model(index):
        return from_official(tree(f"params_{index}/"), config)

    return json.loads(arrays["optimizer_json"].tobytes()), tree, model


def test_two_training_calls_of_the_reference_implementation(parity):
    """Two batches of two updates each: losses, parameters and codebooks after both."""
    recipe, tree, model = parity
    train = TrainConfig(
        batch_size=2,
        sequence_len=48,
        update_len=24,
        steps=recipe["total"],
        warmup_steps=recipe["warmup"],
        learning_rate=recipe["lr"],
        grad_clip=recipe["grad_clip"],
        weight_decay=recipe["wd"],
    )
    start = model(0)
    optimizer = make_optimizer(train, start.config)
    state = TrainState(
        step=jnp.int32(0),
        params=start.params,
        codebook=start.codebook,
        opt_state=optimizer.init(start.params),
    )
    step = make_train_step(start.config, train)
    before = raw(start.params)
    for i in range(2):
        batch = tree(f"batch_{i}/")
        names = ("inputs", "targets", "loss_mask", "doc_ids")
        state, metrics = step(state, Batch(*(batch[name] for name in names)))
        theirs, share = tree(f"metrics_{i}/"), batch["loss_mask"].mean()
        loss = metrics["loss"] * share  # theirs is per token, masked or not
        assert float(loss) == pytest.approx(theirs["loss_lm_per_token_unscaled"], abs=1e-5)
        commitment = metrics["commitment"] * share
        assert float(commitment) == pytest.approx(theirs["loss_commit_per_token"], abs=1e-4)
        expected = model(i + 1)
        ours = jax.tree.leaves_with_path((state.params, state.codebook))
        wanted = jax.tree.leaves((expected.params, expected.codebook))
        for (path, actual), array in zip(ours, wanted, strict=True):
            error = np.abs(actual - array).max() / np.abs(array).max()
            assert error < 1e-4, jax.tree_util.keystr(path)
        assert raw(state.params) != before  # control: something was learnt


@pytest.fixture(scope="module")
def step():
    return make_train_step(CONFIG, TRAIN)


@pytest.mark.slow
def test_learns(step):
    """The same batch again and again: its loss falls by far."""
    state, losses = START(CONFIG, TRAIN), []
    for _ in range(10):
        state, metrics = step(state, one_batch(TRAIN))
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 20
    assert losses[-1] < losses[0] - 1.0
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    by_unit = {name for name, value in metrics.items() if value.shape == (CONFIG.num_units,)}
    assert by_unit == {"codebook_used_by_unit", "codebook_perplexity_by_unit"}
    assert all(np.ndim(metrics[name]) == 0 for name in metrics.keys() - by_unit)


def test_what_is_masked_takes_no_part(step):
    batch = one_batch(TRAIN)
    mask = batch.loss_mask.copy()
    mask[1, -3:] = False
    other = batch.targets.copy()
    other[1, -3:] += 1

    def result(targets, mask):
        changed = batch._replace(targets=targets, loss_mask=mask)
        return step(START(CONFIG, TRAIN), changed)

    masked = result(batch.targets, mask)
    assert raw(result(other, mask)) == raw(masked)
    assert raw(result(other, batch.loss_mask)) != raw(result(batch.targets, batch.loss_mask))
    # The loss is per target that counts, and codes are counted where they count.
    whole = result(batch.targets, batch.loss_mask)
    gamma, hits = CONFIG.codebook_decay, batch.inputs.size
    for (state, _), kept in ((masked, hits - 3), (whole, hits)):
        total = np.asarray(state.codebook["count"], np.float64).sum(-1)
        first, second = TRAIN.batch_size * TRAIN.update_len, kept - hits // 2
        expected = gamma * (gamma * 8 + (1 - gamma) * first) + (1 - gamma) * second
        np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_what_is_read_but_not_asked_takes_part_in_the_codebook(step):
    batch = one_batch(TRAIN)
    asked = np.zeros_like(batch.loss_mask)
    asked[:, 5::4] = True

    def result(**changes):
        state, metrics = step(START(CONFIG, TRAIN), batch._replace(**changes))
        return raw(state), metrics, np.asarray(state.codebook["count"]).sum(-1)

    targets = np.where(asked, batch.targets, UNASKED)
    state, metrics, counts = result(targets=targets)
    masked, few, fewer = result(loss_mask=asked)  # control: padding takes no part in anything
    whole = result()
    np.testing.assert_allclose(counts, whole[2], rtol=1e-6)
    assert (fewer < counts - 0.01).all()
    assert metrics["commitment"] != few["commitment"] and masked != state
    assert metrics["loss"] != whole[1]["loss"]
    assert result(targets=np.where(asked, batch.targets, -7))[0] == state


def test_the_state_is_carried_from_chunk_to_chunk():
    """Where nothing is learnt, the chunks lose what the sequence loses when it is taken whole."""
    config = CONFIG.replace(codebook_decay=1 - 1e-7)
    still = replace(TRAIN, learning_rate=1e-12, weight_decay=0.0)
    step = make_train_step(config, still)

    def losses(batch):
        """By the train step, and by the loss of the whole."""
        start = START(config, still)
        model = Model(start.params, start.codebook, config)
        whole = jax.jit(loss_fn)(start.params, model, init_state(config, 2), *batch[:3])[1].nll
        share = batch.loss_mask.mean()
        return float(step(start, batch)[1]["loss"]), float(whole / share)

    late = np.broadcast_to(np.arange(16) >= 8, (2, 16))
    batch = one_batch(TRAIN)._replace(loss_mask=late)  # of the second chunk only
    chunks, whole = losses(batch)
    assert chunks == pytest.approx(whole, abs=1e-6)
    # Control: what was in the first chunk matters.
    other = batch._replace(inputs=np.where(late, batch.inputs, 5))
    assert abs(losses(other)[0] - chunks) > 1e-4


@pytest.mark.slow  # test_sharding has a quicker one
def test_eight_devices_are_as_one(monkeypatch):
    """In micro-batches: on one device in 16, on eight in 2."""
    assert jax.device_count() >= 8
    tune(monkeypatch, tokens_per_chunk=TRAIN.update_len)
    train = replace(TRAIN, batch_size=16)
    batches = [one_batch(train, i) for i in range(4)]
    steps = {n: make_train_step(CONFIG, train, data_mesh(jax.devices()[:n])) for n in (1, 8)}

    def run(devices, batches):
        state, history = START(CONFIG, train), []
        for batch in batches:
            state, metrics = steps[devices](state, batch)
            history.append(np.concatenate([np.ravel(metrics[name]) for name in sorted(metrics)]))
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
        assert len(state.step.sharding.device_set) == devices
        return np.array(history), state

    (one, state_one), (eight, state_eight) = run(1, batches), run(8, batches)
    np.testing.assert_allclose(eight, one, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(state_one), jax.tree.leaves(state_eight), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(a).max())
    # Control: devices that each learnt from what they see alone would be noticed.
    alone, _ = run(1, [jax.tree.map(lambda x: np.repeat(x[:2], 8, 0), b) for b in batches])
    assert np.abs(alone - one).max() > 1e-3


def test_dropout_follows_seed_and_step_alone():
    def keys(step, seed=0):
        both = dropout_keys(replace(TRAIN, seed=seed), jnp.int32(step), 2)
        assert both.rows.tolist() == [0, 1]
        return raw([jax.random.key_data(key) for key in (both.call, both.sequence)])

    first, second, third = (keys(step) for step in range(3))
    assert first[0] != second[0] and first[1] == second[1]  # chunks of one sequence
    assert second[0] != third[0] and second[1] != third[1]
    assert keys(0, seed=1)[1] != first[1]
    assert len({key for step in range(6) for key in keys(step)}) == 9  # 6 calls, 3 sequences


def test_full_attention_trains():
    config = CONFIG.replace(attention="full")
    state, metrics = make_train_step(config, TRAIN)(START(config, TRAIN), one_batch(TRAIN))
    assert np.isfinite(float(metrics["loss"])) and "codebook_used" not in metrics
    assert raw(state.codebook) == raw(START(config, TRAIN).codebook)


def test_codebook_metrics():
    counts = jnp.array([[[4.0, 4, 0, 0]], [[2, 2, 2, 2]]])  # [N, G, S]
    metrics = codebook_metrics(counts)
    assert float(metrics["codebook_used"]) == 0.75
    assert float(metrics["codebook_perplexity"]) == pytest.approx(3.0)
    assert metrics["codebook_used_by_unit"].tolist() == [0.5, 1.0]
    np.testing.assert_allclose(metrics["codebook_perplexity_by_unit"], [2.0, 4.0], rtol=1e-6)


# Accumulation


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_the_whole():
    """Two updates with dropout, in float64: parameters, codebook, metrics; a part's memory."""
    with jax.enable_x64(True):
        names = ("compute_dtype", "param_dtype", "state_dtype")
        rates = (f"dropout_{name}" for name in ("embedding", "sinusoid", "residual", "layer"))
        config = CONFIG.replace(**dict.fromkeys(names, "float64"), **dict.fromkeys(rates, 0.2))
        train = replace(FOUR, batch_size=16)
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
        used, least = map(temporary_bytes, (whole, parts))
        assert least < 0.7 * used


@pytest.mark.slow
def test_by_default_a_micro_batch_is_what_fits_a_chunk(monkeypatch):
    """On a CPU: as many micro-batches as bring one down to what goes through a unit at once."""
    train, made = replace(FOUR, batch_size=8), []
    state, batch = jax.eval_shape(lambda: START(CONFIG, train)), one_batch(train)

    def in_micro_batches(gradient, count):
        made.append(count)
        return gradient

    monkeypatch.setattr(train_module, "_in_micro_batches", in_micro_batches)
    for accumulate, rows in ((0, 8), (0, 3), (0, 1), (2, 1), (1, 1)):
        tune(monkeypatch, tokens_per_chunk=rows * TRAIN.update_len)
        step = make_train_step(CONFIG, replace(train, accumulate=accumulate))
        jax.eval_shape(step, state, batch)
    assert made == [4, 8, 2]  # one micro-batch is the batch


def test_every_micro_batch_has_rows_and_samples_of_its_own():
    def gradient(state, chunk, dropout, samples):
        drawn = dropout.rows.sum().astype(jnp.float32) / 3.0
        keys = jnp.where(samples.here > 0, chunk.inputs[samples.rows, samples.times], 0)
        return drawn, LossTerms(drawn**2, drawn, drawn, drawn, {}, state, keys)

    rows = jnp.arange(6, dtype=jnp.int32)
    batch = Batch(*[10 * rows[:, None] + jnp.arange(4)] * 4)
    samples = SamplePositions(jnp.array([5, 0, 3]), jnp.array([1, 2, 3]), jnp.ones(3))
    dropout = DropoutKeys(jax.random.key(0), jax.random.key(1), rows)
    mean, terms = _in_micro_batches(gradient, 3)({"x": rows}, batch, dropout, samples)
    assert terms.state["x"].tolist() == rows.tolist()
    assert terms.keys.tolist() == [51, 2, 33]  # of the whole batch
    # Rows 0 and 3, 1 and 4, 2 and 5.
    assert float(mean) == pytest.approx((3 + 5 + 7) / 9)
    assert float(terms.nll) == pytest.approx((3**2 + 5**2 + 7**2) / 27)
