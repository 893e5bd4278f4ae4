"""Products of few rows: as loops, of one row in parts, of some with the matrix first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tune
from tests.programs import float32_arrays
from transformer_vq import ModelConfig, extend, init_model, init_state
from transformer_vq.nn import products
from transformer_vq.sharding import data_mesh, traced_on

# rows, in, out
SIZES = [(1, 8, 12), (1, 7, 9), (1, 12, 10), (3, 16, 12), (4, 8, 5), (6, 8, 12), (70, 8, 12)]


@pytest.fixture
def large(request, monkeypatch):
    """Whether every matrix counts as large, or none; what was compiled otherwise is forgotten."""
    jax.clear_caches()
    tune(monkeypatch, large=1 if request.param else 2**20)
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("large", [True, False], indirect=True)
@pytest.mark.parametrize("stored", [products.InputMajor, products.OutputMajor])
@pytest.mark.parametrize(("rows", "width", "out"), SIZES)
def test_few_rows_have_the_same_product(large, stored, rows, width, out):
    rng = np.random.default_rng(0)
    x, matrix = rng.normal(size=(rows, 1, width)), rng.normal(size=(width, out))

    def product(x, matrix):
        matrix = jnp.asarray(matrix)
        matrix = matrix if stored is products.InputMajor else matrix.T
        return products.matmul(jnp.asarray(x), stored(matrix))

    def loss(function):
        return lambda x, matrix: jnp.sum(jnp.sin(function(x, matrix)))

    expected = np.matmul(x, matrix)
    with jax.enable_x64(True):
        np.testing.assert_allclose(product(x, matrix), expected, rtol=1e-12, atol=1e-12)
        for n in range(width):  # control: every number counts
            part = x.copy()
            part[..., n] = 0
            assert np.abs(product(part, matrix) - expected).max() > 1e-6
        gradients = [jax.grad(loss(f), (0, 1))(x, matrix) for f in (product, jnp.matmul)]
        for mine, plain in zip(*gradients, strict=True):
            np.testing.assert_allclose(mine, plain, rtol=1e-12, atol=1e-12)


def test_a_table_is_multiplied_in_a_loop_in_parts_or_whole(monkeypatch):
    """The same product, whichever it is: of few rows a loop, if it is not too large; else of one
    row in parts, and of more whole, between barriers. Elsewhere than on a CPU plainly."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 1, 24, 8))
    size = 2 * 24 * 8  # multiplications of a row
    with jax.enable_x64(True):
        for rows, most, cut in (
            (1, size, 8),
            (8, 8 * size, 8),
            (1, size - 1, 4),
            (8, 8 * size - 1, None),
            (9, 9 * size, None),
        ):
            tune(monkeypatch, loop_size=most)
            weights = rng.normal(size=(2, 1, rows, 24))
            made = products.matmul_table(jnp.asarray(weights), jnp.asarray(table))
            np.testing.assert_allclose(made, weights @ table, rtol=1e-12, atol=1e-12)
            traced = str(jax.make_jaxpr(lambda w, t: products.matmul_table(w, t))(weights, table))
            parts = [n for n in (1, 4, 8) if f"f64[2,1,{n},{24 // n},8]" in traced]
            assert parts == ([] if cut is None else [cut])
            assert ("optimization_barrier" in traced) == (cut != 4)
    monkeypatch.setattr(products, "tuning", lambda: products.OTHERS)
    traced = jax.make_jaxpr(lambda w, t: products.matmul_table(w, t))(weights, table)
    assert "optimization_barrier" not in str(traced)


def multiplied(function, *args) -> list[tuple[int, ...]]:
    """The shapes of what the products of a function give."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]


def test_when_there_are_parts(monkeypatch):
    """For one row and a large matrix, where an axis can be divided: else there is one product."""
    tune(monkeypatch, large=96)
    for rows, width, out, shape in (
        (1, 8, 12, (4, 1, 3)),
        (1, 10, 10, (2, 1, 5)),
        (1, 12, 9, (9, 1)),
        (1, 7, 12, (12, 1)),  # not large
        (2, 8, 12, (12, 2)),
    ):
        x, matrix = np.ones((rows, width)), np.ones((out, width))
        assert multiplied(products.matmul_few, x, matrix) == [shape]


def test_small_matrices_are_multiplied_in_loops(monkeypatch):
    """By few rows, on a CPU, where a loop adds up 8 rows of the matrix; by more as ever. Sums of
    bfloat16 numbers need a product."""
    tune(monkeypatch, large=2**10)
    small, large = jnp.ones((16, 24)), jnp.ones((64, 64))
    kept = products.for_few_rows(small)
    assert isinstance(kept, products.InputMajor)
    assert multiplied(products.matmul, jnp.ones((8, 16)), kept) == [(8, 1, 24)]  # of the sums
    assert multiplied(products.matmul, jnp.ones((9, 16)), kept) == [(9, 24)]
    assert isinstance(products.for_few_rows(large), products.OutputMajor)
    assert isinstance(products.for_few_rows(small, dtype=jnp.bfloat16), products.OutputMajor)
    odd = jnp.ones((12, 24))  # a loop would add up 4 rows, and write many sums
    assert isinstance(products.for_few_rows(odd), products.OutputMajor)
    monkeypatch.setattr(products, "tuning", lambda: products.OTHERS)
    assert isinstance(products.for_few_rows(small), products.OutputMajor)


def test_tuning_is_that_of_the_target(monkeypatch):
    """Of the devices that are traced for, if they are known; else of JAX's default."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert products.tuning() == products.OTHERS
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert products.tuning() == products.TPU
    with traced_on(data_mesh(jax.devices("cpu"))):
        assert products.tuning() == products.CPU
    with jax.default_device(jax.devices("cpu")[0]):
        assert products.tuning() == products.CPU


