"""The leaves of a tree in a checkpoint: their names, what is written for each, and read for it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; one sentence says why and what to do."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their path: fields, keys and indices joined by slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf
        for path, leaf in leaves
    }
    if len(named) < len(leaves):
        raise CheckpointError("two arrays of the tree have one name: a key of it contains a slash")
    return named


def _is_random_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def storable(name: str, leaf: Any) -> np.ndarray | jax.Array:
    """The array to write for a leaf: itself, the data of a random key, or a number as an array."""
    if _is_random_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        # Among several processes, orbax takes arrays of them all, or numpy arrays from the first.
        return np.asarray(leaf) if _is_local_of_many(leaf.sharding) else leaf
    return _number_array(name, leaf)


def _number_array(name: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype.kind in "OSUMm":  # objects, texts and dates
        raise CheckpointError(f"{name} is of type {type(leaf).__name__}: save arrays and numbers")
    return array


def data_spec(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what `storable` would write."""
    if _is_random_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    array = leaf if hasattr(leaf, "dtype") else _number_array(name, leaf)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where to put a leaf, or None if it is free to go where it is used."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _is_local_of_many(sharding: jax.sharding.Sharding) -> bool:
    return jax.process_count() > 1 and sharding.is_fully_addressable


def placed(leaf: Any) -> jax.sharding.Sharding | None:
    """Where what was written for a leaf is to be read to; None: as numpy."""
    sharding = _sharding(leaf)
    return None if sharding is None or _is_local_of_many(sharding) else sharding


def as_like(leaf: Any, value: np.ndarray | jax.Array) -> Any:
    """What was read, as the kind of thing that `leaf` is."""
    if isinstance(leaf, np.ndarray):
        return value
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return type(leaf)(value.item())
    array = jax.device_put(value, _sharding(leaf))  # does nothing to what orbax has placed
    if _is_random_key(leaf):
        impl = jax.random.key_impl(jnp.empty((), leaf.dtype))
        return jax.random.wrap_key_data(array, impl=impl)
    return array


def x64() -> str:
    """Whether JAX has numbers of 64 bits (`JAX_ENABLE_X64`): on or off."""
    return "on" if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 else "off"


def describe(array: Any) -> str:
    """Dtype and shape in a word."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def check_match(
    path: Path, saved: dict[str, str], specs: dict[str, jax.ShapeDtypeStruct], *, subtree: bool
) -> None:
    """Raises `CheckpointError` naming the first array that is not as in the checkpoint."""
    difference = None
    hint = "use the configuration, and the version of this package, it was saved with"
    for name, spec in specs.items():
        if name not in saved:
            difference = f"{name} is missing in {path} and {describe(spec)} here"
        elif saved[name] != describe(spec):
            difference = f"{name} is {saved[name]} in {path} and {describe(spec)} here"
            if saved[name].replace("64[", "32[") == describe(spec).replace("64[", "32["):
                hint = f"JAX_ENABLE_X64 is {x64()}: set it as it was when the run began"
        if difference:
            break
    else:
        unknown = next((name for name in saved if name not in specs), None)
        if unknown is not None and not subtree:
            difference = f"{unknown} is {saved[unknown]} in {path} and missing here"
    if difference:
        raise CheckpointError(f"{difference}: {hint}")
