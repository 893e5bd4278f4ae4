"""Training: the optimizer, one step, and runs that are the same however they are interrupted."""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_vq import Model, ModelConfig, init_model, init_state
from transformer_vq.config import TrainConfig
from transformer_vq.data import Batch, Batches, DataError
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.io.official import from_official
from transformer_vq.nn import pieces as pieces_module
from transformer_vq.ops.loss import loss_fn
from transformer_vq.ops.optimizer import decayed, learning_rate_at, make_optimizer
from transformer_vq.ops.train import (
    TrainState,
    codebook_metrics,
    dropout_keys,
    init_train_state,
    make_train_step,
)
from transformer_vq.run import loop, samples
from transformer_vq.run.folder import DataSource, RunError, load_info, load_run
from transformer_vq.run.log import MetricsLog, read_metrics
from transformer_vq.sharding import data_mesh
from transformer_vq.show.console import Console
from transformer_vq.show.progress import Progress, duration

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=8, window_len=5
)
TRAIN = TrainConfig(
    batch_size=2,
    sequence_len=16,
    update_len=8,
    steps=20,
    warmup_steps=4,
    learning_rate=0.02,
    log_every=2,
    evaluate_every=8,
    evaluate_tokens=64,
    checkpoint_every=4,
    keep_checkpoints=9,
)
TOKENS = (np.random.default_rng(0).integers(0, 8, 600).cumsum() % 32).astype(np.uint8)


START = jax.jit(init_train_state, static_argnums=(0, 1))


def replace(config, **changes):
    return type(config)(**{**vars(config), **changes})


def one_batch(train=TRAIN, index=0) -> Batch:
    options = dict(batch_size=train.batch_size, sequence_len=train.sequence_len, seed=train.seed)
    return Batches(TOKENS, **options).batch(index)


def raw(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# The optimizer


def test_learning_rate():
    train = TrainConfig(learning_rate=0.5, warmup_steps=10, steps=110, final_learning_rate=0.1)
    rates = [float(learning_rate_at(train, step)) for step in (0, 5, 10, 60, 110, 1000)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.275, 0.05, 0.05], rtol=1e-6)
    no_warmup = replace(train, warmup_steps=0)
    assert float(learning_rate_at(no_warmup, 0)) == 0.5
    short = replace(train, steps=5)  # ends while it warms up
    assert float(learning_rate_at(short, 5)) == 0.25


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


def test_weight_decay_is_not_scaled_by_the_learning_rate():
    train = replace(TRAIN, weight_decay=0.25, warmup_steps=4)
    params = jax.tree.map(jnp.ones_like, START(CONFIG, TRAIN).params)
    optimizer = make_optimizer(train, CONFIG)
    changes, _ = optimizer.update(params, optimizer.init(params), params)  # at rate 0
    expected = jax.tree.map(lambda p, d: jnp.full_like(p, -0.25 * d), params, decayed(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, changes, expected)


def test_adam_by_hand_in_float32():
    """Two updates of bfloat16 parameters, against the formulas; and clipping changes the second."""
    train = replace(TRAIN, warmup_steps=0, weight_decay=0.0, grad_clip=1.0, steps=10**6)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), START(CONFIG, TRAIN).params)
    optimizer = make_optimizer(train, CONFIG)
    state = optimizer.init(params)
    gradients = [jax.tree.map(lambda p, c=c: jnp.full_like(p, c), params) for c in (0.5, -2.0)]
    for grads in gradients:
        changes, state = optimizer.update(grads, state, params)
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
    state = free.init(params)
    for grads in gradients:
        changes, state = free.update(grads, state, params)
    assert abs(float(changes["output_bias"][0]) - expected) > 0.1 * abs(expected)


# The train step


@pytest.fixture(scope="module")
def parity(parity_dir):
    arrays = dict(np.load(parity_dir / "f32_train_op.npz"))
    config = json.loads(str(arrays["config_json"]))

    def tree(prefix):
        return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}

    def model(index):
        return from_official(tree(f"params_{index}/"), config)

    return json.loads(str(arrays["optimizer_json"])), tree, model


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
        recorded, share = tree(f"metrics_{i}/"), batch["loss_mask"].mean()
        loss = metrics["loss"] * share  # theirs is per place, masked or not
        assert float(loss) == pytest.approx(recorded["loss_lm_per_token_unscaled"], abs=1e-5)
        commitment = metrics["commitment"] * share
        assert float(commitment) == pytest.approx(recorded["loss_commit_per_token"], abs=1e-4)
        expected = model(i + 1)
        ours = jax.tree.leaves_with_path((state.params, state.codebook))
        theirs = jax.tree.leaves((expected.params, expected.codebook))
        for (path, actual), wanted in zip(ours, theirs, strict=True):
            error = np.abs(actual - wanted).max() / np.abs(wanted).max()
            assert error < 1e-4, jax.tree_util.keystr(path)
        assert raw(state.params) != before  # control: something was learnt


