"""What the text of a compiled program says: which operations move how many bytes.

XLA prints a program as computations, of which one is the entry; loops, branches and calls name
others (openxla.org/xla/operation_semantics). Nothing here needs JAX or a device.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
COLLECTIVE_MATMUL = "collective-matmul"  # how a permutation in the ring of a product is counted
_MOVES = ("copy", "copy-start", "transpose")
# How an operation names the computations that run with it. What `to_apply` names is run for each
# number (the sum of a reduction), except by a call.
_RUNS = re.compile(r"(?:calls|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_APPLIES = re.compile(r"to_apply=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"\bindex=(\d+)")
# XLA's own name of a loop that multiplies parts of a matrix while the next ones come around a ring
# of devices: a gather and the product after it, or a product and the sum over devices after it.
_RING = "windowed_dot_general"
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Array:
    """An array of a program on one device."""

    dtype: str  # as XLA writes it: f32, pred
    shape: tuple[int, ...]
    space: int  # memory that it lies in: 0 is the device's, 1 a TPU's own beside its units

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or [0])[0])
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Operation:
    """One operation of a computation."""

    name: str
    kind: str  # the opcode: copy-start, fusion
    results: tuple[Array, ...]
    operands: tuple[str, ...]  # their names, in the same computation
    runs: tuple[str, ...]  # computations that run with it
    is_root: bool
    rest: str  # of its line, after the bracket that opens its operands


@dataclass(frozen=True)
class Run:
    """An operation as the program comes to it."""

    operation: Operation
    computation: str
    times: int  # how often, where the length of loops is known; a loop of unknown length counts 1
    in_loop: bool
    in_fusion: bool


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    entry: str
    computations: dict[str, dict[str, Operation]]  # by name; and their operations, in order

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Of the text of a compiled program (`Compiled.as_text()`).

        Raises `ValueError` if it has no entry.
        """
        entry, computations, current = "", {}, None
        for line in text.splitlines():
            if current is None:
                if opened := _COMPUTATION.match(line):
                    current = computations.setdefault(opened[2], {})
                    entry = opened[2] if opened[1] else entry
            elif line.startswith("}"):
                current = None
            elif found := _OPERATION.match(line):
                operation = _operation(*found.groups())
                current[operation.name] = operation
        if not entry:
            raise ValueError("the text is no compiled program: it has no ENTRY")
        return cls(entry, computations)

    def runs(self) -> Iterator[Run]:
        """All operations that the program comes to, those of loops and fusions too."""
        yield from self._runs(self.entry, 1, in_loop=False, in_fusion=False)

    def _runs(self, name: str, times: int, *, in_loop: bool, in_fusion: bool) -> Iterator[Run]:
        for operation in self.computations[name].values():
            yield Run(operation, name, times, in_loop, in_fusion)
            for called in operation.runs:
                if called in self.computations:
                    yield from self._runs(
                        called,
                        times * self._trips(operation),
                        in_loop=in_loop or operation.kind == "while",
                        in_fusion=in_fusion or operation.kind == "fusion",
                    )

    def _trips(self, operation: Operation) -> int:
        """How often the body of a loop runs: as XLA notes it, or as its condition bounds a counter,
        which JAX and XLA have start at 0; 1 for other loops, and for what is no loop."""
        if operation.kind != "while":
            return 1
        if noted := _TRIPS.search(operation.rest):
            return int(noted[1])
        for name in operation.runs:
            inside, root = self.computations.get(name, {}), self._root(name)
            if root is None or root.kind != "compare" or "direction=LT" not in root.rest:
                continue
            compared = [inside[x] for x in root.operands if x in inside]
            for bound in compared:
                if bound.kind == "constant" and (number := re.match(r"\d+", bound.rest)):
                    counter = next((x for x in compared if x.kind == "get-tuple-element"), None)
                    return -(-int(number[0]) // self._step(operation, counter))
        return 1

    def _step(self, loop: Operation, counter: Operation | None) -> int:
        """What the body of a loop adds to its counter: more than 1 in a ring that is unrolled."""
        if counter is None or not (found := _INDEX.search(counter.rest)):
            return 1
        for name in loop.runs:
            inside, root = self.computations.get(name, {}), self._root(name)
            if root is None or root.kind != "tuple" or len(root.operands) <= int(found[1]):
                continue
            moved = inside.get(root.operands[int(found[1])])
            for added in moved.operands if moved is not None and moved.kind == "add" else ():
                if added in inside and inside[added].kind == "constant":
                    number = re.match(r"\d+", inside[added].rest)
                    return max(1, int(number[0])) if number else 1
        return 1

    def _root(self, computation: str) -> Operation | None:
        inside = self.computations.get(computation, {})
        return next((operation for operation in inside.values() if operation.is_root), None)

    def arrays(self, computation: str, names: tuple[str, ...]) -> tuple[Array, ...]:
        """The arrays that operations of a computation give."""
        known = self.computations[computation]
        return tuple(array for name in names if name in known for array in known[name].results)

    def is_copy(self, operation: Operation) -> bool:
        """Whether an operation only moves numbers: a copy, or a fusion of nothing else."""
        if operation.kind != "fusion":
            return operation.kind in _MOVES
        inside = self.computations.get(operation.runs[0], {}) if operation.runs else {}
        kinds = {op.kind for op in inside.values()}
        return not kinds.isdisjoint(_MOVES) and kinds <= {*_MOVES, "parameter", "bitcast"}


def _operation(root: str | None, name: str, type_: str, kind: str, rest: str) -> Operation:
    runs = _RUNS.findall(rest)
    for branches in _BRANCHES.findall(rest):
        runs += [branch.strip().lstrip("%") for branch in branches.split(",")]
    if kind in ("call", "async-start"):
        runs += _APPLIES.findall(rest)
    return Operation(
        name=name,
        kind=kind,
        results=arrays_of(type_),
        operands=tuple(re.findall(r"%([\w.-]+)", rest.split("), ")[0])),
        runs=tuple(runs),
        is_root=root is not None,
        rest=rest,
    )


def arrays_of(type_: str) -> tuple[Array, ...]:
    """The arrays of a type: of one array, or of a tuple of them."""
    found = _ARRAY.findall(type_)
    return tuple(
        Array(
            dtype,
            tuple(int(n.strip(" <=")) for n in shape.split(",") if n.strip()),
            int(space[1]) if (space := _SPACE.search(layout)) else 0,
        )
        for dtype, shape, layout in found
    )


@dataclass(frozen=True)
class Traffic:
    """How often operations of a kind run, and what they move."""

    count: int  # operations in the text
    times: int  # how often they run, where the length of loops is known
    bytes: int  # of all times together, on one device


def collectives(program: Program) -> dict[str, Traffic]:
    """What devices exchange, by kind.

    The bytes are those of the arrays that are gathered, scattered or summed, as one device has
    them: the larger of what goes in and what comes out. For a TPU, XLA writes an exchange into each
    of the fusions that run meanwhile; all of them name one channel, and count once. What is sent
    around in the ring of a product, instead of a gather or a sum, is a kind of its own.
    """
    found: dict[str, Traffic] = {}
    fused = set()
    for run in program.runs():
        operation = run.operation
        kind = operation.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if run.in_fusion and (channel := _CHANNEL.search(operation.rest)):
            if channel[1] in fused:
                continue
            fused.add(channel[1])
        given = sum(a.bytes for a in program.arrays(run.computation, operation.operands))
        made = sum(array.bytes for array in operation.results)
        if operation.kind.endswith("-start") and kind != "all-reduce":
            # Its result names its operands too, and numbers that it keeps to wait for.
            made = sum(array.bytes for array in operation.results if array.shape) - given
        if kind == "collective-permute" and _RING in run.computation:
            kind = COLLECTIVE_MATMUL
        before = found.get(kind, Traffic(0, 0, 0))
        moved = max(given, made) * run.times
        found[kind] = Traffic(before.count + 1, before.times + run.times, before.bytes + moved)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Copies:
    """Copies in the loops of a program, of arrays of some size or more."""

    copies: int  # from memory to the same memory
    returns: int  # from a TPU's own memory back to the device's
    reads: int  # into a TPU's own memory, ahead of what reads it: not a byte more than it reads
    largest: int  # bytes of the largest that is no read

    @property
    def wasted(self) -> int:
        """Those that move what need not be moved."""
        return self.copies + self.returns


def large_copies(program: Program, least: int) -> Copies:
    """The copies of `least` bytes or more in the loops of a program."""
    counts, largest = {"copies": 0, "returns": 0, "reads": 0}, 0
    for run in program.runs():
        operation = run.operation
        if not run.in_loop or run.in_fusion or not program.is_copy(operation):
            continue
        made = operation.results[0]
        if made.bytes < least:
            continue
        given = program.arrays(run.computation, operation.operands[:1])
        before = given[0].space if len(given) == 1 else made.space
        if operation.kind == "copy-start":  # its result names where it comes from
            before = operation.results[1].space
        way = "copies" if made.space == before else "returns" if made.space == 0 else "reads"
        counts[way] += 1
        largest = max(largest, made.bytes) if way != "reads" else largest
    return Copies(**counts, largest=largest)
