"""Small pieces every model has: array declarations, norms, sinusoids, dropout, keys."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.types import Key, Params

PARTS = 4  # of the product of one row and a large matrix
LARGE = 2**20  # numbers in it
FEW = 64  # rows, up to which a product has the matrix first


@dataclass(frozen=True)
class ArraySpec:
    """One parameter, declared once: shape, logical axis names (for sharding) and initialiser.

    `init` is "zeros", "ones" or "normal"; a normal array has standard deviation `scale`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["zeros", "ones", "normal"] = "normal"
    scale: float = 1.0


def is_spec(x: Any) -> bool:
    """A leaf of a tree of declarations."""
    return isinstance(x, ArraySpec)


def as_key(key: Any) -> Key:
    """A typed JAX key from a typed key, raw key data (JAX or numpy) or a whole number."""
    if isinstance(key, int | np.integer):
        return jax.random.key(int(key))
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32))


def init_arrays(specs: Params, key: Key, dtype: Any) -> Params:
    """Arrays for a tree of specs. Each is drawn from its own key, by its place in the tree."""
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))

    def draw(spec: ArraySpec, key: Key) -> jax.Array:
        if spec.init == "normal":
            return (spec.scale * jax.random.normal(key, spec.shape)).astype(dtype)
        return jnp.full(spec.shape, {"zeros": 0, "ones": 1}[spec.init], dtype)

    return jax.tree.unflatten(tree, [draw(s, k) for s, k in zip(leaves, keys, strict=True)])


def wide(x: jax.Array) -> jax.Array:
    """x in at least float32: the precision of norms, softmaxes and sums."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x over its root mean square along the last axis, computed and returned in wide precision."""
    x = wide(x)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def norm(params: Params, x: jax.Array) -> jax.Array:
    """RMS norm with gain and bias, in the dtype of x."""
    gain, bias = (_spread(params[name], x) for name in ("gain", "bias"))
    return (rms_norm(x) * gain + bias).astype(x.dtype)


def _spread(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector `[D]` in the shape of x `[..., D]`, by a product, so that its gradient is one too.

    XLA makes a broadcast of it; the sum over all tokens that is a broadcast's gradient is many
    times slower than a product on a CPU.
    """
    ones = jnp.ones((math.prod(x.shape[:-1]), 1), vector.dtype)
    return jnp.matmul(ones, vector[None], precision="highest").reshape(x.shape)


def norm_specs(lead: tuple[int, ...], width: int) -> Params:
    """Arrays of `norm`; `lead` is `(N,)` where they are stacked over units, or empty."""
    axes = ("unit",) * len(lead) + (None,)
    return {
        "gain": ArraySpec((*lead, width), axes, "ones"),
        "bias": ArraySpec((*lead, width), axes, "zeros"),
    }


def sinusoid(positions: jax.Array, width: int, max_wavelength: float, dtype: Any) -> jax.Array:
    """Sines, then cosines, of integer positions `[...]`, as `[..., width]` (Vaswani et al., 2017).

    The angles are computed in wide precision: at position 1,000,000 bfloat16 would be noise.
    """
    dtype = jnp.promote_types(dtype, jnp.float32)
    frequencies = max_wavelength ** (-np.arange(0, width, 2) / width)
    angles = positions[..., None].astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dropout(key: Key, x: jax.Array, rate: float, mask_shape: tuple[int, ...] | None = None):
    """Inverted dropout; a `mask_shape` with ones in it shares the mask along those axes."""
    if rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, mask_shape or x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """Squared-ReLU feed-forward block (So et al., 2021), with its own norm: `[..., D]` to same.

    Its weights are in the dtype of x.
    """
    hidden = multiply(norm(params["norm"], x), params["w_in"])
    return multiply(jnp.square(jax.nn.relu(hidden)), params["w_out"])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajor:
    """A matrix that is stored as `[out, in]`, which products with few rows read in order."""

    matrix: jax.Array


def multiply(x: jax.Array, matrix: jax.Array | OutputMajor) -> jax.Array:
    """x `[..., in]` times a matrix `[in, out]`, as two matrices: then its gradient copies no
    transpose."""
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    y = by_output(x, matrix.matrix) if isinstance(matrix, OutputMajor) else x @ matrix
    return y.reshape(*lead, y.shape[-1])


def by_output(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x `[..., rows, in]` times a matrix `[..., out, in]`: `[..., rows, out]`.

    How it is done with few rows is for XLA's CPU backend (docs/benchmarks.md): the matrix first,
    and one that is not large times each half of the rows, since two products run side by side
    better than one is shared. Barriers keep XLA from what it likes better: to make one product of
    products with the same operand, and to put x first.
    """
    *lead, rows, width = x.shape
    out = matrix.shape[-2]
    parts = parts_of(rows, matrix.size, out)
    if parts > 1:
        x = jnp.broadcast_to(x[..., None, :, :], (*lead, parts, rows, width))
        matrix = matrix.reshape(*lead, parts, out // parts, width)
        y = jnp.matmul(jax.lax.optimization_barrier(x), jnp.swapaxes(matrix, -1, -2))
        return jnp.moveaxis(y, -3, -2).reshape(*lead, rows, out)
    if jax.default_backend() == "cpu" and rows <= FEW:
        halves = jnp.split(x, 2 if rows % 2 == 0 and matrix.size < LARGE else 1, axis=-2)
        products = [jnp.matmul(matrix, jnp.swapaxes(half, -1, -2)) for half in halves]
        products = [jnp.swapaxes(jax.lax.optimization_barrier(y), -1, -2) for y in products]
        return jnp.concatenate(products, axis=-2)
    return jnp.matmul(x, jnp.swapaxes(matrix, -1, -2))


def parts_of(rows: int, size: int, length: int) -> int:
    """In how many products to make that of `rows` rows and a matrix of `size` numbers, cut along an
    axis of `length`.

    XLA's CPU backend gives threads unequal shares of the product of one row and a large matrix;
    several such products it shares evenly.
    """
    shared = jax.default_backend() == "cpu" and rows == 1 and size >= LARGE
    return math.gcd(length, PARTS) if shared else 1


def mlp_specs(lead: tuple[int, ...], width: int, hidden: int) -> Params:
    """Arrays of `mlp`, stacked as `lead` says."""
    return {
        "norm": norm_specs(lead, width),
        "w_in": ArraySpec((*lead, width, hidden), ("unit", "embed", "hidden"), scale=width**-0.5),
        "w_out": ArraySpec((*lead, hidden, width), ("unit", "hidden", "embed"), scale=hidden**-0.5),
    }
