"""The cache of codes against a plain loop over keys: many at once, and one by one."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import close, far, quick_jit
from transformer_vq.nn.attention.blockwise import MASKED
from transformer_vq.nn.attention.cache import Cache, join, join_blocks, log_mass
from transformer_vq.nn.attention.inputs import Window
from transformer_vq.nn.timeline import KeyDocuments

B, G, S, V = 3, 2, 5, 3
BLOCK, BLOCKS, START = 4, 3, 1
KEYS = BLOCK * BLOCKS
# Documents by the index of their first key: one; four, of 1 key too; two, the last still to leave.
FIRST = np.array(
    [[-7] * 14, [-2, -2, 2, 3, 3, 3, 3, 7, 7, 7, 7, 7, 7, 7], [0] * 9 + [9] * 5], np.int32
)


def example():
    """A cache, codes and values of keys that leave, and their documents; rows are ragged."""
    rng = np.random.default_rng(0)
    mass = rng.integers(0, 4, (B, G, S)).astype(np.int32)
    means = rng.normal(size=(B, G, S, V)) * (mass > 0)[..., None]
    cache = Cache(*map(jnp.asarray, (mass, means, FIRST[:, 0])))
    codes = jnp.asarray(rng.integers(0, S, (B, G, KEYS)), jnp.int32)
    values = jnp.asarray(rng.normal(size=(B, G, KEYS, V)))
    documents = KeyDocuments(jnp.array([KEYS + START, 8, 0], jnp.int32), jnp.asarray(FIRST))
    return cache, codes, values, documents


def plain(cache, codes, values, documents):
    """The cache before each block and after the last: each key is added to a sum by itself."""
    mass, means, first = (np.array(x) for x in (cache.mass, cache.means, cache.first))
    sums, seen = means * mass[..., None], []

    def snapshot():
        return mass.copy(), sums / np.maximum(mass, 1)[..., None], first.copy()

    for i in range(KEYS):
        if i % BLOCK == 0:
            seen.append(snapshot())
        for b in range(B):
            index = START + i
            if index >= documents.length[b]:
                continue  # no token has come that would push it out
            if FIRST[b, index] != first[b]:
                first[b] = FIRST[b, index]
                mass[b], sums[b] = 0, 0
            for g in range(G):
                mass[b, g, codes[b, g, i]] += 1
                sums[b, g, codes[b, g, i]] += values[b, g, i]
    masses, all_means, firsts = zip(*seen, strict=True)
    stacked = np.stack(masses, axis=2), np.stack(all_means, axis=2), np.stack(firsts, axis=1)
    return Cache(*map(jnp.asarray, stacked)), Cache(*map(jnp.asarray, snapshot()))


def many(cache, codes, values, documents, block=BLOCK):
    keys = jnp.zeros((*codes.shape, 1))  # what they are matters to nobody here
    return _many(block)(cache, Window(codes, keys, values, None), documents=documents)


@functools.cache
def _many(block):
    return quick_jit(functools.partial(join_blocks, start=START, block=block))


def test_join_blocks(double):
    """Counts exactly, means to rounding: with documents, ragged lengths, and a row of length 0."""
    cache, codes, values, documents = example()
    expected = plain(cache, codes, values, documents)
    found = many(cache, codes, values, documents)
    close(found, expected, 1e-12)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.mass, b.mass)
        np.testing.assert_array_equal(a.first, b.first)
    # Controls: other lengths; one document.
    longer = replace(documents, length=documents.length + 1)
    far(many(cache, codes, values, longer), expected)
    single = replace(documents, first=jnp.full_like(documents.first, -7))
    far(many(cache, codes, values, single), expected)


def test_join_blocks_of_any_size(double):
    """Blocks of 4 or all keys in one: the cache after them is the same."""
    cache, codes, values, documents = example()
    after = many(cache, codes, values, documents, block=KEYS)[1]
    close(after, many(cache, codes, values, documents)[1], 1e-12)


def test_a_mass_need_not_be_a_number_of_keys(double):
    """Nothing here depends on the dtype of a mass."""
    cache, codes, values, documents = example()
    floating = replace(cache, mass=cache.mass.astype(jnp.float64))
    found = many(floating, codes, values, documents)
    assert found[1].mass.dtype == jnp.float64
    close(found, plain(cache, codes, values, documents), 1e-12)


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("joins", [True, False])
def test_join(arrives, joins, double):
    """A mean moves by a share of the way where its key joins; a new value takes the slot."""
    rng = np.random.default_rng(1)
    mass = rng.integers(0, 3, (B, G))
    values, means, new = rng.normal(size=(3, B, G, V))
    means *= (mass > 0)[..., None]
    found_mass, rows = join(
        jnp.asarray(mass, jnp.int32),
        jnp.asarray(np.stack([values, means], axis=2)),
        jnp.asarray(new),
        arrives=jnp.full(B, arrives),
        joins=jnp.full(B, joins),
    )
    moved = (means * mass[..., None] + values) / (mass + 1)[..., None]
    np.testing.assert_array_equal(found_mass, mass + joins)
    close(rows[:, :, 0], new if arrives else values, 1e-14)
    close(rows[:, :, 1], moved if joins else means, 1e-14)
    far(rows[:, :, 1], means if joins else moved)


def test_one_by_one_is_many_at_once(double):
    """`join`, key after key, ends in the cache of `join_blocks`."""
    cache, codes, values, _ = example()
    whole = KeyDocuments(jnp.full(B, KEYS + START), jnp.full((B, KEYS + 2), -7))
    cache = replace(cache, first=jnp.full(B, -7))
    mass, means = cache.mass, cache.means
    b, g = np.arange(B)[:, None], np.arange(G)
    yes = jnp.full(B, True)

    @quick_jit
    def one(mass, means, code, value):
        rows = jnp.stack([value, means[b, g, code]], axis=2)
        new, rows = join(mass[b, g, code], rows, value, arrives=yes, joins=yes)
        return mass.at[b, g, code].set(new), means.at[b, g, code].set(rows[:, :, 1])

    for i in range(KEYS):
        mass, means = one(mass, means, codes[:, :, i], values[:, :, i])
    after = many(cache, codes, values, whole)[1]
    np.testing.assert_array_equal(mass, after.mass)
    close(means, after.means, 1e-12)


def test_log_mass():
    mass = jnp.array([[[0, 1, 7]]], jnp.int32)
    expected = np.array([[[MASKED, 0.0, np.log(7)]]], np.float32)
    np.testing.assert_allclose(log_mass(mass, jnp.float32), expected, rtol=1e-6)
