"""Key shift against a plain loop: ragged rows, documents, and the key that is carried on."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from tests.helpers import close, far, make_config
from transformer_vq import init_state
from transformer_vq.nn.shift import key_mix, last_key, shift_keys
from transformer_vq.nn.timeline import make_timeline

CONFIG = make_config("mha", num_heads=2, key_shift=True, reset_at_document=True)
B, T, G, K = 3, 6, 2, CONFIG.d_k


def test_shift_keys(double):
    rng = np.random.default_rng(0)
    keys, previous = rng.normal(size=(B, T, G, K)), rng.normal(size=(B, G, K))
    mix = rng.uniform(size=(G, K))
    ids = np.array([[0, 0, 0, 2, 2, 3], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32)
    lengths = np.array([6, 4, 0])
    state = replace(init_state(CONFIG, B), position=jnp.full(B, 9, jnp.int32))
    timeline = make_timeline(CONFIG, state, jnp.asarray(lengths, jnp.int32), T, jnp.asarray(ids))[0]
    given = jnp.asarray(keys), jnp.asarray(mix), jnp.asarray(previous)
    found, last = shift_keys(*given, timeline), last_key(given[0], given[2], timeline.length)
    for b in range(B):
        for t in range(lengths[b]):
            before = previous[b] if t == 0 else keys[b, t - 1]
            document = 0 if t == 0 else ids[b, t - 1]  # the state is in document 0
            before = before if ids[b, t] == document else np.zeros((G, K))
            close(found[b, t], (1 - mix) * keys[b, t] + mix * before, 1e-13)
        expected = keys[b, lengths[b] - 1] if lengths[b] else previous[b]
        np.testing.assert_array_equal(last[b], expected)
    far(found[1, 0], (1 - mix) * keys[1, 0] + mix * previous[1])  # control: another document


def test_share_of_the_key_before():
    """A half at the start; by channel."""
    shares = key_mix({"key_shift": jnp.zeros(G * K).at[1].set(50.0)}, CONFIG)
    assert shares.shape == (G, K)
    np.testing.assert_allclose(shares.ravel()[:3], [0.5, 1.0, 0.5])