@pytest.fixture(scope="module")
def step():
    return make_train_step(CONFIG, TRAIN)


def test_learns(step):
    """The same batch again and again: its loss falls by far."""
    state, losses = START(CONFIG, TRAIN), []
    for _ in range(10):
        state, metrics = step(state, one_batch())
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 20
    assert losses[-1] < losses[0] - 1.0
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    by_unit = {name for name, value in metrics.items() if value.shape == (CONFIG.num_units,)}
    assert by_unit == {"codebook_used_by_unit", "codebook_perplexity_by_unit"}
    assert all(np.ndim(metrics[name]) == 0 for name in metrics.keys() - by_unit)


def test_what_is_masked_takes_no_part(step):
    batch = one_batch()
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


def test_the_state_is_carried_from_piece_to_piece():
    """Where nothing is learnt, the pieces lose what the sequence loses when it is taken whole."""
    config = CONFIG.replace(codebook_decay=1 - 1e-9)
    still = replace(TRAIN, learning_rate=1e-12, weight_decay=0.0)
    step = make_train_step(config, still)

    def losses(batch):
        """By the train step, and by the loss of the whole."""
        start = START(config, still)
        model = Model(start.params, start.codebook, config)
        whole = jax.jit(loss_fn)(start.params, model, init_state(config, 2), *batch[:3])[1].nll
        places = batch.loss_mask.mean()
        return float(step(start, batch)[1]["loss"]), float(whole / places)

    late = np.broadcast_to(np.arange(16) >= 8, (2, 16))
    batch = one_batch()._replace(loss_mask=late)  # of the second piece only
    pieces, whole = losses(batch)
    assert pieces == pytest.approx(whole, abs=1e-6)
    # Control: what was in the first piece matters.
    other = batch._replace(inputs=np.where(late, batch.inputs, 5))
    assert abs(losses(other)[0] - pieces) > 1e-4


def test_eight_devices_are_as_one(monkeypatch):
    """Rows take turns: on one device in 16 parts, on eight in 2."""
    assert jax.device_count() >= 8
    monkeypatch.setattr(pieces_module, "TOKENS_PER_PIECE", {"others": TRAIN.update_len})
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
    assert first[0] != second[0] and first[1] == second[1]  # pieces of one sequence
    assert second[0] != third[0] and second[1] != third[1]
    assert keys(0, seed=1)[1] != first[1]
    assert len({key for step in range(6) for key in keys(step)}) == 9  # 6 calls, 3 sequences


def test_full_attention_trains():
    config = CONFIG.replace(attention="full")
    state, metrics = make_train_step(config, TRAIN)(START(config, TRAIN), one_batch())
    assert np.isfinite(float(metrics["loss"])) and "codebook_used" not in metrics
    assert raw(state.codebook) == raw(START(config, TRAIN).codebook)


def test_codebook_metrics():
    counts = jnp.array([[[4.0, 4, 0, 0]], [[2, 2, 2, 2]]])  # [N, G, S]
    metrics = codebook_metrics(counts)
    assert float(metrics["codebook_used"]) == 0.75
    assert float(metrics["codebook_perplexity"]) == pytest.approx(3.0)
    assert metrics["codebook_used_by_unit"].tolist() == [0.5, 1.0]
    np.testing.assert_allclose(metrics["codebook_perplexity_by_unit"], [2.0, 4.0], rtol=1e-6)


# Runs

DROPOUT = CONFIG.replace(dropout_residual=0.1, dropout_sinusoid=0.1, dropout_layer=0.1)


def train(folder, config=DROPOUT, train=TRAIN, tokens=TOKENS[:540], **options):
    mesh = data_mesh(jax.devices()[:1])
    options = {"data": DataSource.of("walk", TOKENS), "mesh": mesh, **options}
    return loop.train(config, train, tokens, TOKENS[540:], folder, **options)


