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


def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x `[..., in]` times `[in, out]`, as two matrices: then its gradient copies no transpose."""
    rows, (width, out) = math.prod(x.shape[:-1]), matrix.shape
    parts = parts_of(rows, matrix.size, width)
    if parts == 1:
        return (x.reshape(rows, width) @ matrix).reshape(*x.shape[:-1], out)
    matrix = matrix.reshape(parts, width // parts, out)
    return jnp.matmul(x.reshape(parts, 1, -1), matrix).sum(0).reshape(*x.shape[:-1], out)


def multiply_transposed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x `[..., in]` times a matrix that is stored as `[out, in]`."""
    lead, (out, width) = x.shape[:-1], matrix.shape
    rows = math.prod(lead)
    parts = parts_of(rows, matrix.size, out)
    x = x.reshape(1, rows, width)
    if parts > 1:  # with a barrier, or XLA makes one product of products with the same x
        x = jax.lax.optimization_barrier(jnp.broadcast_to(x, (parts, rows, width)))
    matrix = matrix.reshape(parts, out // parts, width)
    y = jax.lax.dot_general(x, matrix, (((2,), (2,)), ((0,), (0,))))
    return jnp.moveaxis(y, 0, 1).reshape(*lead, out)


def parts_of(rows: int, size: int, length: int) -> int:
    """In how many products to make that of `rows` rows and a matrix of `size` numbers, cut along an
    axis of `length`.

    XLA's CPU backend gives threads unequal shares of the product of one row and a large matrix;
    several such products it shares evenly (docs/benchmarks.md).
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
