"""Small parts that every model has: array declarations, norms, sinusoids, dropout, keys."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.errors import UserError, shown
from transformer_vq.fields import MOST_SEED
from transformer_vq.nn.products import Matrix, matmul, spread, wide_dtype
from transformer_vq.types import Key, Params


@dataclass(frozen=True)
class ArraySpec:
    """One parameter, declared once: shape, logical axis names (for sharding) and initialiser.

    `init` is "zeros", "ones", "normal", or the numbers themselves; a normal array has standard
    deviation `scale`. A `gate` is trained as a vector is, whatever its shape: by Adam where there
    is a choice, without weight decay.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["zeros", "ones", "normal"] | np.ndarray = "normal"
    scale: float = 1.0
    gate: bool = False


def is_spec(x: Any) -> bool:
    """A leaf of a tree of declarations."""
    return isinstance(x, ArraySpec)


def as_key(key: Any) -> Key:
    """A typed JAX key from a typed key, raw key data (JAX or numpy) or a whole number.

    Raises `UserError` for a number of more than the 32 bits that JAX keeps, and for what is no key.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if not key.shape:
            return key
    elif isinstance(key, int | np.integer):
        if 0 <= key <= MOST_SEED and not isinstance(key, bool):
            return jax.random.key(int(key))
    else:
        try:
            data = key if isinstance(key, jax.Array) else np.asarray(key)
        except (ValueError, TypeError):  # rows of unequal lengths, say
            data = np.empty(0)
        if _is_key_data(data):
            return jax.random.wrap_key_data(jnp.asarray(data, jnp.uint32))
    raise UserError(
        f"key is {shown(key)}: it must be a JAX key, or a whole number from 0 to 2^32 - 1"
    )


def _is_key_data(data: jax.Array | np.ndarray) -> bool:
    """Whether these are the raw numbers of one key: of 32 bits, and as many as a key has."""
    like = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if data.shape != like.shape or data.dtype.kind not in "iu":
        return False
    return isinstance(data, jax.Array) or bool((data >= 0).all() and (data <= MOST_SEED).all())


def init_arrays(specs: Params, key: Key, dtype: Any) -> Params:
    """Arrays for a tree of specs. Each is drawn from its own key, by its place in the tree."""
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))

    def draw(spec: ArraySpec, key: Key) -> jax.Array:
        if isinstance(spec.init, str) and spec.init == "normal":
            return (spec.scale * jax.random.normal(key, spec.shape)).astype(dtype)
        if isinstance(spec.init, np.ndarray):
            return jnp.asarray(spec.init, dtype)
        return jnp.full(spec.shape, {"zeros": 0, "ones": 1}[spec.init], dtype)

    return jax.tree.unflatten(tree, [draw(s, k) for s, k in zip(leaves, keys, strict=True)])


def iota(*bounds: int) -> jax.Array:
    """Whole numbers, as of `range`: int32, as all positions, rows and codes, also where the
    computation is in float64."""
    return jnp.arange(*bounds, dtype=jnp.int32)


def wide(x: jax.Array) -> jax.Array:
    """x in `wide_dtype`."""
    return x.astype(wide_dtype(x.dtype))


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x over its root mean square along the last axis, computed and returned in wide precision."""
    x = wide(x)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


@jax.named_scope("norm")
def norm(params: Params, x: jax.Array) -> jax.Array:
    """RMS norm with gain and bias, in the dtype of x."""
    dtype = wide_dtype(x.dtype)
    gain, bias = (spread(params[name], x).astype(dtype) for name in ("gain", "bias"))
    return (rms_norm(x) * gain + bias).astype(x.dtype)


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
    dtype = wide_dtype(dtype)
    frequencies = max_wavelength ** (-np.arange(0, width, 2) / width)
    angles = positions[..., None].astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dropout(key: Key, x: jax.Array, rate: float, mask_shape: tuple[int, ...] | None = None):
    """Inverted dropout; a `mask_shape` with ones in it shares the mask along those axes."""
    if rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, mask_shape or x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mlp:
    """The constants of an MLP, matrices in the compute dtype."""

    norm: Params
    w_in: Matrix  # [D, hidden]
    w_out: Matrix  # [hidden, D]


@jax.named_scope("mlp")
def mlp(weights: Mlp, x: jax.Array) -> jax.Array:
    """Squared-ReLU feed-forward block (So et al., 2021), with its own norm: `[..., D]` to same."""
    hidden = matmul(norm(weights.norm, x), weights.w_in)
    return matmul(jnp.square(jax.nn.relu(hidden)), weights.w_out)


def mlp_specs(lead: tuple[int, ...], width: int, hidden: int) -> Params:
    """Arrays of `mlp`, stacked as `lead` says."""
    return {
        "norm": norm_specs(lead, width),
        "w_in": ArraySpec((*lead, width, hidden), ("unit", "embed", "hidden"), scale=width**-0.5),
        "w_out": ArraySpec((*lead, hidden, width), ("unit", "hidden", "embed"), scale=hidden**-0.5),
    }
