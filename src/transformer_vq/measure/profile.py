"""Where the time of a decoding step goes: its operations by layer, beside what memory allows.

The compiled step says what each operation reads and writes, and which `jax.named_scope` it is of;
JAX's profiler says how long it took. Units are equal, so operations are added up by layer and kind.
"""

import collections
import functools
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_vq.config import ModelConfig
from transformer_vq.engine.device import Slots
from transformer_vq.engine.prefill import begin
from transformer_vq.engine.program import Program as CompiledProgram
from transformer_vq.engine.request import SamplingParams
from transformer_vq.errors import UserError
from transformer_vq.measure.bench import DISPATCH, Probe
from transformer_vq.measure.hlo import Operation, Program
from transformer_vq.nn.model import init_model
from transformer_vq.nn.products import Weights
from transformer_vq.nn.weights import round_weights
from transformer_vq.ops.decode import Pause, generate_tokens

# What JAX puts into the names of operations besides our scopes.
_NO_SCOPE = re.compile(r".*[(<]|(while|body|cond|closed_call|branch_\d+_fun|pjit)$")
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is written
_OTHERS_TIME = ("while", "conditional", "call")  # of the operations in them


@dataclass(frozen=True)
class Row:
    """Operations of one layer and kind."""

    layer: str  # the innermost named scopes
    kind: str  # dot, fusion of a loop, gather, ...
    calls: float  # these are of one step
    bytes: float
    seconds: float


def profile_decode(
    config: ModelConfig, batch: int, *, position: int = 1, weights: Weights = "as-saved"
) -> dict[str, Any]:
    """A record as `bench.bench_decode` gives, with `operations`: the rows of a table, the longest
    first. Raises `UserError` where the profiler gives no times of operations."""
    model = round_weights(init_model(config, 0), weights)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, position).tolist() for _ in range(batch)]
    params = SamplingParams(max_tokens=4 * DISPATCH, top_p=0.9)
    state = begin(config, None, [position + params.max_tokens], batch, None)
    slots = Slots(model, state, [params] * batch, prompts)
    slots.read(prompts)
    decoder, controls, rows = slots.decoder, slots.controls, slots.rows
    rest = np.ones(batch, bool), Pause(np.int32(DISPATCH), np.bool_(False))
    decode = functools.partial(generate_tokens, steps=DISPATCH, with_logprobs=False)
    step = CompiledProgram(decode, (decoder, controls, rows, *rest), donate=(2,))
    step.compile()
    bandwidth = Probe(config.compute_dtype).bandwidth()
    rows, _ = step(decoder, controls, rows, *rest)  # warms up
    jax.block_until_ready(rows)
    start = time.perf_counter()
    rows, _ = jax.block_until_ready(step(decoder, controls, rows, *rest))
    plain = (time.perf_counter() - start) / DISPATCH
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            jax.block_until_ready(step(decoder, controls, rows, *rest))
            recorded = (time.perf_counter() - start) / DISPATCH
        times = operation_times(Path(folder))
    operations = by_layer(Program.parse(step.text()), times, DISPATCH)
    if not operations:
        raise UserError(
            f"the profiler of JAX {jax.__version__} gives no times of operations on this device "
            f"({jax.devices()[0].device_kind}): tvq bench decode without --profile times the step"
        )
    return {
        "batch": batch,
        "position": position,
        "weights": weights,
        "ms_per_step": 1e3 * plain,
        "ms_recorded": 1e3 * recorded,
        "bandwidth": bandwidth,
        "operations": [vars(row) for row in operations],
    }


def operation_times(folder: Path) -> dict[str, tuple[int, float]]:
    """Calls and seconds of each operation in a trace, by name; empty where it has none.

    On a CPU an operation that its threads share has an event for its beginning and one that marks
    its end ("end: NAME"); operations may overlap.
    """
    begun: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    ended: dict[str, list[float]] = collections.defaultdict(list)
    for file in folder.rglob("*.xplane.pb"):
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        for event in (event for plane in planes for line in plane.lines for event in line.events):
            if event.name.startswith("end: "):
                ended[event.name.removeprefix("end: ")].append(event.end_ns)
            elif name := dict(event.stats).get("hlo_op"):
                begun[str(name)].append((event.start_ns, event.end_ns))
    times = {}
    for name, spans in begun.items():
        spans.sort()
        ends = sorted(ended[name])
        if len(ends) != len(spans):
            ends = [end for _, end in spans]
        seconds = sum(max(0.0, end - start) for (start, _), end in zip(spans, ends, strict=True))
        times[name] = len(spans), 1e-9 * seconds
    return times


