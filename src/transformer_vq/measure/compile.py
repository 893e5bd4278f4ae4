"""Programs compiled for devices that are not here: what they need, exchange and copy.

JAX compiles for a TPU topology with the package `libtpu` alone, and lowers for CUDA with nothing.
No array is allocated. Every program is traced for a mesh, so it has the forms of its target
(`nn.products.tuning`), whatever the process runs on.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding

from transformer_vq import costs, sharding
from transformer_vq.config import MeshConfig, ModelConfig, TrainConfig
from transformer_vq.data import Batch
from transformer_vq.engine.controls import controls_row
from transformer_vq.engine.program import compiled_now
from transformer_vq.engine.request import SamplingParams
from transformer_vq.errors import UserError, cut, plain, shown, to_install
from transformer_vq.measure import hlo
from transformer_vq.nn.decode import prepare
from transformer_vq.nn.model import init_model, init_state
from transformer_vq.ops.decode import Pause, Rows, generate_tokens, prefill
from transformer_vq.ops.sample import SampleConfig, sample_sequences
from transformer_vq.ops.train import init_train_state, make_train_step, require_trainable

PROGRAMS = ("decode", "sample", "prefill", "train")
STEPS = 32  # of decoding in one program, as `generate` has them
CHUNK = 1024  # tokens of a prompt that are read at once
# What libtpu asks the network for, unless it is told: what machine this is. It is none.
_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Target:
    """Devices that programs are compiled for."""

    topology: str
    kind: str
    mesh: Mesh | AbstractMesh
    lowered_for: str | None = None  # a platform that nothing here compiles for


def target(topology: str, mesh: MeshConfig) -> Target:
    """The devices of a topology: `v5e:2x4`, and others that libtpu knows; `cuda` or `cuda:8`, for
    which programs are lowered only; `cpu` or `cpu:8`, those of this process.

    Raises `UserError` for a topology that cannot be had, or a mesh that is of other devices.
    """
    platform, _, size = topology.partition(":")
    if platform not in ("cpu", "cuda"):
        devices = _tpu_devices(topology)
        return Target(topology, devices[0].device_kind, sharding.make_mesh(mesh, devices))
    if size and not (size.isdecimal() and int(size)):
        raise UserError(f"the topology is {shown(topology)}: after {platform}: comes a number")
    if platform == "cuda":
        axes = sharding.mesh_shape(mesh, int(size or 1))
        kinds, device = (AxisType.Auto,) * len(axes), AbstractDevice("cuda", None, "cuda")
        abstract = AbstractMesh(axes, sharding.AXES, kinds, abstract_device=device)
        return Target(topology, "GPU", abstract, lowered_for="cuda")
    devices = jax.devices("cpu")
    if int(size or 1) > len(devices):
        raise UserError(
            f"the topology is {shown(topology)}, and this process has {len(devices)} CPU devices: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={size} makes more"
        )
    devices = devices[: int(size or 1)]
    return Target(topology, devices[0].device_kind, sharding.make_mesh(mesh, devices))


def _tpu_devices(topology: str) -> list[Any]:
    try:
        version("libtpu")
    except PackageNotFoundError:
        raise UserError(
            f"to compile for {shown(topology)} takes the package libtpu: "
            f"{to_install('tpu')} (cuda and cpu work without)"
        ) from None
    for name, value in _NO_MACHINE.items():
        if os.environ.get(name, "WARNING").startswith("WARNING"):  # JAX's word for: not found
            os.environ[name] = value
    lengths = [int(n) for n in re.findall(r"\d+", topology.partition(":")[2])][:2]
    # A machine has four chips, or as many as there are.
    host = [1 if n % 2 else 2 for n in (*lengths, 1, 1)[:2]] + [1]
    try:
        found = topologies.get_topology_desc(topology, "tpu", chips_per_host_bounds=host)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"there is no topology {shown(topology)}: {cut(plain(str(error)), 200)}"
        ) from None
    return list(found.devices)


# The programs: each as it is traced for a mesh.


@dataclass(frozen=True)
class _Shapes:
    """A tree of arrays that are not there: JAX would make some of what describes them."""

    leaves: list[jax.ShapeDtypeStruct]
    tree: Any

    @classmethod
    def of(cls, make: Callable[[], Any], place: NamedSharding | None = None) -> "_Shapes":
        """Of what `make` makes, laid out like this."""
        tree = None

        def leaves() -> list[jax.Array]:
            nonlocal tree
            found, tree = jax.tree.flatten(make())
            return found

        shapes = jax.eval_shape(leaves)
        return cls([jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes], tree)


def _traced(function: Callable, arguments: list[_Shapes], donate: int | None) -> jax.stages.Traced:
    """The function traced, as one of lists of leaves."""

    def program(*leaves: list[Any]) -> list[Any]:
        given = (x.tree.unflatten(of) for x, of in zip(arguments, leaves, strict=True))
        return jax.tree.leaves(function(*given))

    donated = () if donate is None else donate
    return jax.jit(program, donate_argnums=donated).trace(*(x.leaves for x in arguments))


def _trace_decode(config: ModelConfig, mesh: Any, rows: int) -> jax.stages.Traced:
    """Up to `STEPS` tokens of each row, as `generate(mesh=...)` draws them."""
    vocab = config.vocab_size
    row = controls_row(SamplingParams(), vocab)

    def start() -> Rows:
        zeros = jnp.zeros(rows, jnp.int32)
        return Rows(
            state=init_state(config, rows),
            prompt=jnp.zeros((rows, vocab), bool),
            counts=jnp.zeros((rows, vocab), jnp.int32),
            generated=zeros,
            remaining=zeros,
            active=jnp.zeros(rows, bool),
        )

    def controls() -> Any:
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), row)

    def decode(*arguments: Any) -> Any:
        return generate_tokens(*arguments, steps=STEPS, with_logprobs=False, mesh=mesh)

    spread = sharding.by_device(mesh)
    decoder = _Shapes.of(
        lambda: prepare(init_model(config, 0), init_state(config, 1)), sharding.replicated(mesh)
    )
    arguments = [
        decoder,
        _Shapes.of(controls, spread),
        _Shapes.of(start, spread),
        _Shapes.of(lambda: jnp.ones(rows, bool), spread),
        _Shapes.of(lambda: Pause(jnp.int32(STEPS), jnp.bool_(False)), sharding.replicated(mesh)),
    ]
    return _traced(decode, arguments, donate=2)


def _trace_sample(config: ModelConfig, mesh: Any, rows: int) -> jax.stages.Traced:
    """`STEPS` tokens of each row from nothing, by `sample_op`."""
    whole = sharding.replicated(mesh)
    arguments = [
        _Shapes.of(lambda: init_model(config, 0), whole),
        _Shapes.of(lambda: jnp.zeros(2, jnp.uint32), whole),
    ]

    def sample(*arguments: Any) -> Any:
        return sample_sequences(SampleConfig(rows, STEPS, 0.9), 0, mesh, *arguments)

    return _traced(sample, arguments, donate=None)


def _trace_prefill(config: ModelConfig, mesh: Any, rows: int) -> jax.stages.Traced:
    """A chunk of each row's prompt, as `generate(mesh=...)` reads it."""
    spread = sharding.by_device(mesh)
    arguments = [
        _Shapes.of(lambda: init_model(config, 0), sharding.replicated(mesh)),
        _Shapes.of(lambda: init_state(config, rows), spread),
        _Shapes.of(lambda: jnp.zeros((rows, CHUNK), jnp.int32), spread),
        _Shapes.of(lambda: jnp.zeros(rows, jnp.int32), spread),
    ]
    return _traced(lambda *given: prefill(*given, mesh=mesh), arguments, donate=1)


