"""Where arrays live: one mesh axis, `data`, along which the rows of a batch are spread."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over these JAX devices: all of them by default."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=tuple(devices))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis spread over the devices, the rest whole."""
    return NamedSharding(mesh, PartitionSpec("data"))


def require_divisible(rows: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Raise `ValueError` unless every device of the mesh gets the same number of rows."""
    if rows % mesh.size:
        raise ValueError(
            f"{name} is {rows}: it must be a multiple of the {mesh.size} devices, or use fewer"
        )


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays `[rows of this process, ...]` as global arrays, spread by rows."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(by_rows(mesh), x), tree)
