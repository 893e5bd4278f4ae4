"""Sampling methods against plain numpy: all pairs instead of thresholds, loops instead of masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.helpers import hugging_face, recorded
from tests.programs import operations
from transformer_vq.nn import prob
from transformer_vq.nn.prob import REMOVED

SHAPES = [(5, 17), (3, 40), (1, 1), (2, 2, 6)]  # few: each is compiled
MASSES = [1e-30, 1e-6, 0.1, 0.5, 0.9, 0.999, 0.9999999, 1.0]
ROUNDING = 1e-5  # of a sum of float32 probabilities

temperature, top_k, nucleus, typical, min_p, repetition_penalty, presence_and_frequency, draw = (
    jax.jit(getattr(prob, name))
    for name in (
        "temperature",
        "top_k",
        "nucleus",
        "typical",
        "min_p",
        "repetition_penalty",
        "presence_and_frequency",
        "draw",
    )
)

LOGIT = st.one_of(
    st.integers(-3, 3).map(float),  # ties
    # XLA takes subnormal numbers for 0: neither these nor their quotients are such.
    st.floats(-20, 20, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0),
    st.sampled_from([REMOVED, 1e4, -1e4, 0.0, -0.0]),
)


@st.composite
def batches(draw, *values):
    """Logits of some shape, and for each strategy given a parameter per row."""
    shape = draw(st.sampled_from(SHAPES))
    logits = draw(hnp.arrays(np.float32, shape, elements=LOGIT, fill=st.nothing()))
    return logits, *(draw(hnp.arrays(np.float32, shape[:-1], elements=v)) for v in values)


def masses(probable):
    return st.sampled_from([np.float32(p) for p in probable])


def rows_of(*arrays):
    """Row by row: the logits `[vocab]`, then what else there is for the row."""
    lead = arrays[0].shape[:-1]
    return [tuple(a[i] for a in arrays) for i in np.ndindex(lead)]


def softmax(row):
    e = np.exp(np.float64(row) - np.float64(row).max())
    return e / e.sum()


def check_kept(row, out, must, may):
    """`out` is `row` where kept and REMOVED elsewhere; kept is all of `must`, only of `may`."""
    kept = (out == row) & ((row != REMOVED) | may)
    np.testing.assert_array_equal(out, np.where(kept, row, np.float32(REMOVED)))
    standing = row != REMOVED  # REMOVED, kept or not, is REMOVED
    assert not (must & standing & ~kept).any(), (row, out)
    assert not (kept & standing & ~may).any(), (row, out)


def smallest_set(score, mass, p, tolerance):
    """What must and what may be in the shortest list, best score first, whose mass reaches p.

    All pairs: a token is in it if the mass before it is below p. Scores within `tolerance` of each
    other may come in any order; equal ones without a tolerance come with higher ids first.
    """
    ids = np.arange(len(score))
    margin = score[None, :] - score[:, None]
    if tolerance is None:
        surely = possibly = (margin > 0) | (margin == 0) & (ids[None, :] > ids[:, None])
    else:
        surely, possibly = margin > tolerance, margin >= -tolerance
        possibly &= ids[None, :] != ids[:, None]
    must = (possibly @ mass < p - ROUNDING) | ~possibly.any(1)
    may = (surely @ mass < p + ROUNDING) | ~surely.any(1)
    return must, may


# ---------------------------------------------------------------- each method


@given(batches(masses(MASSES)))
def test_nucleus(batch):
    logits, p = batch
    out = np.asarray(nucleus(logits, p))
    for row, p_row, out_row in rows_of(logits, p[..., None], out):
        mass = softmax(row)
        if p_row[0] == 1:
            assert np.array_equal(row, out_row)
            continue
        check_kept(row, out_row, *smallest_set(row, mass, p_row[0], None))
        assert mass[out_row == row].sum() >= p_row[0] - ROUNDING


@given(batches(masses(MASSES)))
def test_typical(batch):
    logits, p = batch
    out = np.asarray(typical(logits, p))
    for row, p_row, out_row in rows_of(logits, p[..., None], out):
        mass = softmax(row)
        if p_row[0] == 1:
            assert np.array_equal(row, out_row)
            continue
        log_p = np.float64(row) - row.max() - np.log(np.exp(np.float64(row) - row.max()).sum())
        entropy = -(mass * np.where(mass > 0, log_p, 0)).sum()
        surprise = np.abs(-log_p - entropy)
        tolerance = 1e-5 * (1 + np.minimum(surprise[:, None], surprise[None, :]))
        check_kept(row, out_row, *smallest_set(-surprise, mass, p_row[0], tolerance))
        assert mass[out_row == row].sum() >= p_row[0] - ROUNDING


@given(batches(st.integers(0, 45)))
def test_top_k(batch):
    logits, k = batch
    out = np.asarray(top_k(logits, k.astype(np.int32)))
    for row, k_row, out_row in rows_of(logits, k[..., None], out):
        better = (row[None, :] > row[:, None]).sum(1)
        expected = (better < k_row[0]) | (k_row[0] == 0)
        np.testing.assert_array_equal(out_row, np.where(expected, row, np.float32(REMOVED)))


def test_a_subnormal_logit_ties_with_0():
    """Or is above it, where it is not taken for 0; the best is kept, and no more than the ties."""
    logits = np.full((5, 17), -1.0, np.float32)
    logits[:, 3], logits[:, 8] = 0.0, 4e-44
    out = np.asarray(top_k(logits, np.full(5, 1, np.int32)))
    assert (out[:, 8] == logits[:, 8]).all()
    assert (np.delete(out, [3, 8], axis=1) == REMOVED).all()


@given(batches(st.sampled_from([np.float32(p) for p in (0, 1e-30, 1e-6, 0.05, 0.5, 1)])))
def test_min_p(batch):
    logits, p = batch
    out = np.asarray(min_p(logits, p))
    for row, p_row, out_row in rows_of(logits, p[..., None], out):
        best = np.float64(row.max())
        limit = best + np.log(np.float64(p_row[0])) if p_row[0] > 0 else -np.inf
        slack = 1e-5 + 2e-7 * abs(best)  # rounding of best + log p
        must, may = row >= limit + slack, row >= limit - slack
        check_kept(row, out_row, must | (row == row.max()), may)


@given(batches(st.sampled_from([np.float32(t) for t in (0, 1e-38, 0.1, 0.7, 1, 3, 1e9)])))
def test_temperature(batch):
    logits, value = batch
    out = np.asarray(temperature(logits, value))
    assert np.isfinite(out).all()
    for row, t, out_row in rows_of(logits, value[..., None], out):
        if t[0] < 1e-5:
            only_best = np.full_like(row, REMOVED)
            only_best[row.argmax()] = row.max()
            np.testing.assert_array_equal(out_row, only_best)
        else:
            expected = np.where(row == REMOVED, row, row / t[0])
            np.testing.assert_allclose(out_row, expected, rtol=1e-6)


@st.composite
def histories(draw, *values):
    """Logits, how often each token was seen, and parameters of rows."""
    logits, *parameters = draw(batches(*values))
    counts = draw(hnp.arrays(np.int32, logits.shape, elements=st.integers(0, 3)))
    return logits, counts, *parameters


@given(histories(st.sampled_from([np.float32(x) for x in (0.5, 1, 1.3, 8)])))
def test_repetition_penalty(batch):
    logits, counts, penalty = batch
    out = np.asarray(repetition_penalty(logits, counts > 0, penalty))
    for row, count, by, out_row in rows_of(logits, counts, penalty[..., None], out):
        for x, n, y in zip(row, count, out_row, strict=True):
            if n == 0 or x == REMOVED:
                assert y == x
            else:
                assert y == pytest.approx(x / by[0] if x > 0 else x * by[0], rel=1e-6)


@given(
    histories(
        st.sampled_from([np.float32(x) for x in (-1, 0, 0.5, 2)]),
        st.sampled_from([np.float32(x) for x in (-0.3, 0, 0.1, 1.5)]),
    )
)
def test_presence_and_frequency(batch):
    logits, counts, presence, frequency = batch
    out = np.asarray(presence_and_frequency(logits, counts, presence, frequency))
    rows = rows_of(logits, counts, presence[..., None], frequency[..., None], out)
    for row, count, flat, slope, out_row in rows:
        for x, n, y in zip(row, count, out_row, strict=True):
            if x == REMOVED:
                assert y == x
            else:
                expected = np.float64(x) - (flat[0] if n > 0 else 0) - slope[0] * float(n)
                assert y == pytest.approx(expected, rel=1e-6, abs=1e-5)


# ---------------------------------------------------------------- what all methods have in common

METHODS = {  # a method of (logits, counts, value), values to try, and the one that changes nothing
    "temperature": (lambda x, _, v: prob.temperature(x, v), (0.0, 0.3, 1.0, 2.0), 1.0),
    "top_k": (lambda x, _, v: prob.top_k(x, v.astype(jnp.int32)), (1.0, 3.0, 0.0, 99.0), 0.0),
    "nucleus": (lambda x, _, v: prob.nucleus(x, v), (1e-30, 0.5, 0.999, 1.0), 1.0),
    "typical": (lambda x, _, v: prob.typical(x, v), (1e-30, 0.5, 0.999, 1.0), 1.0),
    "min_p": (lambda x, _, v: prob.min_p(x, v), (1.0, 0.1, 1e-6, 0.0), 0.0),
    "repetition_penalty": (
        lambda x, n, v: prob.repetition_penalty(x, n > 0, v),
        (0.5, 1.0, 2.0, 1.1),
        1.0,
    ),
    "presence": (
        lambda x, n, v: prob.presence_and_frequency(x, n, v, jnp.zeros_like(v)),
        (0.5, -1.0, 0.0, 3.0),
        0.0,
    ),
    "frequency": (
        lambda x, n, v: prob.presence_and_frequency(x, n, jnp.zeros_like(v), v),
        (0.5, -1.0, 0.0, 3.0),
        0.0,
    ),
}


@functools.cache
def jitted(name):
    return jax.jit(METHODS[name][0])


def awkward_rows(rows, vocab, seed=0):
    """Random logits with ties, huge, tiny and removed ones; counts of tokens seen."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2, ::3] = REMOVED
    logits[3, :4] = 1e4, -1e4, 1e4, 9999.0
    logits[4] = -1e4 - np.arange(vocab)
    logits[5] = 0.25
    return logits, rng.integers(0, 3, (rows, vocab)).astype(np.int32)