def _trace_train(config: ModelConfig, train: TrainConfig, mesh: Any) -> jax.stages.Traced:
    """The updates of one batch (`make_train_step`)."""
    require_trainable(config, train, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, train))
    tokens, mask, starts = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((train.batch_size, train.sequence_len), jnp.int32),
            ((train.batch_size, train.sequence_len), jnp.bool_),
            ((train.batch_size,), jnp.bool_),
        )
    )
    batch = Batch._make((tokens, tokens, mask, tokens, starts))
    return make_train_step(config, train, mesh).trace(state, batch)


def trace_program(
    name: str, config: ModelConfig, train: TrainConfig, mesh: Mesh | AbstractMesh, rows: int
) -> jax.stages.Traced:
    """One of `PROGRAMS`, traced for the devices of a mesh, with so many rows for each of them."""
    if name == "train":
        return _trace_train(config, train, mesh)
    trace = {"decode": _trace_decode, "sample": _trace_sample, "prefill": _trace_prefill}[name]
    return trace(config, mesh, rows * mesh.size)


# What became of them.


def compile_programs(
    config: ModelConfig,
    train: TrainConfig,
    on: Target,
    programs: tuple[str, ...] = PROGRAMS,
    *,
    rows: int = 8,
) -> Iterator[dict[str, Any]]:
    """Compile these of `PROGRAMS`, one by one: a record of each, as JSON has it.

    Args:
      rows: of a device, in all programs but `train`, whose batch is that of its recipe.

    Raises `UserError` for a recipe that the devices cannot share.
    """
    size = on.mesh.size
    for name in programs:
        record = {"program": name, "topology": on.topology, "device": on.kind, "devices": size}
        record["mesh"] = dict(on.mesh.shape)
        if name == "train":
            record["rows"] = train.batch_size / (size / on.mesh.shape["tensor"])
            record["flops"] = costs.run_flops(config, train) * train.batch_size * train.sequence_len
            record["flops"] /= size
        else:
            record["rows"] = rows
        least = _largest_array(config, rows) if name in ("decode", "sample") else None
        start = time.perf_counter()
        traced = trace_program(name, config, train, on.mesh, rows)
        yield record | _compiled(traced, on, least, start)