def history(folder):
    """The lines of metrics.jsonl, without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "gflops", "mfu")
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def weights(folder, step=None):
    state = START(DROPOUT, TRAIN)
    return raw(Checkpoints(folder / "checkpoints").restore(step, state)[0])


class Compiled:
    """A train step that is compiled once for all runs in here, and may be told to go wrong."""

    bad_step, bad_loss = None, jnp.nan

    def __init__(self, *arguments):
        self.step = make_train_step(*arguments)

    def lower(self, *_):
        return self

    def compile(self):
        return self

    def __call__(self, state, batch):
        state, metrics = self.step(state, batch)
        return state, metrics | ({"loss": self.bad_loss} if state.step == self.bad_step else {})


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", functools.cache(Compiled))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 updates, and what it told on its way."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    records = []
    result = train(folder, on_record=records.append)
    return folder, result, records


def test_a_run_leaves_its_metrics(run):
    folder, result, records = run
    lines = read_metrics(folder / "metrics.jsonl")
    assert (result.status, result.step) == ("done", 20)
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(2, 21, 2))
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [8, 16, 20]
    assert result.validation_loss == validations[-1]["validation_loss"]
    assert validations[0]["validation_tokens"] == 59
    for line in losses:
        assert line["bpb"] == pytest.approx(line["loss"] / np.log(2))
        for name in ("tokens_per_second", "seconds", "grad_norm", "codebook_perplexity"):
            assert line[name] > 0
        assert 0 < line["codebook_used"] <= 1
    assert validations[-1]["validation_loss"] < validations[0]["validation_loss"]
    assert records == lines  # here every batch is logged
    assert Checkpoints(folder / "checkpoints").steps() == [4, 8, 12, 16, 20]


def test_a_run_can_be_loaded(run):
    folder, result, _ = run
    model, info = load_run(folder)
    assert (info.step, info.config, info.train, info.tokenizer) == (20, DROPOUT, TRAIN, "bytes")
    assert info.data == DataSource.of("walk", TOKENS) and info.seconds > 0
    state, _ = Checkpoints(folder / "checkpoints").restore(20, START(DROPOUT, TRAIN))
    assert raw(model) == raw(Model(state.params, state.codebook, DROPOUT))
    assert load_info(folder, 8).step == 8
    content = json.loads((folder / "config.json").read_text())
    assert content["config"] == DROPOUT.to_dict() and content["data"]["path"] == "walk"


def test_interrupted_and_resumed_is_unbroken(run, tmp_path):
    """Ctrl-C after 6 updates, then a resume: the same lines and the same weights, bit for bit."""
    whole, *_ = run

    def interrupt(record):
        if record["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)

    said = []
    stopped = train(tmp_path / "run", on_record=interrupt, say=said.append)
    # The batch of 8 was under way when 6 was read; its validation waits for the resume.
    assert (stopped.status, stopped.step) == ("interrupted", 8)
    assert f"saved step 8 in {tmp_path}/run/checkpoints" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert history(tmp_path / "run") == history(whole)[:4]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:  # a future that never came
        file.write('{"step": 10, "loss": 1.0}\n{"step": 12, "lo')
    resumed = train(tmp_path / "run", resume=True, say=said.append)
    assert (resumed.status, resumed.step) == ("done", 20)
    assert "resuming at step 8" in said
    assert history(tmp_path / "run") == history(whole)
    assert weights(tmp_path / "run") == weights(whole)
    assert weights(whole) != weights(whole, 16)  # control
    again = train(tmp_path / "run", resume=True, say=lambda text: said.append(text))
    assert again.status == "done" and said[-1] == "resuming at step 20"  # nothing was compiled


def test_time_limit(run, tmp_path):
    """It stops after a batch at least; the schedule and all else is as without a limit."""
    result = train(tmp_path / "run", max_seconds=0.0)
    assert (result.status, result.step) == ("out of time", 2)
    assert load_info(tmp_path / "run").step == 2
    first, validation = history(tmp_path / "run")
    assert first == history(run[0])[0]
    assert validation["validation_loss"] == result.validation_loss


def test_divergence_names_the_last_good_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Compiled, "bad_step", 8)
    with pytest.raises(
        RunError, match=r"loss is nan at step 8, and step 4 in .*checkpoints is the"
    ):
        train(tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]
    assert history(tmp_path / "run")[-1]["step"] == 6
    monkeypatch.setattr(Compiled, "bad_step", 2)
    with pytest.raises(RunError, match="loss is nan at step 2, and nothing was saved before"):
        train(tmp_path / "other")


def test_a_loss_spike_names_the_last_good_step(run, tmp_path, monkeypatch):
    usual = np.median([line["loss"] for line in history(run[0]) if "loss" in line][:8])
    monkeypatch.setattr(Compiled, "bad_step", 18)
    monkeypatch.setattr(Compiled, "bad_loss", usual + 3.1)
    with pytest.raises(
        RunError, match=rf"max_loss_spike \(3\) above the {usual:.4f} of .*step 16 "
    ):
        train(tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 16
    off = replace(TRAIN, max_loss_spike=0.0)
    assert train(tmp_path / "run", train=off, resume=True).status == "done"
    monkeypatch.setattr(Compiled, "bad_loss", usual + 2.9)  # control
    assert train(tmp_path / "other").status == "done"


def test_samples_change_nothing_else(run, tmp_path, monkeypatch):
    """Samples at each validation, interrupted within one: the run is as one without samples."""
    plan = replace(TRAIN, sample_tokens=12)
    options = dict(train=plan, decode=lambda tokens: " ".join(map(str, tokens)))
    with monkeypatch.context() as patch:
        patch.setattr(samples, "stream", lambda *_: (os.kill(os.getpid(), signal.SIGINT), [1])[1])
        stopped = train(tmp_path / "run", **options)
    assert (stopped.status, stopped.step) == ("interrupted", 8)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""
    with open(tmp_path / "run" / "samples.jsonl", "a") as file:  # a future that never came
        file.write('{"step": 16, "text": "1"}\n')
    assert train(tmp_path / "run", resume=True, **options).status == "done"
    lines = read_metrics(tmp_path / "run" / "samples.jsonl")
    assert [line["step"] for line in lines] == [8, 16, 20]
    assert {line["prompt"] for line in lines} == {" ".join(map(str, TOKENS[540:556]))}
    assert all(len(line["text"].split()) == 12 for line in lines)
    assert len({line["text"] for line in lines}) > 1  # the model learns
    assert history(tmp_path / "run") == history(run[0])
    assert weights(tmp_path / "run") == weights(run[0])


def test_a_disk_that_fills_up(tmp_path):
    """Between checkpoints, where a line of metrics.jsonl is what finds no room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED: needs the right to mount a small tmpfs")
    filler, full = disk / "filler", "the disk of .* is full, and step 2 in .*: free some space"

    def fill(record):
        if not filler.exists():
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(2 << 20))

    try:
        train(disk / "run", max_seconds=0.0)
        long = replace(TRAIN, steps=60, checkpoint_every=1000, evaluate_every=0)
        with pytest.raises(RunError, match=full):
            train(disk / "run", train=long, resume=True, on_record=fill)
        torn = (disk / "run" / "metrics.jsonl").read_bytes()
        assert len(torn) % 4096 == 0  # a line that was cut is left out, and goes at the resume
        assert 2 < read_metrics(disk / "run" / "metrics.jsonl")[-1]["step"] < 60
        with pytest.raises(RunError, match=r"cannot write .*config\.json: No space left"):
            train(disk / "run", train=long, resume=True)
        assert load_run(disk / "run")[1].step == 2
        assert not list((disk / "run").glob(".*"))  # drafts
        filler.unlink()
        assert train(disk / "run", train=long, resume=True).step == 60
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_resume_refuses_another_run(run):
    folder, *_ = run
    others = [
        (dict(config=DROPOUT.replace(d_model=32)), "has d_model 16, not 32"),
        (dict(config=CONFIG), "has dropout_sinusoid 0.1, not 0.0"),
        (dict(train=replace(TRAIN, batch_size=4)), "has batch_size 2, not 4"),
        (dict(train=replace(TRAIN, seed=3)), "has seed 0, not 3"),
        (dict(tokenizer="other"), "has tokenizer bytes, not other"),
        (dict(data=DataSource.of("moby", TOKENS[:-1])), r"was trained on other data \(walk, 600"),
    ]
    before = sorted(folder.rglob("*"))
    for options, message in others:
        with pytest.raises(RunError, match=message):
            train(folder, resume=True, **options)
    with pytest.raises(RunError, match="already holds a run, at step 20: resume it"):
        train(folder)
    assert sorted(folder.rglob("*")) == before