@pytest.mark.parametrize("name", METHODS)
def test_every_row_has_its_own_value(name):
    """A row of a batch with parameters per row is the row alone, bit for bit."""
    logits, counts = awkward_rows(12, 24)
    values = np.resize(np.asarray(METHODS[name][1], np.float32), 12)
    together = np.asarray(jitted(name)(logits, counts, values))
    changed = 0
    for i in range(12):
        alone = jitted(name)(logits[i : i + 1], counts[i : i + 1], values[i : i + 1])
        np.testing.assert_array_equal(bits(together[i]), bits(alone[0]))
        changed += not np.array_equal(together[i], logits[i])
    assert changed > 3  # control: the method did something


@pytest.mark.parametrize("name", METHODS)
def test_one_value_for_all_rows(name):
    """A scalar is the same as that value in every row."""
    logits, counts = awkward_rows(6, 24)
    for value in METHODS[name][1]:
        scalar = jitted(name)(logits, counts, np.float32(value))
        by_row = jitted(name)(logits, counts, np.full(6, value, np.float32))
        # Not to the bit: XLA divides by one number by multiplying with its inverse.
        np.testing.assert_allclose(scalar, by_row, rtol=2e-7)


@pytest.mark.parametrize("name", METHODS)
def test_the_value_that_changes_nothing(name):
    logits, counts = awkward_rows(6, 24)
    out = jitted(name)(logits, counts, np.full(6, METHODS[name][2], np.float32))
    np.testing.assert_array_equal(bits(out), bits(logits))


