"""What a run measures, on disk: `metrics.jsonl` and `samples.jsonl`.

A line of metrics.jsonl is a JSON object with `step` (updates done) and `seconds` (of training so
far), and then either what the update measured,

    loss (nats per token), bpb, tokens_per_second, gflops (1e9 model operations per second), mfu
    (their share of the measured rate of matrix products), learning_rate, grad_norm, commitment,
    codebook_used, codebook_perplexity, and lists of them by unit: codebook_used_by_unit, ...
    far_mass (of keys beyond the window at the end of the batch: mean of log(1 + mass)), by unit too
    time_constant_by_unit (tokens that a key lasts, by the bias of the gate alone), if it forgets

or `validation_loss`, `validation_bpb`, `validation_tokens` and, where some tokens count and others
do not (tasks), `validation_accuracy`. A line of samples.jsonl has `step`,
and the `text` that the model wrote then after a `prompt`.

Lines are looked at where they are read: whoever gets a record can count on the types that are
written here. What is not finite is written as null, and is not there when it is read.
"""

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from statistics import median
from typing import Any

from transformer_vq.atomic import write_whole
from transformer_vq.errors import UserError

Record = dict[str, Any]  # a line of metrics.jsonl

SPIKE_WINDOW = 32  # logged losses that say what is usual
_TEXTS = {"prompt", "text"}  # all other fields are numbers
_LARGEST = 1e100  # what we measure is of float32, or a few orders more
_DAMAGED = ".damaged"  # metrics.jsonl.damaged: what a resumed run has put aside


class LogError(UserError):
    """A log cannot be written; one sentence says why and what to do."""


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """The records of a metrics.jsonl or samples.jsonl; none if there is no file.

    A half-written end is left out, and so are damaged lines: `damaged_lines` counts them.
    """
    return [record for _, record in _read(Path(path)) if record is not None]


def damaged_lines(path: str | os.PathLike) -> str:
    """The lines of a log that are damaged, in words: "line 3 of R/metrics.jsonl is damaged".

    Empty text if none is.
    """
    numbers = [i for i, (_, record) in enumerate(_read(Path(path)), 1) if record is None]
    return _damage(path, numbers)


def to_json(content: Any) -> str:
    """Numbers, texts, lists and dictionaries as JSON, in which there is no NaN: it is null."""
    return json.dumps(_finite(content), allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _read(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """Each line that is whole, and the record in it, or None if it is none of ours."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines[:-1]:  # what follows the last line break is half a line
        yield line + b"\n", _parse(line)


def _parse(line: bytes) -> Record | None:
    try:
        content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    record = {name: value for name, value in content.items() if not _is_missing(value)}
    step = record.get("step")
    if not isinstance(step, int) or not 0 <= step < 2**63:
        return None
    return record if all(_is_ours(*item) for item in record.items()) else None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _is_ours(name: str, value: Any) -> bool:
    if name in _TEXTS:
        return isinstance(value, str)
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, int | float) and abs(v) <= _LARGEST for v in values)


def _damage(path: str | os.PathLike, numbers: Sequence[int]) -> str:
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    many = len(numbers) > 1
    return f"line{'s' * many} {shown} of {path} {'are' if many else 'is'} damaged"


class JsonLines:
    """A file of records, open for more. Those beyond `step` are of a lost future: they go.

    Damaged lines are put aside, in a file beside it; `notes` then says so. Of several processes,
    only one `writes`. Raises `OSError` naming the file if it cannot be written.
    """

    def __init__(self, path: Path, step: int, *, writes: bool = True):
        self._path = path
        self._file: FileIO | None = None
        lines = list(_read(path))
        kept = [(line, r) for line, r in lines if r is not None and r["step"] <= step]
        self.kept = [record for _, record in kept]
        self.notes = ""
        if not writes:
            return
        damaged = [i for i, (_, record) in enumerate(lines, 1) if record is None]
        if damaged:
            aside = path.with_name(path.name + _DAMAGED)
            with aside.open("ab") as file:
                file.writelines(lines[i - 1][0] for i in damaged)
            self.notes = f"{_damage(path, damaged)}: put aside in {aside.name}"
        write_whole(path, b"".join(line for line, _ in kept))
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Add a line, which other programs see at once.

        Raises `OSError` naming the file, and `LogError` if the file has been removed or moved.
        """
        if self._file is None:
            return
        self.require_in_place()
        line = to_json(record).encode() + b"\n"
        try:
            while line:  # a disk that fills up takes a part first
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def require_in_place(self) -> None:
        """Raise `LogError` if the file that is open is not the one of this path any more."""
        if self._file is None:
            return
        try:
            same = os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise LogError(
                f"{self._path} has been removed, moved or replaced while the run was going on: "
                f"nothing more is written there; start again, or resume where the folder is now"
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class MetricsLog:
    """metrics.jsonl, open for more from `step` on, and what it says of a run."""

    def __init__(self, path: Path, step: int, *, writes: bool = True):
        self._lines = JsonLines(path, step, writes=writes)
        self.notes = self._lines.notes
        self.require_in_place = self._lines.require_in_place
        self.close = self._lines.close
        self._validated: dict[int, float] = {}
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        for record in self._lines.kept:
            self._note(record)

    def take_kept(self) -> Sequence[Record]:
        """What the file had before. Given once: of a long run they are many."""
        kept, self._lines.kept = self._lines.kept, []
        return kept

    def write(self, record: Record) -> None:
        """Add a line. Raises `OSError` and `LogError` as `JsonLines.write` does."""
        self._lines.write(record)
        self._note(record)

    def _note(self, record: Record) -> None:
        if "validation_loss" in record:
            self._validated[record["step"]] = record["validation_loss"]
        if "loss" in record:
            self._losses.append(record["loss"])

    def validation_loss(self, step: int) -> float | None:
        """The validation loss after `step` updates, if it was measured."""
        return self._validated.get(step)

    def usual_loss(self) -> float | None:
        """The median of the last losses that were logged; None before there are enough."""
        return median(self._losses) if len(self._losses) >= SPIKE_WINDOW // 4 else None