def test_errors_are_a_sentence(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match=r"no run folder .*missing to resume"):
        train(missing, resume=True)
    with pytest.raises(RunError, match=r"there is no run folder .*missing"):
        load_run(missing)
    with pytest.raises(RunError, match="empty has no checkpoint"):
        load_run(empty)
    with pytest.raises(DataError, match="has 1 of the 17 tokens"):
        train(missing, tokens=TOKENS[:1])
    with pytest.raises(ValueError, match="token 99 at position 2 is outside"):
        train(missing, tokens=np.where(np.arange(100) == 2, 99, 0))
    with pytest.raises(ValueError, match="batch_size is 2: it must be a multiple of the 8 devices"):
        train(missing, mesh=data_mesh(jax.devices()[:8]))
    assert not missing.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make the run folder"):
        train(tmp_path / "file" / "run")


# On the terminal


def test_metrics_log_drops_the_future(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "validation_loss": 3.5}\n{"step": 3}\n{"st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    with contextlib.closing(MetricsLog(path, 2)) as log:
        assert (log.validation_loss(2), log.validation_loss(1)) == (3.5, None)
        log.write({"step": 3, "loss": 0.5})
        assert read_metrics(path)[-1] == {"step": 3, "loss": 0.5}  # at once
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, legacy_windows=False)
    record = {"loss": 1.5, "bpb": 2.164, "tokens_per_second": 512.0, "codebook_used": 0.5}
    record["seconds"] = 83.0
    with Progress(100, 1024, console=console) as progress:
        progress.say("resuming at [step] 39")
        progress.show({"step": 40, **record})
        progress.saved(40)
        progress.show({"step": 41, **record})
        progress.show({"step": 41, "validation_loss": 1.25, "validation_bpb": 1.8034})
    text = out.getvalue()
    wanted = ["resuming at [step] 39", "1.5000", "2.1640", "512", "tokens/s", "codes", "50%"]
    assert all(part in text for part in [*wanted, "step 41: validation loss 1.2500, 1.8034 bpb"])
    assert ("step 40/100  loss 1.5000  bpb 2.1640" in text) != terminal  # not shown when it is over
    assert ("2:00 left" in text) != terminal
    for part in ("1:58 left", " 41/100  41%", "validation 1.8034 bpb, the best", "checkpoint 40"):
        assert (part in text) == terminal


