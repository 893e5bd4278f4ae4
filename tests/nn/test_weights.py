"""Rounded weights: a decoder that keeps them narrow computes what the rounded model does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import close, far, make_config, quick_jit, random_model, tune
from tests.programs import temporary_bytes
from transformer_vq import init_state
from transformer_vq.errors import UserError
from transformer_vq.nn import products
from transformer_vq.nn.decode import decode_step, prepare
from transformer_vq.nn.few import read_few
from transformer_vq.nn.weights import round_weights

pytestmark = pytest.mark.usefixtures("any_size")
CONFIGS = {
    "gated": make_config(d_model=16, d_v=12),  # 16 rows of a matrix in one loop, and 4
    "mlp, tied": make_config("mqa", tie_embeddings=True),
}
step, read = quick_jit(decode_step), quick_jit(read_few)


@pytest.fixture
def any_size(monkeypatch):
    """Matrices of any size are kept narrow."""
    tune(monkeypatch, narrow_size=0)


def wide(model):
    """The same values, kept wide."""
    return dataclasses.replace(model, weights="as-saved")


@pytest.mark.parametrize(
    ("name", "weights"),
    [pytest.param("gated", "bfloat16", marks=pytest.mark.slow), ("mlp, tied", "int8")],
)
def test_narrow_decoding_is_that_of_the_rounded_model(name, weights, double):
    config = CONFIGS[name]
    model = random_model(config)
    rounded = round_weights(model, weights)
    state = init_state(config, 2)
    decoder, plain = prepare(rounded, state), prepare(wide(rounded), state)
    kept = {"bfloat16": "uint16", "int8": "int8"}[weights]
    narrow = [x for x in jax.tree.leaves(decoder) if x.dtype == kept]
    assert len(narrow) == 1 + config.num_units * (2 if name == "gated" else 4)
    first = np.array([3, 9], np.int32)
    after, expected = step(decoder, state, first), step(plain, state, first)
    close(after, expected, 1e-12)
    far(after, step(prepare(model, state), state, first))  # rounding is not nothing
    some = np.array([[1, 2, 5], [4, 4, 0]], np.int32)  # more rows than are read narrow
    close(read(decoder, after, some).logits, read(plain, after, some).logits, 1e-12)


def test_int8_is_the_nearest_of_255_steps_of_a_column():
    matrix = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    matrix[:, :, 3] = 0
    found = products.narrow(jnp.asarray(matrix), "int8")
    assert found.scale is not None and found.scale.shape == (2, 5)
    largest = np.abs(matrix).max(axis=1)
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
    numbers = np.asarray(found.numbers)
    assert (np.abs(numbers).max(axis=1)[:, [0, 1, 2, 4]] == 127).all() and not numbers[..., 3].any()
    error = numbers * np.asarray(found.scale)[:, None] - matrix
    assert (np.abs(error) <= largest[:, None] / 127 * 0.5001).all()


def test_many_rows_are_decoded_with_wide_matrices(double):
    rounded = round_weights(random_model(CONFIGS["gated"]), "int8")

    def kept(rows):
        return {
            str(x.dtype)
            for x in jax.tree.leaves(prepare(rounded, init_state(rounded.config, rows)))
        }

    assert "int8" in kept(products.CPU.narrow_rows)
    assert "int8" not in kept(products.CPU.narrow_rows + 1)


def test_small_matrices_are_kept_wide(monkeypatch, double):
    tune(monkeypatch, narrow_size=16 * 14)  # that of logits has 16 x 13, of outputs 12 x 16
    rounded = round_weights(random_model(CONFIGS["gated"]), "int8")
    decoder = prepare(rounded, init_state(rounded.config, 1))
    narrow = [x for x in jax.tree.leaves(decoder) if x.dtype == "int8"]
    assert len(narrow) == rounded.config.num_units
    assert isinstance(decoder.params["w_out"], products.InputMajor)


def test_a_loop_of_steps_reads_the_numbers_as_they_are():
    """XLA would else write all of the matrix in float32 before the loop, or at every step."""
    matrix = products.narrow(jnp.ones((64, 48), jnp.float32), "int8")

    def loop(x, numbers, scale):
        def body(_, x):
            y = products.matmul(x, products.Narrow(numbers, scale))
            return 0.5 * y[:, :1] * jnp.ones((1, 64), x.dtype)

        return jax.lax.fori_loop(0, 3, body, x)

    def wide_arrays(rows):
        given = jnp.ones((rows, 64), jnp.float32), matrix.numbers, matrix.scale
        compiled = jax.jit(loop).lower(*given).compile()
        return temporary_bytes(compiled) >= 4 * 64 * 48

    assert not wide_arrays(1)
    assert wide_arrays(products.CPU.narrow_rows + 1)  # control


def test_rounding_says_what_it_cannot_do(double):
    model = random_model(CONFIGS["gated"])
    assert round_weights(model, "as-saved") is model
    with pytest.raises(UserError, match="weights is 'int4': it must be one of as-saved, bfloat16"):
        round_weights(model, "int4")
    with pytest.raises(UserError, match="are rounded to int8 already: round those of the model as"):
        round_weights(round_weights(model, "int8"), "bfloat16")
