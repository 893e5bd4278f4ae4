"""Full attention by blocks against the plain oracle: values, gradients, pieces, what is skipped."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import close, far, make_config, quick_jit
from tests.programs import operations, temporary_bytes
from transformer_vq import init_state
from transformer_vq.nn.attention import QKV, AttentionWeights, FullAttentionState, attend_full
from transformer_vq.nn.reference import quadratic_attention
from transformer_vq.nn.timeline import make_timeline
from transformer_vq.sharding import AXES, data_mesh

BATCH, LENGTH, CAPACITY = 3, 19, 22
GATED = make_config(attention="full", num_heads=2, block_len=4)
GROUPED = make_config("mqa", attention="full", num_heads=3, block_len=5, reset_at_document=True)
MANY = make_config("mha", attention="full", num_heads=2, block_len=7, reset_at_document=True)
WHOLE = [(LENGTH, [LENGTH] * BATCH)]
RAGGED = [(8, [8, 3, 0]), (9, [2, 9, 7]), (1, [1, 0, 1]), (11, [8, 7, 11])]  # (size, lengths)
CASES = {
    "whole": (GATED, WHOLE),
    "one_block": (GROUPED.replace(block_len=64), WHOLE),
    "documents": (GROUPED, WHOLE),
    "ragged_pieces_documents": (MANY, RAGGED),
}


def inputs(config, length=LENGTH, batch=BATCH):
    """q, k, v, u, w, r (as `attend_full` takes them), document ids, and a cotangent."""
    rng = np.random.default_rng(0)
    heads, groups, d_k, d_v = config.num_heads, config.num_kv_heads, config.d_k, config.d_v
    shapes = [(batch, length, n, d) for n, d in ((heads, d_k), (groups, d_k), (groups, d_v))]
    shapes += [(heads, d_k)] * 2 + [(max(CAPACITY, length), heads, d_k)]
    document_ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1).astype(np.int32)
    cotangent = rng.normal(size=(batch, length, heads, d_v))
    return tuple(rng.normal(size=shape) for shape in shapes), document_ids, cotangent


def constants(config, u, w, r):
    """Of a unit of full attention, which has no use for codewords."""
    words = jnp.zeros((config.num_kv_heads, 1, config.d_k))
    return AttentionWeights(words, *map(jnp.asarray, (u, w, r)))


@functools.partial(quick_jit, static_argnums=0)
def oracle(config, arrays, document_ids, cotangent):
    def outputs(q, k, v, u, w, r):
        repeats = config.num_heads // config.num_kv_heads
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        words = jnp.zeros((config.num_heads, 1, config.d_k))
        return quadratic_attention(q, k, v, words, u, w, r, config, document_ids)[0]

    value, pull_back = jax.vjp(outputs, *arrays)
    return value, pull_back(cotangent)


def in_pieces(config, pieces, arrays, document_ids, from_empty=False):
    """Outputs `[B, T, H, V]` of the same text in pieces, and the state; padding is noise."""
    q, k, v, u, w, r = arrays
    capacity = LENGTH if from_empty else CAPACITY
    state = init_state(config, BATCH, capacity=capacity)
    used, out = np.zeros(BATCH, int), jnp.zeros((*q.shape[:-1], v.shape[-1]))
    rows = np.arange(BATCH)[:, None]
    for size, lengths in pieces:
        at = used[:, None] + np.arange(size)
        at, real = at % LENGTH, np.arange(size) < np.array(lengths)[:, None]
        ids = jnp.where(real, document_ids[rows, at], 99)
        timeline, start, last_id = make_timeline(
            config, state, jnp.array(lengths, jnp.int32), size, ids
        )
        attended = attend_full(
            QKV(*(jnp.asarray(x)[rows, at] for x in (q, k, v))),
            constants(config, u, w, r[:capacity]),
            state.units[0],
            timeline,
            config,
            from_empty=from_empty,
        )
        b, t = np.nonzero(real)
        out = out.at[b, at[b, t]].set(attended.out[b, t])
        used = used + lengths
        state = replace(
            state,
            position=jnp.array(used, jnp.int32),
            document_start=start,
            document_id=last_id,
            units=(attended.state,),
        )
    assert (used == LENGTH).all()
    return out, state.units[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "ragged_pieces_documents")) for n in CASES],
)
def test_values_and_gradients(name, double):
    """In any blocks and any ragged pieces the outputs, the cache and all gradients, those through
    the cache too, are the oracle's."""
    config, pieces = CASES[name]
    arrays, document_ids, cotangent = inputs(config)
    expected = oracle(config, arrays, document_ids, cotangent)
    for from_empty in (False, True) if name == "whole" else (False,):

        @quick_jit
        def run(arrays, from_empty=from_empty):
            def outputs(*arrays):
                return in_pieces(config, pieces, arrays, document_ids, from_empty)

            value, pull_back, cache = jax.vjp(outputs, *arrays, has_aux=True)
            return value, pull_back(cotangent), cache

        value, grads, cache = run(arrays)
        close(value, expected[0])
        close(grads[:5], expected[1][:5])
        close(grads[5][:LENGTH], expected[1][5][:LENGTH])
        for held, new in ((cache.keys, arrays[1]), (cache.values, arrays[2])):
            close(held[:, :, :LENGTH], np.moveaxis(new, 2, 1))
            assert not np.asarray(held[:, :, LENGTH:]).any()  # padding wrote nothing
    # Controls: a longer distance for every key; other documents.
    *same, r = arrays
    moved = oracle(config, (*same, np.roll(r, 1, axis=0)), document_ids, cotangent)
    far(value, moved[0])
    far(grads, moved[1])
    if config.reset_at_document:
        far(value, oracle(config, arrays, np.zeros_like(document_ids), cotangent)[0])