@pytest.mark.parametrize(
    ("rows", "large", "head_type"),
    [
        (1, True, "shga"),
        (3, False, "mha"),
        pytest.param(1, True, "mha", marks=pytest.mark.slow),
        pytest.param(6, True, "shga", marks=pytest.mark.slow),
    ],
    indirect=["large"],
)
def test_a_step_in_parts_is_a_step(large, rows, head_type):
    """Logits and state token by token, products in parts or loops, are those of blocks."""
    config = ModelConfig(vocab_size=24, d_model=16, d_k=8, num_layers=1, codebook_size=7,
                         block_len=4, window_len=5, head_type=head_type)  # fmt: skip
    model = init_model(config, 0)
    tokens = np.random.default_rng(0).integers(0, 24, (rows, 40)).astype(np.int32)
    state = init_state(config, rows)

    def step(tokens):
        return extend(model, state, tokens)[0]

    parts = [s for s in float32_arrays(step, tokens[:, :1]) if s[:2] == (4, 1) and len(s) == 3]
    assert bool(parts) == (rows == 1)  # of x
    barriers = float32_arrays(step, tokens[:, :1], of="optimization_barrier")
    if rows > 1 and large:  # the matrix first: w_in, w_o (those of the MLP), codes, w_out
        products = dict(shape for shape in barriers if len(shape) == 2)  # out, rows
        assert {16, 24} < products.keys(), products
        assert set(products.values()) == {rows}
    if not large:  # sums over an eighth of what comes in, for w_o and w_out
        assert {(rows, 2, 16), (rows, 2, 24)} < set(barriers), barriers
    logits = []
    for t in range(40):
        new, state = extend(model, state, tokens[:, t : t + 1])
        logits.append(new)
    expected, final = extend(model, init_state(config, rows), tokens)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, atol=2e-5)
    for mine, plain in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        np.testing.assert_allclose(mine, plain, atol=2e-5)
    other, _ = extend(model, init_state(config, rows), tokens[:, ::-1])  # control
    assert np.abs(other - expected).max() > 1e-2


def as_bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def test_rounded_products_and_their_gradients():
    """They are products of rounded numbers, exact but for float32; so are those of gradients."""
    rng = np.random.default_rng(0)
    x, y, g = (rng.normal(size=n).astype(np.float32) for n in [(3, 5, 7), (3, 7, 4), (3, 5, 4)])
    out, pull = jax.vjp(products.matmul_rounded, *map(jnp.asarray, (x, y)))
    to_x, to_y = pull(jnp.asarray(g))
    a, b, c = map(as_bfloat16, (x, y, g))
    swapped_a, swapped_b = np.swapaxes(a, 1, 2), np.swapaxes(b, 1, 2)
    expected = {"out": a @ b, "to x": c @ swapped_b, "to y": swapped_a @ c}
    exact = {"out": x @ y, "to x": g @ np.swapaxes(y, 1, 2), "to y": np.swapaxes(x, 1, 2) @ g}
    for (name, value), mine in zip(expected.items(), (out, to_x, to_y), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, value, rtol=1e-5, atol=1e-5)
        assert np.abs(mine - exact[name]).max() > 1e-3, name  # control: it is rounded
    x, y = jnp.asarray(x), jnp.asarray(y)
    moved = jax.jvp(products.matmul_rounded, (x, y), (x, jnp.zeros_like(y)))[1]
    np.testing.assert_allclose(moved, out, rtol=1e-5, atol=1e-5)


def test_a_shared_factor_of_a_rounded_product():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in [(2, 3, 5, 7), (2, 1, 7, 4)])
    out = products.product(x, y, rounded=True)
    np.testing.assert_allclose(out, as_bfloat16(x) @ as_bfloat16(y), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(products.product(x, y, rounded=False), jnp.matmul(x, y))
