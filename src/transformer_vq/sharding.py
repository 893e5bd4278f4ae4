"""Where arrays live: one mesh of devices, and rules that lay arrays out on it (docs/scaling.md).

Three axes. The rows of a batch are spread over `data` and `fsdp`. Parameters, with their optimizer
state, are spread over `fsdp` along the residual stream, and gathered where they are used; over
`tensor` along heads, hidden units and the vocabulary. `ArraySpec.axes` names the axes of an array,
`axis_rules` says which of them are spread over what.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer_vq.config import MeshConfig, ModelConfig
from transformer_vq.errors import UserError, shown

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what the rows of a training batch are spread over


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these JAX devices: all of them by default, of all processes.

    Raises `ValueError` if they are not as many as the axes say.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=tuple(devices))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """The sizes of the axes of a mesh of so many devices. Raises as `make_mesh` does."""
    others = config.fsdp * config.tensor
    data = devices // others if config.data == -1 else config.data
    if data * others != devices:
        asked = f"fsdp {config.fsdp} times tensor {config.tensor}"
        if config.data == -1:
            limit = f"a divisor of the {devices} devices"
        else:
            asked, limit = f"data {data} times {asked}", f"the number of devices, {devices}"
        raise UserError(f"the mesh has {asked}: it must be {limit}")
    return data, config.fsdp, config.tensor


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh whose devices differ in their rows only."""
    return make_mesh(MeshConfig(), devices)


def as_mesh(mesh: Any) -> Mesh:
    """The mesh as it is. Raises `UserError` for what is no mesh of these axes."""
    if not isinstance(mesh, Mesh) or mesh.axis_names != AXES:
        raise UserError(
            f"mesh is {shown(mesh)}: it must be one of transformer_vq.sharding.make_mesh or "
            f"data_mesh"
        )
    return mesh


# Layouts.


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis spread as the rows of a training batch are, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def by_device(mesh: Mesh) -> NamedSharding:
    """The first axis spread over all devices of the mesh, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def rows_or_whole(mesh: Mesh, rows: int) -> NamedSharding:
    """`by_rows` if that gives every device the same number of rows, else the whole everywhere."""
    return replicated(mesh) if rows % _parts(mesh) else by_rows(mesh)


def _parts(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def axis_rules(config: ModelConfig, mesh: Mesh) -> dict[str | None, str | None]:
    """For each logical axis, the mesh axis that it is spread over; None where it stays whole.

    An axis that does not divide stays whole: heads are never cut, so that tensor = 2 leaves the
    queries and keys of one head on every device, and spreads its values and gates.
    """
    counts = {
        "embed": ("fsdp", config.d_model),
        "heads": ("tensor", config.num_heads),
        "kv_heads": ("tensor", config.num_kv_heads),
        "hidden": ("tensor", config.d_mlp or config.num_heads * config.d_v),
        "vocab": ("tensor", config.vocab_size),
    }
    rules: dict[str | None, str | None] = {None: None, "unit": None}
    return rules | {
        name: axis if mesh.shape[axis] > 1 and not count % mesh.shape[axis] else None
        for name, (axis, count) in counts.items()
    }


def shard_arrays(mesh: Mesh, config: ModelConfig, specs: Any, tree: Any) -> Any:
    """Shardings for a tree of shapes that holds arrays declared in `specs`, and others.

    An array is that of a spec if its path ends in the spec's and its shape is the same: moments of
    an optimizer and averages of parameters are laid out as the parameters are. Others are whole.
    """
    rules = axis_rules(config, mesh)
    declared = {
        _names(path): (spec.shape, PartitionSpec(*(rules[axis] for axis in spec.axes)))
        for path, spec in jax.tree.leaves_with_path(specs, is_leaf=lambda x: hasattr(x, "axes"))
    }

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            shape, spec = declared.get(names[start:], (None, PartitionSpec()))
            if shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return replicated(mesh)

    return jax.tree.map_with_path(sharding, tree)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


# Inside of a program, where GSPMD needs to be told. Without a mesh these change nothing.


def traced_on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """While it is open, what is traced knows the mesh that it is for."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def keep_rows(tree: Any) -> Any:
    """Activations `[rows, ...]` kept spread by rows, or whole if the rows do not divide.

    Left to itself, GSPMD cuts their features as parameters are cut, over `fsdp`, and sums large
    products over devices where it could have gathered the smaller parameters.
    """
    axes = _mesh_axes()
    if not axes:
        return tree

    def keep(x: jax.Array) -> jax.Array:
        rows = None if x.shape[0] % (axes["data"] * axes["fsdp"]) else BATCH
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *free))

    return jax.tree.map(keep, tree)


def row_shares(rows: int) -> int:
    """In how many parts `keep_rows` spreads so many rows."""
    axes = _mesh_axes()
    shares = axes["data"] * axes["fsdp"] if axes else 1
    return 1 if rows % shares else shares


def whole_columns(table: jax.Array) -> jax.Array:
    """A table `[rows, columns]` with its columns gathered, so that rows can be looked up in it."""
    if not _mesh_axes():
        return table
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
    return jax.lax.with_sharding_constraint(table, spec)