def _compiled(
    traced: jax.stages.Traced, on: Target, least: int | None, start: float
) -> dict[str, Any]:
    if on.lowered_for:
        lowered = traced.lower(lowering_platforms=(on.lowered_for,))
        operations = len(re.findall(r"^ +%\S+ = ", lowered.as_text(), re.MULTILINE))
        return {"lowered_seconds": time.perf_counter() - start, "operations": operations}
    lowered = traced.lower()
    record: dict[str, Any] = {"lowered_seconds": time.perf_counter() - start}
    start = time.perf_counter()
    try:
        with compiled_now():
            compiled = lowered.compile()
    except RuntimeError as error:  # what XLA says
        return record | {"failed": _reason(error)}
    record["compile_seconds"] = time.perf_counter() - start
    if memory := compiled.memory_analysis():
        record["memory"] = _memory(memory)
    # XLA counts what is in a loop once.
    record["xla_flops"] = (compiled.cost_analysis() or {}).get("flops")
    program = hlo.Program.parse(compiled.as_text() or "")
    record["collectives"] = {kind: asdict(x) for kind, x in hlo.collectives(program).items()}
    if least is not None:
        record["copies"] = {"least_bytes": least, **asdict(hlo.large_copies(program, least))}
    return record


def _memory(memory: Any) -> dict[str, int]:
    """Bytes of one device. Results that lie where arguments were are not counted again."""
    count = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    return {"total": sum(count.values()), **count}


def _reason(error: RuntimeError) -> str:
    """What XLA says of memory that is short, or the beginning of whatever else."""
    text = " ".join(plain(str(error).replace("\n", " ")).split())
    for pattern, what in (
        (r"Used (\S+) of (\S+) hbm", "all"),
        (r"HLO temporaries \((\S+)\) exceeds available HBM \((\S+)\)", "temporaries"),
    ):
        if found := re.search(pattern, text):
            need, have = (re.sub(r"([KMGT])$", r" \1iB", n) for n in found.groups())
            return f"does not fit: {what} take {need}, and a device has {have}"
    return cut(text, 300)


def _largest_array(config: ModelConfig, rows: int) -> int:
    """Bytes of the largest array that one unit keeps of so many rows: the table of its values."""
    units = jax.eval_shape(lambda: jax.tree.leaves(init_state(config, rows).units))
    return max(x.size * x.dtype.itemsize for x in units)


def versions() -> dict[str, str | None]:
    """Of what compiles."""
    with contextlib.suppress(PackageNotFoundError):
        return {"jax": jax.__version__, "jaxlib": version("jaxlib"), "libtpu": version("libtpu")}
    return {"jax": jax.__version__, "jaxlib": version("jaxlib"), "libtpu": None}
