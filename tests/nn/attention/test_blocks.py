"""The steps of `attend_blocks`, in `blocks.py` and `window.py`, each against the plain meaning."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from tests.helpers import close, make_config
from transformer_vq import init_state
from transformer_vq.nn.attention import QKV, AttentionWeights, blocks
from transformer_vq.nn.attention.cache import Cache
from transformer_vq.nn.attention.inputs import Window
from transformer_vq.nn.attention.window import (
    Layout,
    keys_in_reach,
    ring_in_time,
    slide,
    spans,
    visible_keys,
)
from transformer_vq.nn.timeline import KeyDocuments, make_timeline

B, G = 3, 2


def window_of(times, batch=B, groups=G, d_k=4, d_v=6):
    """Keys that carry their time, in codes, keys and values."""
    times = np.asarray(times)
    shape = (batch, groups, len(times))
    keys, values = (np.broadcast_to(times[:, None], (*shape, d)) for d in (d_k, d_v))
    codes = np.broadcast_to(times, shape).astype(np.int32)
    return Window(
        jnp.asarray(codes), *(jnp.asarray(x, jnp.float32) for x in (keys, values)), fades=None
    )


def times_of(window):
    """The times of its keys; codes, keys and values must agree."""
    codes, keys, values = map(np.asarray, (window.codes, window.keys, window.values))
    assert (keys == codes[..., None]).all() and (values == codes[..., None]).all()
    return np.asarray(window.codes[0, 0])


SMALL = make_config("mqa", num_heads=3, window_len=6, block_len=4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 19, 400])
@pytest.mark.parametrize("fitting", [1, 3, 10**6])
def test_layout(length, fitting, monkeypatch):
    """Chunks are as few as fit, hold all tokens, and none is empty."""
    block = min(4, length)
    scores = B * 3 * block * (6 + block + 5)
    monkeypatch.setattr(blocks, "SCORES_PER_CHUNK", fitting * scores)
    cut = blocks.layout(SMALL, B, length)
    fitting = min(fitting, blocks.BLOCKS_PER_CHUNK)
    assert cut.block == block
    assert cut.blocks_per_chunk <= fitting
    assert cut.chunks == -(-length // (block * fitting))
    assert (cut.chunks - 1) * cut.tokens < length <= cut.chunks * cut.tokens


def test_layout_without_gradients_through_the_cache():
    assert blocks.layout(SMALL.replace(grad_through_cache=False), B, 19) == Layout(6, 4, 1, 5)


@pytest.mark.parametrize("window", [0, 3, 8, 11])
def test_slide(window):
    """As many leave as come, the oldest first; the rest stays, in order."""
    old, new = window_of(range(window)), window_of(range(window, window + 8))
    leaving, staying = slide(old, new)
    np.testing.assert_array_equal(times_of(leaving), np.arange(8))
    np.testing.assert_array_equal(times_of(staying), 8 + np.arange(window))


@pytest.mark.parametrize("window", [0, 3, 4, 11])
def test_spans(window):
    """Each of two blocks of 4 sees the keys just before it, and its own."""
    old, new = window_of(range(window)), window_of(range(window, window + 8))
    before, own = spans(old.keys, new.keys, Layout(window, 4, 2, 1))
    for i in range(2):
        start = window + 4 * i
        np.testing.assert_array_equal(before[0, 0, i, :, 0], np.arange(start - window, start))
        np.testing.assert_array_equal(own[0, 0, i, :, 0], np.arange(start, start + 4))


@pytest.mark.parametrize("use_cache", [True, False])
def test_visible_keys(use_cache):
    """Own and older keys of the document; without a cache none beyond the window."""
    config, start = SMALL.replace(use_cache=use_cache), 9
    first = np.array([[[-5] * 4, [-5, -5, 21, 22]]])
    seen = visible_keys(
        keys_in_reach(Layout(config.window_len, 4, 1, 1), config),
        jnp.asarray(first),
        jnp.asarray(start),
    )
    for block, query, column in itertools.product(range(2), range(4), range(10)):
        index = start + 4 * block + column
        query_index = start + 4 * block + 6 + query
        expected = first[0, block, query] <= index <= query_index
        expected &= use_cache or index >= query_index - 6
        assert seen[0, block, query, column] == expected


def test_ring_in_time(double):
    """Slot p mod W holds position p: read from the oldest on."""
    config = make_config(window_len=4)  # one head
    start = np.array([0, 7, 13])
    slots = np.arange(5)
    newest = start[:, None] - 1 - (start[:, None] - 1 - slots) % 5  # position in each slot
    state = init_state(config, B)
    unit = replace(
        state.units[0],
        codes=jnp.asarray(newest[:, None], jnp.int32),
        values=jnp.zeros_like(state.units[0].values).at[:, 0, :5].set(newest[:, :, None] * 1.0),
        keys=jnp.asarray(np.broadcast_to(newest[:, None, :, None], (B, 1, 5, 4)), jnp.float32),
    )
    timeline = timeline_of(config, start, [1, 1, 1], 1)
    ring = ring_in_time(unit, jnp.zeros((1, 5, 4), jnp.float32), timeline, np.dtype("float32"))
    expected = start[:, None] - 5 + np.arange(5)
    np.testing.assert_array_equal(ring.codes[:, 0], expected)
    np.testing.assert_array_equal(ring.keys[:, 0, :, 1], expected)
    np.testing.assert_array_equal(ring.values[:, 0, :, 2], expected)


def timeline_of(config, start, lengths, size, document_ids=None):
    state = replace(init_state(config, B), position=jnp.asarray(start, jnp.int32))
    return make_timeline(config, state, jnp.asarray(lengths, jnp.int32), size, document_ids)[0]


def test_state_after(double):
    """Each of the newest W keys is in the slot of its position; the cache of a document that is
    over is emptied."""
    config = make_config("mha", num_heads=G, window_len=4, reset_at_document=True)
    ring_len, size = 5, 9
    start, lengths = [0, 7, 13], [9, 0, 3]
    ids = np.zeros((B, size), np.int32)
    ids[0, 6:] = 1  # a document begins
    timeline = timeline_of(config, start, lengths, size, jnp.asarray(ids))
    documents = KeyDocuments.of(timeline, ring_len)
    ring, new = window_of(range(ring_len)), window_of(range(ring_len, ring_len + size))
    mass = jnp.ones((B, G, config.codebook_size), jnp.int32)
    means = jnp.full((*mass.shape, config.d_v), 7.0)
    cache = Cache(mass, means, timeline.first_before)
    old = jax.tree.map(lambda a: a + 1, init_state(config, B).units[0])
    state = blocks.state_after(old, ring, new, cache, timeline, documents)
    for b in range(B):
        for age in range(ring_len):
            position = start[b] + lengths[b] - 1 - age
            time = ring_len + lengths[b] - 1 - age  # its timeline index
            assert (state.codes[b, :, position % ring_len] == time).all()
            assert (state.values[b, :, position % ring_len] == time).all()
        current = b != 0
        assert (state.counts[b] == (1 if current else 0)).all()
        table = state.values[b, :, ring_len:]
        assert (table[:, : config.codebook_size] == (7 if current else 0)).all()
        assert (table[:, config.codebook_size :] == 0).all()
    assert state.keys is None
    kept = replace(old, keys=jnp.zeros((B, G, ring_len, 4), jnp.float32))
    state = blocks.state_after(kept, ring, new, cache, timeline, documents)
    close(state.keys, np.broadcast_to(state.codes[..., None], state.keys.shape), 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:, 1:], v),  # fewer tokens
        lambda q, k, v: (q, k, v[:, :, :1]),  # fewer heads
        lambda q, k, v: (q[..., 1:], k, v),  # another width
        lambda q, k, v: (q, k, v.astype(jnp.int32)),
        lambda q, k, v: (q[0], k, v),
    ],
)
def test_shapes_are_checked(change):
    """Under test, arrays that do not fit each other do not reach the mathematics."""
    q, k, v = jnp.zeros((B, 7, 4, 3)), jnp.zeros((B, 7, G, 3)), jnp.zeros((B, 7, G, 5))
    QKV(q, k, v)
    with pytest.raises(TypeCheckError):
        QKV(*change(q, k, v))
    with pytest.raises(TypeCheckError):
        AttentionWeights(k[0], q[0, 0], q[0, 0, 1:], q[0])