def spread_units(function: Callable, units: jax.Array) -> jax.Array:
    """`function` of matrices `[units, in, out]`, of which it takes each as a whole, where every
    device of `fsdp` has all of some units; and the result laid out as before.

    Zeros fill up what does not divide. Fewer units than devices stay as they are.
    """
    parts = _mesh_axes().get("fsdp", 1)
    if parts == 1 or len(units) < parts:
        return function(units)
    free = [PartitionSpec.UNCONSTRAINED] * (units.ndim - 1)
    keep = jax.lax.with_sharding_constraint
    whole, spread = PartitionSpec(None, *free), PartitionSpec("fsdp", *free)
    # Both named, before and after: left to itself, GSPMD exchanges the terms of a sum, not the sum.
    zeros = [(0, -len(units) % parts)] + [(0, 0)] * (units.ndim - 1)
    given = keep(jax.numpy.pad(keep(units, whole), zeros), spread)
    return keep(keep(function(given), spread)[: len(units)], whole)


def cuts_columns() -> bool:
    """Whether the columns of projections are spread over `tensor`."""
    return _mesh_axes().get("tensor", 1) > 1


def _mesh_axes() -> dict[str, int]:
    """The sizes of the axes that GSPMD lays arrays out on; none within `map_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if AxisType.Manual in mesh.axis_types else dict(mesh.shape)


# Rows.


def require_divisible(rows: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Raise `ValueError` unless `by_rows` gives every device the same number of rows."""
    if rows % _parts(mesh):
        raise UserError(
            f"{name} is {rows}: it must be a multiple of the {_parts(mesh)} devices that share "
            f"its rows, or use fewer"
        )


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of a batch's rows this process provides, and how many shares there are.

    Processes whose devices hold the same rows provide the same share. Raises `ValueError` for a
    mesh that cuts the rows of one process elsewhere than those of another.
    """
    parts = _parts(mesh)
    rows: dict[int, set[int]] = {}
    for device, (part,) in by_rows(mesh).devices_indices_map((parts,)).items():
        rows.setdefault(device.process_index, set()).add(part.start or 0)
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, shares)) != parts or len({len(share) for share in shares}) > 1:
        raise UserError(
            f"the mesh is {dict(mesh.shape)} over {len(rows)} processes, which then have rows in "
            f"common, but not all: make fsdp and tensor divide the devices of a process, or be "
            f"multiples of them"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays `[rows of this process's share, ...]` as global arrays, spread by rows."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(by_rows(mesh), x), tree)


def spread(mesh: Mesh, tree: Any, index: np.ndarray | None = None) -> Any:
    """Whole arrays `[rows, ...]`, the same in every process, spread over all devices by rows.

    With an `index` `[new rows]`, row i of the result is row `index[i]` of what was given.
    """

    def place(x: Any) -> jax.Array:
        host = np.asarray(x)
        chosen = np.arange(len(host)) if index is None else index

        def rows(where: Any) -> np.ndarray:
            return host[chosen[where[0]]]

        shape = (len(chosen), *host.shape[1:])
        return jax.make_array_from_callback(shape, by_device(mesh), rows)

    return jax.tree.map(place, tree)


def part_of(tree: Any, device: Any) -> Any:
    """What a device has of global arrays, as arrays of that device alone; nothing is copied."""

    def part(x: jax.Array) -> jax.Array:
        return next(shard.data for shard in x.addressable_shards if shard.device == device)

    return jax.tree.map(part, tree)


def with_part(tree: Any, device: Any, part: Any) -> Any:
    """Global arrays like these with another part on one device: `part`, from any device."""

    def replaced(x: jax.Array, new: jax.Array) -> jax.Array:
        parts = [
            jax.device_put(new, device) if shard.device == device else shard.data
            for shard in x.addressable_shards
        ]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)

    return jax.tree.map(replaced, tree, part)


def fetch(tree: Any) -> Any:
    """Global arrays as whole host arrays, in every process; all processes must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def map_rows(program: Callable, mesh: Mesh) -> Callable:
    """`program(whole, *by_row)` as every device runs it, alone, on its own rows.

    The first argument is on every device; the others, and the results, are spread by rows.
    """
    whole, rows = PartitionSpec(), PartitionSpec(AXES)

    def mapped(first: Any, *others: Any) -> Any:
        specs = (whole, *(rows for _ in others))
        # Rows are independent: there is nothing to check between devices.
        return jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(
            first, *others
        )

    return mapped


# Processes.


def any_process(mesh: Mesh, flags: Sequence[bool]) -> jax.Array:
    """Which of the flags are set in one process or more; all processes must ask.

    The answer is computed in the background, after what the devices are busy with.
    """
    rows = np.tile(np.asarray(flags, np.bool_), (len(mesh.local_devices), 1))
    told = jax.make_array_from_process_local_data(by_device(mesh), rows)
    return jax.jit(_any_row, out_shardings=replicated(mesh))(told)


def _any_row(flags: jax.Array) -> jax.Array:
    return flags.any(axis=0)


def all_processes(flag: bool) -> bool:
    """Whether the flag is set in every process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.bool_(flag))))


def require_same(value: int, what: str) -> None:
    """Raise `ValueError` if processes have different values; all must ask. `what` is theirs."""
    if jax.process_count() == 1:
        return
    values = multihost_utils.process_allgather(np.int64(value)).tolist()
    if len(set(values)) > 1:
        raise UserError(
            f"{what} are not the same for all processes ({', '.join(map(str, values))}): "
            f"use a folder on a disk that all of them share"
        )
