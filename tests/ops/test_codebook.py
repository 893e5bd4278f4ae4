"""Codebooks that live, and states that stream: over updates, devices, parts and resumptions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.helpers as helpers
from tests.helpers import CONFIG, START, quick_jit, raw, replace, walk
from transformer_vq import Model, init_state
from transformer_vq.config import TrainConfig
from transformer_vq.data import Batch
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.nn import vq
from transformer_vq.nn.forward import Training, forward
from transformer_vq.nn.vq import SamplePositions
from transformer_vq.ops.loss import token_nll
from transformer_vq.ops.train import make_train_step, start_codebook
from transformer_vq.run import loop
from transformer_vq.run.inputs import Inputs
from transformer_vq.run.log import read_metrics
from transformer_vq.sharding import by_rows, data_mesh

TRAIN = TrainConfig(
    batch_size=8, sequence_len=16, update_len=8, steps=8, warmup_steps=0, learning_rate=0.02
)
TOKENS = walk(2000)


def one_batch(index=0) -> Batch:
    return helpers.one_batch(TRAIN, index, TOKENS)


def distance(tree, other) -> float:
    """The largest difference of two trees, relative to the largest entry."""
    pairs = zip(*map(jax.tree.leaves, (tree, other)), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


# Which keys


def test_samples_are_drawn_from_what_counts():
    mask = np.random.default_rng(1).random((8, 16)) < 0.7
    samples = vq.draw_samples(jax.random.key(0), jnp.asarray(mask), 40)
    drawn = list(zip(samples.rows.tolist(), samples.times.tolist(), strict=True))
    assert len(set(drawn)) == 40 and all(mask[at] for at in drawn)
    other = vq.draw_samples(jax.random.key(1), jnp.asarray(mask), 40)
    assert raw(other) != raw(samples)
    # Spread over devices it is the same draw.
    spread = jax.device_put(mask, by_rows(data_mesh()))
    assert raw(jax.jit(vq.draw_samples, static_argnums=2)(jax.random.key(0), spread, 40)) == raw(
        samples
    )
    # Fewer tokens than codewords: each is taken as often as another, or once more.
    few = vq.draw_samples(jax.random.key(0), jnp.arange(16)[None] < 3, 8)
    assert np.bincount(few.times).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def keys_of_first_unit(params, tokens):
    """By numpy: `[B, T, K]`."""
    unit = jax.tree.map(lambda x: np.asarray(x[0]), params["units"])

    def rms(x):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)

    x = np.asarray(params["embedding"])[tokens]
    x = rms(x) * unit["norm"]["gain"] + unit["norm"]["bias"]
    return rms(x @ unit["w_k"]) * CONFIG.d_k**-0.25


def test_keys_at_sample_positions():
    model, batch = START(CONFIG, TRAIN), one_batch()
    samples = vq.draw_samples(jax.random.key(0), jnp.asarray(batch.loss_mask), 8)

    @quick_jit
    def found(params, codebook):
        training = Training(jnp.ones((8, 16)), samples)
        tokens = jnp.asarray(batch.inputs)
        return forward(
            Model(params, codebook, CONFIG), init_state(CONFIG, 8), tokens, training=training
        ).statistics.keys

    keys = found(model.params, model.codebook)
    expected = keys_of_first_unit(model.params, batch.inputs)[samples.rows, samples.times]
    np.testing.assert_allclose(keys[0, 0], expected, rtol=1e-5, atol=1e-6)
    assert keys.shape == (2, 1, 8, 8)


# Revival


def test_revive_by_hand():
    rng = np.random.default_rng(0)
    count = np.array([[[4.0, 0.1, 1.9, 2.0]], [[0.0, 0.0, 0.0, 8.0]]], np.float32)  # [N, G, S]
    total, keys = rng.normal(size=(2, 2, 1, 4, 3)).astype(np.float32)
    codebook = jax.tree.map(jnp.asarray, {"sum": total, "count": count})
    revived = vq.revive(codebook, jnp.asarray(keys), 0.95)
    for unit, mean in ((0, 2.0), (1, 2.0)):
        for code in range(4):
            dead = count[unit, 0, code] < 0.95 * mean
            wanted = keys[unit, 0, code] if dead else total[unit, 0, code] / count[unit, 0, code]
            words = vq.codewords(jax.tree.map(lambda x, n=unit: x[n, 0], revived))
            np.testing.assert_allclose(words[code], wanted, rtol=1e-6)
            assert revived["count"][unit, 0, code] == (mean if dead else count[unit, 0, code])


@pytest.mark.slow
def test_revival_on_eight_devices_is_that_of_one_device_in_parts():
    reviving = replace(TRAIN, revive_below=0.9)

    def trained(train, devices):
        """The state after three batches, the last of them masked in part."""
        step = make_train_step(CONFIG, train, data_mesh(jax.devices()[:devices]))
        state = START(CONFIG, train)
        for i in range(3):
            batch = one_batch(i)
            batch.loss_mask[3:5, 10:] = i < 2
            state, _ = step(state, batch)
        return jax.device_get((state.codebook, state.params))

    eight, parts = trained(reviving, 8), trained(replace(reviving, accumulate=4), 1)
    assert distance(parts[0], eight[0]) < 1e-4
    assert distance(parts[1], eight[1]) < 1e-3
    # Control: it happened. Moving averages alone have this total, whatever the codes.
    total = 8.0
    for hits in (64, 64, 64, 64, 64, 64 - 12):
        total = 0.99 * total + 0.01 * hits
    assert np.all(eight[0]["count"].sum(-1) > total + 0.1)


# The first codebook


@pytest.mark.slow
def test_first_codebook_holds_keys_of_the_batch():
    state, batch = START(CONFIG, TRAIN), one_batch()
    batch.loss_mask[:, 6:] = False
    start = jax.jit(start_codebook, static_argnums=(0, 1))
    began = start(CONFIG, TRAIN, state, jax.device_put(batch, by_rows(data_mesh())))
    words = vq.codewords(began.codebook)
    keys = keys_of_first_unit(state.params, batch.inputs[:, :6]).reshape(-1, 8)
    nearest = np.abs(words[0, 0][:, None] - keys).max(-1).min(-1)
    assert nearest.max() < 1e-5
    assert np.abs(vq.codewords(state.codebook)[0, 0][:, None] - keys).max(-1).min() > 1e-2
    assert np.all(np.asarray(began.codebook["count"]) == 1)
    assert raw(began.params) == raw(state.params)
    # The second unit's are its keys once the first has its codewords, and not before.
    tokens = jnp.asarray(batch.inputs[:, :6])
    samples = SamplePositions(*jnp.divmod(jnp.arange(48), 6), jnp.ones(48))

    @jax.jit
    def second_keys(codebook):
        model = Model(state.params, codebook, CONFIG)
        training = Training(jnp.ones((8, 6)), samples)
        out = forward(model, init_state(CONFIG, 8), tokens, training=training)
        return out.statistics.keys[1, 0]

    def off(keys):
        return np.abs(words[1, 0][:, None] - keys).max(-1).min(-1).max()

    assert off(second_keys(began.codebook)) < 1e-4
    assert off(second_keys(state.codebook)) > 1e-3


# Streaming

STREAMING = replace(TRAIN, batch_size=2, streaming=True)


def streams(index: int) -> Batch:
    """Row 0 reads on and on; row 1 starts anew in batches 0 and 2."""
    rows = np.stack([TOKENS[16 * index :][:17], TOKENS[900 + 16 * index :][:17]]).astype(np.int32)
    return Batch(
        rows[:, :-1],
        rows[:, 1:],
        np.ones((2, 16), bool),
        np.zeros((2, 16), np.int32),
        np.array([index == 0, index % 2 == 0]),
    )


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was():
    """Where nothing is learnt, batches lose what the whole text loses, row by row."""
    config = CONFIG.replace(codebook_decay=1 - 1e-7)
    still = replace(STREAMING, learning_rate=1e-12, weight_decay=0.0)
    state = START(config, still)
    # What the losses must be: rows that start where a stream does, as one padded batch.
    batches = [streams(i) for i in range(3)]
    texts = [(0, 0, 3), (1, 0, 2), (1, 2, 3), (0, 2, 3), (1, 0, 3)]  # row, from, to
    inputs, targets = np.zeros((2, len(texts), 48), np.int32)
    for i, (row, first, last) in enumerate(texts):
        for name, text in (("inputs", inputs), ("targets", targets)):
            parts = [getattr(batch, name)[row] for batch in batches[first:last]]
            text[i, : 16 * (last - first)] = np.concatenate(parts)

    @jax.jit
    def nll(model, inputs, targets):
        features = forward(model, init_state(config, len(texts)), inputs).features
        return token_nll(model, features, targets).reshape(-1, 3, 16).mean(-1)

    loss = nll(Model(state.params, state.codebook, config), inputs, targets)
    expected = np.array([loss[0, 0] + loss[1, 0], loss[0, 1] + loss[1, 1], loss[0, 2] + loss[2, 0]])
    step, losses = make_train_step(config, still), []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected / 2, rtol=1e-5)
    # Controls: row 0 forgetting, or row 1 going on, would be noticed.
    assert abs(loss[3, 0] - loss[0, 2]) > 1e-4 and abs(loss[4, 2] - loss[2, 0]) > 1e-4


def test_streaming_wants_vq():
    full = CONFIG.replace(attention="full")
    with pytest.raises(ValueError, match=r"^streaming is true, but full attention cannot"):
        loop.train(full, STREAMING, TOKENS, None, "nowhere", mesh=data_mesh(jax.devices()[:1]))


@pytest.mark.slow
def test_all_that_lives_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Streams, averages, revival and a first codebook from data: 8 updates, or 6 and 2."""

    def batches(inputs, train, step, mesh):
        yield from map(streams, range(step // 2, 100))

    class Once:  # compiled once for all sessions: the schedule does not ask how long the run is
        def __init__(self, config, train, mesh):
            self.step = make_once(config, replace(train, steps=8), mesh)

        def lower(self, *_):
            return self

        def compile(self):
            return self.step

    make_once = functools.cache(make_train_step)
    monkeypatch.setattr(loop, "make_train_step", Once)
    monkeypatch.setattr(Inputs, "batches", batches)
    train = replace(
        STREAMING,
        revive_below=0.5,
        ema_decay=0.5,
        accumulate=2,
        codebook_init="data",
        schedule="inverse-sqrt",
        log_every=2,
        checkpoint_every=4,
    )
    options = dict(mesh=data_mesh(jax.devices()[:1]))

    def run(name, *sessions):
        for i, steps in enumerate(sessions):
            plan = replace(train, steps=steps)
            loop.train(CONFIG, plan, TOKENS, None, tmp_path / name, resume=i > 0, **options)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        clock = ("seconds", "tokens_per_second", "gflops", "mfu")
        return [{k: v for k, v in record.items() if k not in clock} for record in records]

    assert run("whole", 8) == run("broken", 5, 8)
    whole, broken, earlier = (
        raw(Checkpoints(tmp_path / name / "checkpoints").restore(step, START(CONFIG, train))[0])
        for name, step in (("whole", 8), ("broken", 8), ("broken", 6))
    )
    assert whole == broken != earlier