def test_duration():
    assert [duration(s) for s in (0.4, 65, 3600, 90_061)] == ["0:00", "1:05", "1:00:00", "25:01:01"]


SCRIPT = """
import sys
import numpy as np
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.run.loop import train

tokens = (np.random.default_rng(0).integers(0, 8, 600).cumsum() % 32).astype(np.uint8)
config = ModelConfig(vocab_size=32, d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=8,
                     window_len=5, dropout_residual=0.1)
plan = TrainConfig(batch_size=2, sequence_len=16, update_len=8, steps=2000, log_every=2,
                   evaluate_every=100, checkpoint_every=20)
result = train(config, plan, tokens[:540], tokens[540:], sys.argv[1], resume="resume" in sys.argv,
               say=lambda text: print(text, flush=True))
print(result.status)
sys.exit(130 if result.status == "interrupted" else 0)
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_unbroken(tmp_path, user_env):
    """Processes, kill -9 and SIGTERM among them: two runs from start to end read the same."""

    def start(name, *options):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), *options]
        return subprocess.Popen(command, env=user_env, stdout=subprocess.PIPE, text=True)

    def lines(name):
        return len(read_metrics(tmp_path / name / "metrics.jsonl"))

    def stop_at(name, count, number, *options):
        process = start(name, *options)
        while lines(name) < count:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))  # in an update, a validation, a save
        process.send_signal(number)
        return process.communicate()[0], process.returncode

    whole = start("whole")
    assert stop_at("killed", 150, signal.SIGKILL)[1] == -signal.SIGKILL
    for count in (300, 450, 600):
        stop_at("killed", count, signal.SIGKILL, "resume")
    said, code = stop_at("killed", 750, signal.SIGTERM, "resume")
    assert code == 130 and "saved step" in said
    out, _ = start("killed", "resume").communicate()
    assert out.endswith("done\n")
    assert whole.communicate()[0].endswith("done\n")
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == 1000 + 20
