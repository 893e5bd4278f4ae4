"""Large inputs go through a unit in chunks: same values, states, statistics and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import (
    BATCH,
    LENGTH,
    close,
    far,
    quick_jit,
    random_inputs,
    random_model,
    tune,
)
from tests.nn.cases import CASES, fresh, run_reference
from transformer_vq import Model
from transformer_vq.nn.attention import keep_keys, window
from transformer_vq.nn.dropout import DropoutKeys
from transformer_vq.nn.embedding import to_logits
from transformer_vq.nn.forward import Training, forward
from transformer_vq.nn.rows import chunking

VQ = [name for name, config in CASES.items() if config.attention == "vq"]


def run(config, tokens_per_chunk, monkeypatch, lengths=None, keys=False, remat=False, dropout=None):
    """Features, state and statistics of a text, and the gradient of a mix of them."""
    tune(monkeypatch, tokens_per_chunk=tokens_per_chunk)
    model = random_model(config)
    tokens, document_ids, _ = map(jnp.asarray, random_inputs(config))
    rng = np.random.default_rng(5)
    lengths = jnp.full(BATCH, LENGTH, jnp.int32) if lengths is None else jnp.asarray(lengths)
    real = np.arange(LENGTH, dtype=np.int32) < lengths[:, None]
    weights = jnp.where(real, 1.0 * rng.integers(0, 2, tokens.shape), 0.0)
    probe = rng.normal(size=(*tokens.shape, config.d_model))
    state = fresh(config, BATCH)
    if keys:
        units = tuple(keep_keys(unit, config) for unit in state.units)
        state = dataclasses.replace(state, units=units)

    def loss(params, dropout):  # with any keys the same program
        out = forward(
            Model(params, model.codebook, config),
            state,
            tokens,
            lengths=lengths,
            document_ids=document_ids,
            training=Training(weights, dropout=dropout, remat=remat),
        )
        features = jnp.where(real[..., None], out.features, 0)
        loss = (features * probe).sum() + out.statistics.commitment
        return loss, (features, out.state, out.statistics)

    (_, out), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(model.params, dropout)
    return out, grads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "remat"),
    [(n, n == "gated_heads_documents") for n in VQ],
)
def test_chunks_are_as_the_whole(name, remat, double, monkeypatch):
    config = CASES[name]
    assert chunking(config, BATCH, LENGTH) == (1, LENGTH, 1)
    expected, expected_grads = run(config, 10**6, monkeypatch)
    out, grads = run(config, 1, monkeypatch, remat=remat)
    micro_batches, size, count = chunking(config, BATCH, LENGTH)
    assert (micro_batches, size, count) == (BATCH, config.block_len, -(-LENGTH // size))
    close(out, expected)
    close(grads, expected_grads)
    if name == "gated":  # control: without the keys of the state, gradients end where a chunk does
        monkeypatch.setattr(window, "window_keys", cut_off)
        far(run(config, 1, monkeypatch)[1], expected_grads)


def cut_off(state, words, dtype, window_keys=window.window_keys):
    return jax.lax.stop_gradient(window_keys(state, words, dtype))


@pytest.mark.slow
def test_chunks_are_as_the_oracle(double, monkeypatch):
    """Logits by the quadratic oracle, of a model that reads its text in six chunks."""
    config = CASES["gated_heads_documents"]
    model, inputs = random_model(config), list(map(jnp.asarray, random_inputs(config)))
    logits, _ = run_reference(config, model.params, model.codebook, *inputs)
    tune(monkeypatch, tokens_per_chunk=1)
    out = forward(model, fresh(config, BATCH), inputs[0], document_ids=inputs[1])
    close(to_logits(model.params, out.features, config), logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated_heads_documents", "memory_documents"])
def test_ragged_rows_and_kept_keys(name, double, monkeypatch):
    config = CASES[name]
    lengths = np.array([LENGTH, 0, 9], np.int32)
    expected, expected_grads = run(config, 10**6, monkeypatch, lengths, keys=True)
    out, grads = run(config, 1, monkeypatch, lengths, keys=True)
    close(out, expected)
    close(grads, expected_grads)


@pytest.mark.parametrize("name", ["decay_cap_documents", "memory_documents"])
def test_rows_that_end_before_a_chunk(name, double, monkeypatch):
    """They go on as after one chunk; and no key is younger than the token that was read last."""
    model, lengths = random_model(CASES[name]), np.array([LENGTH, 0, 6], np.int32)
    tokens, document_ids, _ = map(jnp.asarray, random_inputs(model.config))

    def after(tokens_per_chunk):
        tune(monkeypatch, tokens_per_chunk=tokens_per_chunk)
        read = quick_jit(
            lambda state, tokens, lengths: forward(
                model, state, tokens, lengths=lengths, document_ids=document_ids
            )
        )
        state = read(fresh(model.config, BATCH), tokens, np.full_like(lengths, LENGTH)).state
        return read(state, tokens[:, ::-1], lengths).state

    whole, chunks = after(10**6), after(1)
    close(chunks, whole)
    assert all((unit.ages <= 0).all() for unit in chunks.units)


@pytest.mark.slow
def test_no_gradient_through_the_cache(double, monkeypatch):
    config = CASES["gated"].replace(grad_through_cache=False)
    expected, expected_grads = run(config, 10**6, monkeypatch)
    out, grads = run(config, 1, monkeypatch)
    close(out, expected)
    close(grads, expected_grads)
    far(grads, run(CASES["gated"], 1, monkeypatch)[1])


@pytest.mark.slow
def test_dropout_does_not_depend_on_chunks(double, monkeypatch):
    """Every block of every row draws for itself."""
    rates = dict(embedding=0.2, residual=0.3, layer=0.4, sinusoid=0.2)
    config = CASES["gated"].replace(**{f"dropout_{name}": rate for name, rate in rates.items()})
    keys = DropoutKeys(jax.random.key(0), jax.random.key(1), jnp.arange(BATCH))
    expected = run(config, 10**6, monkeypatch, dropout=keys)
    close(run(config, 1, monkeypatch, dropout=keys), expected)
    other = DropoutKeys(jax.random.key(2), jax.random.key(1), jnp.arange(BATCH))
    far(run(config, 1, monkeypatch, dropout=other)[0][0], expected[0][0])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("embedding", marks=pytest.mark.slow),
        "residual",
        pytest.param("layer", marks=pytest.mark.slow),
    ],
)
def test_every_row_drops_for_itself(name, double):
    config = CASES["gated"].replace(**{f"dropout_{name}": 0.5})
    model, tokens = random_model(config), jnp.ones((8, 5), jnp.int32)

    def features(rows):
        keys = DropoutKeys(jax.random.key(0), jax.random.key(1), jnp.asarray(rows))
        training = Training(jnp.ones(tokens.shape), dropout=keys)
        return np.asarray(forward(model, fresh(config, 8), tokens, training=training).features)

    own, same = features(range(8)), features([3] * 8)
    close(same, np.repeat(own[3:4], 8, 0))
    far(own, np.repeat(own[3:4], 8, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memory_documents", "full_documents"])
def test_states_may_be_written_where_they_were_read(double, monkeypatch, name):
    """As for TPUs, where a call of many tokens carries the states of all units along."""
    config = CASES[name]
    model, (tokens, document_ids, _) = random_model(config), random_inputs(config)

    def two_calls(in_place):
        tune(monkeypatch, states_in_place=in_place)

        def run(state):
            for part in (slice(0, LENGTH // 2), slice(LENGTH // 2, LENGTH)):
                given = (jnp.asarray(x[:, part]) for x in (tokens, document_ids))
                out = forward(model, state, next(given), document_ids=next(given))
                state = out.state
            return out.features, state

        return str(jax.make_jaxpr(run)(fresh(config, BATCH))), quick_jit(run)(fresh(config, BATCH))

    (plain, wanted), (carried, found) = two_calls(False), two_calls(True)
    assert plain != carried  # control: it is another program
    close(found, wanted)