@pytest.mark.parametrize("name", METHODS)
def test_a_removed_token_stays_removed(name):
    """Under any value that `SamplingParams` takes, and below all that may be drawn."""
    logits, counts = awkward_rows(6, 24)
    logits[:, 5:9] = REMOVED
    extremes = {"temperature": (1e-38, 1e-4, 1e9, 3e38), "repetition_penalty": (1e-38, 1e9, 3e38)}
    extremes |= {"presence": (-1e30, 1e30, 3e38), "frequency": (-1e30, 1e30, 3e38)}
    for value in extremes.get(name, METHODS[name][1]):
        out = np.asarray(jitted(name)(logits, counts + 1, np.full(6, value, np.float32)))
        assert np.isfinite(out).all()
        assert (out[:, 5:9] == REMOVED).all()
        assert (np.delete(out, range(5, 9), 1).max(1) > REMOVED).all()


@pytest.mark.parametrize("name", ["top_k", "nucleus", "typical", "min_p"])
def test_the_best_is_kept_in_every_dtype(name):
    """A threshold is found in float32: what is wider or narrower is compared in it too."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        for dtype in ("float32", "bfloat16", "float64"):
            logits = jnp.asarray(rng.normal(0, 3, (1000, 200)), dtype)
            for value in (*METHODS[name][1], 0.9999999):  # more than some sums of probabilities
                method = jitted(name)
                out = method(logits, None, jnp.full(1000, value, jnp.float32))
                assert out.dtype == dtype
                kept = np.asarray(out > REMOVED)
                assert kept.any(1).all()
                if name == "top_k" and dtype == "float64" and 1 <= value < 200:
                    np.testing.assert_array_equal(kept.sum(1), value)


def test_smallest_sets_do_not_sort():
    logits = jnp.zeros((2, 64))
    for method in (prob.nucleus, prob.typical, prob.top_k):
        assert "sort" not in operations(jax.jit(method).lower(logits, 0.5))
    assert "sort" in operations(jax.jit(jnp.sort).lower(logits))  # control


def test_large_vocabulary():
    """Sums over 256,000 probabilities round: nothing essential is lost, nothing needless kept."""
    logits = np.random.default_rng(2).normal(0, 2, (2, 256_000)).astype(np.float32)
    for p in (0.5, 0.9, 0.9999, 0.9999999):
        out = np.asarray(nucleus(logits, np.full(2, p, np.float32)))
        for row, out_row in zip(logits, out, strict=True):
            mass, kept = softmax(row), out_row > REMOVED
            assert row[kept].min() >= row[~kept].max(initial=-np.inf)
            total = mass[kept].sum()
            assert p - 1e-4 < total < p + 1e-4


# ---------------------------------------------------------------- recorded cases


def test_recorded_nucleus():
    """The kept sets of the reference implementation.

    Its threshold has an offset of 1e-4, so that at p = 1 it still drops a tail; ours is the
    textbook rule. A token whose place in the ranking is within that mass of p may differ.
    """
    arrays = recorded("nucleus")
    compared = differing = 0
    for name, theirs in arrays.items():
        if name.startswith("logits"):
            continue
        _, group, p = name.split("_")
        logits, p = arrays[f"logits_{group}"], float(p[1:])
        ours = np.asarray(nucleus(logits, p)) > REMOVED / 2
        for row, a, b in zip(logits, theirs, ours, strict=True):
            mass, ids = softmax(row), np.arange(len(row))
            before = (row[None] > row[:, None]) | (row[None] == row[:, None]) & (ids > ids[:, None])
            clear = np.abs(before @ mass - p) > 1.1e-4
            np.testing.assert_array_equal(a[clear], b[clear], err_msg=name)
            compared += clear.sum()
            differing += (a != b).sum()
            assert not (a & ~b).any()  # the offset only drops
    assert compared > 9000 and differing < 0.02 * compared


# ---------------------------------------------------------------- draws

DRAWS = 20_000


def chi_square(tokens, p):
    expected = p * len(tokens)
    return ((np.bincount(tokens, minlength=len(p)) - expected) ** 2 / expected).sum()


def test_draws_follow_the_distribution():
    logits = np.asarray([2.0, 0.5, -1.0, 1.5, 0.0, -2.0, 1.0], np.float32)
    p = softmax(logits)
    keys = jax.random.split(jax.random.key(3), DRAWS)
    tokens = np.asarray(draw(keys, np.tile(logits, (DRAWS, 1))))
    assert tokens.dtype == np.int32
    limit = 28.0  # 6 degrees of freedom: exceeded once in 10,000
    assert chi_square(tokens, p) < limit
    assert chi_square(tokens, softmax(1.1 * logits)) > 2 * limit  # control: a temperature of 0.9
    # Rows with different keys are independent: pairs of neighbours, 48 degrees of freedom.
    pairs = tokens[0::2] * 7 + tokens[1::2]
    assert chi_square(pairs, np.outer(p, p).ravel()) < 95
    same = np.asarray(draw(jnp.repeat(keys[: DRAWS // 2], 2), np.tile(logits, (DRAWS, 1))))
    assert chi_square(same[0::2] * 7 + same[1::2], np.outer(p, p).ravel()) > 1000  # control


def test_removed_tokens_are_never_drawn():
    logits = np.full((DRAWS, 6), REMOVED, np.float32)
    logits[:, 2], logits[:, 4] = -1e4, -1e4 - 1
    tokens = np.asarray(draw(jax.random.split(jax.random.key(4), DRAWS), logits))
    assert chi_square(np.searchsorted([2, 4], tokens), softmax(logits[0, [2, 4]])) < 15
    assert set(tokens) == {2, 4}


# ---------------------------------------------------------------- Hugging Face

HF = {  # ours, theirs and the names of their parameters
    "top_k": (prob.top_k, "TopKLogitsWarper", (1, 3, 20, 100)),
    "nucleus": (prob.nucleus, "TopPLogitsWarper", (1e-3, 0.5, 0.9, 0.999, 1.0)),
    "typical": (prob.typical, "TypicalLogitsWarper", (1e-3, 0.3, 0.9, 0.999)),
    "min_p": (prob.min_p, "MinPLogitsWarper", (1e-3, 0.05, 0.5, 1.0)),
    "temperature": (prob.temperature, "TemperatureLogitsWarper", (0.1, 0.7, 1.0, 3.0)),
}


@pytest.mark.parametrize("name", HF)
def test_filters_of_hugging_face(name):
    torch, process = hugging_face()
    ours, theirs, values = HF[name]
    logits = np.random.default_rng(5).normal(0, 2, (64, 50)).astype(np.float32)
    for value in values:
        expected = getattr(process, theirs)(value)(None, torch.from_numpy(logits)).numpy()
        out = np.asarray(jax.jit(ours)(logits, value))
        np.testing.assert_array_equal(out > REMOVED, expected > -np.inf)
        kept = out > REMOVED
        np.testing.assert_allclose(out[kept], expected[kept], rtol=1e-6)


def test_repetition_penalty_of_hugging_face():
    torch, process = hugging_face()
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (16, 50)).astype(np.float32)
    prompts = rng.integers(0, 50, (16, 12))
    seen = np.zeros((16, 50), bool)
    np.put_along_axis(seen, prompts, True, axis=1)
    for value in (0.7, 1.0, 1.3):
        theirs = process.RepetitionPenaltyLogitsProcessor(value)
        expected = theirs(torch.from_numpy(prompts), torch.from_numpy(logits)).numpy()
        np.testing.assert_allclose(repetition_penalty(logits, seen, value), expected, rtol=1e-6)


def bits(array):
    return np.asarray(array, np.float32).view(np.uint32)