def by_layer(program: Program, times: dict[str, tuple[int, float]], steps: int) -> list[Row]:
    """Rows of a table, the longest first; `times`: calls and seconds of operations, by name."""
    sums: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for computation, operation in _loop(program):
        if operation.name not in times or operation.kind in _OTHERS_TIME:
            continue
        calls, seconds = times[operation.name]
        layer = layer_of(program.computations[computation], operation)
        row = sums[layer, kind_of(program, operation)]
        row[0] += calls / steps
        row[1] += calls / steps * touched(program, computation, operation)
        row[2] += seconds / steps
    found = [Row(*key, *values) for key, values in sums.items()]
    return sorted(found, key=lambda row: -row.seconds)


def _loop(program: Program) -> Iterator[tuple[str, Operation]]:
    """All operations outside of fusions, each once, with its computation."""
    seen = set()
    for run in program.runs():
        if not run.in_fusion and run.operation.name not in seen:
            seen.add(run.operation.name)
            yield run.computation, run.operation


def layer_of(known: dict[str, Operation], operation: Operation, steps: int = 4) -> str:
    """The named scopes that an operation is of; of a fusion, those of what it gives. Where XLA has
    dropped them, as of products, those of what uses it, `steps` operations on at most."""
    found = re.search(r'op_name="([^"]*)"', operation.rest)
    if found:
        parts = found[1].split("/")[:-1]
        return "/".join(part for part in parts if not _NO_SCOPE.match(part)) or "other"
    users = (op for op in known.values() if steps and operation.name in op.operands)
    layers = (layer_of(known, user, steps - 1) for user in users if user.kind != "tuple")
    return next((layer for layer in layers if layer != "other"), "other")


def kind_of(program: Program, operation: Operation) -> str:
    """What an operation does; of a fusion, the most telling of what is in it."""
    if operation.kind != "fusion":
        return operation.kind
    inside = program.computations.get(operation.runs[0], {}) if operation.runs else {}
    kinds = {op.kind for op in inside.values()}
    telling = ("dot", "scatter", "dynamic-update-slice", "gather", "sort", "reduce", "copy")
    return next((f"loop with {kind}" for kind in telling if kind in kinds), "loop")


def touched(program: Program, computation: str, operation: Operation) -> int:
    """Bytes that an operation reads and writes: of arrays that it takes a part of, or changes in
    place, those of the part."""
    inside = program.computations.get(operation.runs[0], {}) if operation.runs else {}
    if operation.kind == "fusion":
        given = sum(_read(inside, op) for op in inside.values() if op.kind == "parameter")
        return given + _written(inside)
    known = program.computations[computation]
    made = sum(array.bytes for array in operation.results)
    if operation.kind in _SLICES:
        return 2 * made
    if operation.kind in _UPDATES:
        return 2 * _update(known, operation)
    return made + sum(array.bytes for array in program.arrays(computation, operation.operands))


def _read(inside: dict[str, Operation], given: Operation) -> int:
    """Bytes of a fusion's operand that it reads."""
    parts = 0
    whole = sum(array.bytes for array in given.results)
    for user in (op for op in inside.values() if given.name in op.operands):
        first = user.operands[0] == given.name
        if user.kind == "bitcast":
            parts += _read(inside, user)
        elif user.kind in _SLICES and first:
            parts += sum(array.bytes for array in user.results)
        elif not (user.kind in _UPDATES and first):
            return whole
    return min(parts, whole)


def _written(inside: dict[str, Operation]) -> int:
    """Bytes that a fusion writes."""
    root = next((op for op in inside.values() if op.is_root), None)
    while root is not None and root.kind == "bitcast" and root.operands[0] in inside:
        root = inside[root.operands[0]]
    if root is None:
        return 0
    if root.kind in _UPDATES:
        return _update(inside, root)
    return sum(array.bytes for array in root.results)


def _update(known: dict[str, Operation], operation: Operation) -> int:
    update = known.get(operation.operands[_UPDATES[operation.kind]])
    return 0 if update is None else sum(array.bytes for array in update.results)
