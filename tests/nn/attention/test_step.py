"""`attend_step`, one token per row, against `attend_blocks`, all at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import close, far, make_config, quick_jit
from transformer_vq import init_state
from transformer_vq.nn.attention import QKV, AttentionWeights, attend_blocks, attend_step
from transformer_vq.nn.attention.step import empty_cache
from transformer_vq.nn.timeline import make_timeline

B, T = 3, 13
LENGTHS = np.array([13, 6, 0], np.int32)
CONFIG = make_config("mha", num_heads=2, window_len=3, block_len=4, reset_at_document=True)


def inputs(config):
    """Queries, keys, values of T tokens, the constants of a unit, document ids."""
    rng = np.random.default_rng(0)
    heads, d_k = config.num_heads, config.d_k
    x = QKV(*(jnp.asarray(rng.normal(size=(B, T, heads, d))) for d in (d_k, d_k, config.d_v)))
    shapes = ((heads, config.codebook_size, d_k), *[(heads, d_k)] * 2, (4, heads, d_k))
    unit = AttentionWeights(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))
    ids = np.cumsum(rng.random((B, T)) < 0.2, axis=1).astype(np.int32)
    ids[0] = np.arange(T) >= 6
    return x, unit, jnp.asarray(ids)


def consume(attend, config, x, unit, state, lengths, ids):
    """Outputs, codes and the new state of a call, as `forward` makes it of a unit."""
    timeline, start, last_id = make_timeline(config, state, lengths, ids.shape[1], ids)
    attended = attend(x, unit, state.units[0], timeline, config)
    state = replace(
        state,
        position=state.position + lengths,
        document_start=start,
        document_id=last_id,
        units=(attended.state,),
    )
    return attended.out, attended.codes, state


def test_steps_are_blocks(double):
    """Outputs, codes and the state after ragged rows; a row of length 0 keeps its state."""
    x, unit, ids = inputs(CONFIG)
    state = init_state(CONFIG, B)
    state = replace(state, units=state.units[:1])

    @quick_jit
    def all_at_once(x, ids):
        return consume(attend_blocks, CONFIG, x, unit, state, jnp.array(LENGTHS), ids)

    @quick_jit
    def one(x, state, active, ids):
        return consume(attend_step, CONFIG, x, unit, state, active, ids)

    expected, codes, after = all_at_once(x, ids)
    for t in range(T):
        token, active = jax.tree.map(lambda a, t=t: a[:, t : t + 1], (x, ids)), t < LENGTHS
        out, code, new = one(token[0], state, jnp.asarray(active, jnp.int32), token[1])
        close(out[active], expected[active, t : t + 1])
        np.testing.assert_array_equal(code, codes[:, t : t + 1])
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a[~active], b[~active])
        state = new
    close(state, after)
    assert state.units[0].counts.sum() > 0  # the cache was used, and is not empty at the end
    # Controls: no documents; other values.
    far(all_at_once(x, jnp.zeros_like(ids))[0][0], expected[0])
    far(all_at_once(replace(x, v=x.v[::-1]), ids)[0][:2], expected[:2])


def test_empty_cache(double):
    """Counts and means of the rows to clear go, and nothing else of the state."""
    unit = jax.tree.map(lambda a: a + 2, init_state(CONFIG, B).units[0])
    cleared = empty_cache(unit, jnp.array([True, False, False]), CONFIG.ring_len)
    np.testing.assert_array_equal(cleared.codes, unit.codes)
    np.testing.assert_array_equal(cleared.counts[1:], unit.counts[1:])
    np.testing.assert_array_equal(cleared.values[1:], unit.values[1:])
    assert not np.asarray(cleared.counts[0]).any()
    assert (cleared.values[0, :, : CONFIG.ring_len] == 2).all()
    assert not np.asarray(cleared.values[0, :, CONFIG.ring_len :]).any()
