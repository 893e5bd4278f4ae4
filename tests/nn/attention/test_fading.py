"""Fading keys in blocks: sums of fades against a plain loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import close, far
from transformer_vq.nn.attention import fading

B, G, BLOCKS, C, M = 2, 3, 4, 5, 3
FADES = -np.random.default_rng(0).exponential(size=(B, G, M + BLOCKS * C))  # the window's first


def passed(key, time):
    """The sum of the fades of the tokens after a key, up to a time."""
    return FADES[..., key + 1 : time + 1].sum(-1)


def chunk():
    """Fades of the keys before each block, of its own, and of those that leave it."""
    blocks = range(BLOCKS)
    older = np.stack([FADES[..., i * C : i * C + M] for i in blocks], axis=2)
    own = np.stack([FADES[..., M + i * C : M + (i + 1) * C] for i in blocks], axis=2)
    leaving = FADES[..., : BLOCKS * C].reshape(B, G, BLOCKS, C)
    return tuple(map(jnp.asarray, (older, own, leaving)))


def test_scores_of_a_span(double):
    """A column's offset, and what is common to all of a query's, are the fades between the two."""
    older, own, _ = chunk()
    all_tokens = jnp.ones((B, BLOCKS, C, C), bool)
    common = fading.own_sums(own, jnp.tril(all_tokens))
    columns = fading.column_offsets(older, common)[:, :, :, 0]
    for i in range(BLOCKS):
        for query in range(C):
            for key in range(M + query + 1):
                found = common[:, :, i, query] + columns[:, :, i, key]
                close(found, passed(i * C + key, i * C + M + query), 1e-13)
    far(common[:, :, 0, 1], passed(0, M + 1))  # another key's


def test_an_earlier_document_is_not_in_the_sums(double):
    _, own, _ = chunk()
    index = np.arange(C)
    of_document = (index <= index[:, None]) & ((index >= 2) | (index[:, None] < 2))
    of_document = jnp.broadcast_to(jnp.asarray(of_document), (B, BLOCKS, C, C))
    sums = fading.own_sums(own, of_document)
    moved = fading.own_sums(own.at[..., 0].add(-1.0), of_document)
    np.testing.assert_array_equal(moved[..., 2:], sums[..., 2:])
    assert (np.asarray(moved[..., :2]) < np.asarray(sums[..., :2])).all()


def test_what_a_cache_has_left(double):
    """Each key that leaves, and the mass of each earlier cache, up to a later cache."""
    older, own, leaving = chunk()
    after = jnp.asarray(FADES[..., -M:])[:, :, None]
    windows = jnp.concatenate([older[:, :, 1:], after], axis=2).sum(-1)
    fades = fading.BlockFades.of(leaving, windows, own.sum(-1))
    between = fades.between()
    for i in range(BLOCKS):
        end = M + (i + 1) * C - 1  # the last token before cache i + 1
        for key in range(C):
            close(fades.key[:, :, i, key], passed(i * C + key, end), 1e-13)
        for k in range(i + 2):
            close(between[:, :, i + 1, k], np.exp(passed(M + k * C - 1, end)), 1e-13)
    far(between[:, :, 2, 1], np.asarray(between[:, :, 3, 1]))


def test_gradient_of_what_a_cache_has_left(double):
    """`growth` has the gradient that `between` leaves out, and is 1."""
    _, _, leaving = chunk()
    passing = jnp.asarray(FADES[..., :BLOCKS])
    added, wanted = np.random.default_rng(1).normal(size=(2, B, G, BLOCKS + 1))
    earlier = np.tril(np.ones((BLOCKS + 1, BLOCKS + 1)))

    def plain(passing):
        ends = jnp.pad(jnp.cumsum(passing, -1), ((0, 0), (0, 0), (1, 0)))
        between = jnp.exp(ends[..., :, None] - ends[..., None, :])
        return (wanted * jnp.einsum("bgik,bgk->bgi", earlier * between, added)).sum()

    def folded(passing, grown=True):
        fades = fading.BlockFades(leaving, passing)
        growth = fades.growth() if grown else 1.0
        masses = jnp.einsum("bgik,bgk->bgi", earlier * fades.between(), added / growth) * growth
        return (wanted * masses).sum()

    np.testing.assert_array_equal(fading.BlockFades(leaving, passing).growth(), 1)
    close(folded(passing), plain(passing), 1e-13)
    close(jax.grad(folded)(passing), jax.grad(plain)(passing), 1e-12)
    assert not np.any(jax.grad(folded)(passing, grown=False))  # control


def test_ages_and_back(double):
    fades = jnp.asarray(FADES)
    ages = fading.since(fades)
    close(ages[..., 4], passed(4, FADES.shape[-1] - 1), 1e-13)
    again = fading.fades_of(ages)
    close(again[..., 1:], FADES[..., 1:], 1e-12)
    np.testing.assert_array_equal(again[..., 0], 0)
    np.testing.assert_array_equal(ages[..., -1], 0)


def test_long_sums_lose_nothing_in_float32():
    """Sums over a shut gate are local: 1,000 strong fades before do not blur the next."""
    fades = jnp.asarray(np.r_[np.full(1000, -20.0), np.full(7, -0.01)], jnp.float32)
    np.testing.assert_allclose(fading.since(fades)[1000:], -0.01 * np.arange(6, -1, -1), atol=1e-8)
    by_difference = jnp.cumsum(fades)  # control
    lost = by_difference[-1] - by_difference[1000:]
    assert np.abs(lost + 0.01 * np.arange(6, -1, -1)).max() > 1e-4
