"""Causality, by gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import make_config, quick_jit, random_model
from tests.nn.cases import fresh
from transformer_vq import Model, extend

CAUSAL = {
    "gated": (make_config(num_heads=2, window_len=2, block_len=3, absolute_positions=True), [11]),
    "no_cache": (make_config("mha", window_len=1, block_len=4, use_cache=False), [11]),
    "documents": (make_config("mqa", window_len=2, block_len=3, reset_at_document=True), [11]),
    "pieces": (make_config("mha", window_len=2, block_len=3, reset_at_document=True), [7, 1, 3]),
    "full_documents": (make_config("mha", attention="full", reset_at_document=True), [11]),
}


SLOW = ("pieces",)  # test_extend cuts texts, too


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CAUSAL]
)
def test_causality(name, double):
    """The gradient of a logit for the embedding of a token is exactly zero where the token is
    later, in an earlier document, or beyond all windows; elsewhere it is not zero."""
    config, sizes = CAUSAL[name]
    length = sum(sizes)
    model = random_model(config)
    rng = np.random.default_rng(0)
    tokens = rng.permutation(config.vocab_size)[None, :length].astype(np.int32)  # all distinct
    mix = rng.normal(size=config.vocab_size)
    document_ids = (np.arange(length) >= 5).astype(np.int32)[None]

    def outputs(embedding):
        model_ = Model({**model.params, "embedding": embedding}, model.codebook, config)
        state, parts, start = fresh(config, 1), [], 0
        for size in sizes:
            part = slice(start, start + size)
            logits, state = extend(
                model_, state, tokens[:, part], document_ids=document_ids[:, part]
            )
            parts.append(logits[0] @ mix)
            start += size
        return jnp.concatenate(parts)

    # Full attention has a backward pass of its own, and no forward derivative.
    jacobian = jax.jacrev if config.attention == "full" else jax.jacfwd
    gradient = quick_jit(jacobian(outputs))(model.params["embedding"])[:, tokens[0]]
    size = np.abs(gradient).max(-1)  # [query, key]
    t, j = np.arange(length)[:, None], np.arange(length)
    sees = j <= t
    if config.reset_at_document:
        sees = sees & (document_ids[0][:, None] == document_ids[0])
    if not config.use_cache:
        sees = sees & (t - j <= config.num_units * config.window_len)
    assert (size[~sees] == 0.0).all()
    assert (size[sees] > 1e-9).all()