def poisoned(config, arrays, state, position=0, documents=None, from_empty=False):
    """Outputs of all tokens in one call on this cache, from this position on."""
    q, k, v, u, w, r = arrays
    whole = init_state(config, BATCH, capacity=state.capacity)
    whole = replace(whole, position=jnp.full(BATCH, position, jnp.int32))
    lengths = jnp.full(BATCH, q.shape[1], jnp.int32)
    timeline = make_timeline(config, whole, lengths, q.shape[1], documents)[0]
    x, unit = QKV(*map(jnp.asarray, (q, k, v))), constants(config, u, w, r[: state.capacity])
    return attend_full(x, unit, state, timeline, config, from_empty=from_empty).out


def test_what_no_query_sees_is_skipped(double):
    """Not masked: there a weight of 0 times a value that is no number would be no number."""
    config, block = GROUPED, GROUPED.block_len
    (q, k, v, *rest), _, _ = inputs(config)
    cache = init_state(config, BATCH, capacity=LENGTH).units[0]
    run = quick_jit(poisoned, static_argnums=(0, 5))

    last = LENGTH // block * block
    after = np.where(np.arange(LENGTH)[:, None, None] >= last, np.nan, v)
    finite = np.isfinite(run(config, (q, k, after, *rest), cache)).all((0, 2, 3))
    assert finite[:last].all() and not finite[last:].any()
    # Documents that ended in an earlier block in every row.
    before = np.where(np.arange(LENGTH)[:, None, None] < block, np.nan, v)
    ids = np.broadcast_to(np.arange(LENGTH) >= block, (BATCH, LENGTH)).astype(np.int32)
    out = run(config, (q, k, before, *rest), cache, 0, ids)
    assert np.isfinite(out).all((0, 2, 3))[block:].all()
    # A cache in which nothing is, and control: one in which something is.
    cache = replace(cache, values=jnp.full_like(cache.values, np.nan))
    assert np.isfinite(run(config, (q, k, v, *rest), cache)).all()
    assert np.isnan(run(config, (q, k, v, *rest), cache, 1)[:, 0]).all()
    # From empty: the cache is not looked at, and what was in it would be missed.
    assert np.isfinite(run(config, (q, k, v, *rest), cache, 0, None, True)).all()
    assert np.isnan(run(config, (q, k, v, *rest), cache, 1, None, True)).all()


def test_scores_are_never_whole(double):
    """Memory of values and gradients grows with length times block, not with the square."""
    length = 512
    config = make_config("mqa", attention="full", num_heads=1)

    def temporary(block):
        arrays, _, cotangent = inputs(config, length)
        state = init_state(config, BATCH, capacity=length).units[0]

        @quick_jit
        def gradients(arrays):
            def outputs(*arrays):
                chosen = config.replace(block_len=block)
                return poisoned(chosen, arrays, state, from_empty=True)

            return jax.vjp(outputs, *arrays)[1](cotangent)

        return temporary_bytes(gradients.lower(arrays).compile())

    square = 8 * BATCH * length**2
    assert temporary(32) < square / 4
    assert temporary(length) > square


def talk(compiled):
    """What of a program brings the rows of one device to others."""
    return {name for name in operations(compiled) if name.startswith(("all-gather", "all-to-all"))}


def test_devices_that_share_rows_do_not_talk(double):
    """Each device writes its own rows to the cache and attends to them: no keys are gathered."""
    config = GATED
    mesh = data_mesh()
    arrays, _, _ = inputs(config, batch=8)
    rows = NamedSharding(mesh, PartitionSpec(AXES))

    @jax.jit
    def run(new, rest, cache, position):
        length = new[0].shape[1]
        state = replace(init_state(config, 8, capacity=CAPACITY), position=position)
        timeline = make_timeline(config, state, jnp.full(8, length, jnp.int32), length, None)[0]
        unit = constants(config, *rest)
        attended = attend_full(QKV(*new), unit, FullAttentionState(*cache), timeline, config)
        return attended.out, attended.state

    unit = init_state(config, 8, capacity=CAPACITY).units[0]
    cache = jax.device_put((unit.keys, unit.values), rows)
    position = jax.device_put(np.arange(8, dtype=np.int32), rows)
    for length in (LENGTH, 1):
        new = jax.device_put([x[:, :length] for x in arrays[:3]], rows)
        assert not talk(run.lower(new, arrays[3:], cache, position).compile())
    everywhere = NamedSharding(mesh, PartitionSpec())
    assert talk(jax.jit(jnp.sin, out_shardings=everywhere).lower(cache[0]).compile())  # control
