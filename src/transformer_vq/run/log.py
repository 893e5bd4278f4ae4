"""What a run measures, on disk: `metrics.jsonl` and `samples.jsonl`.

A line of metrics.jsonl is a JSON object with `step` (updates done) and `seconds` (of training so
far), and then either what the update measured,

    loss (nats per token), bpb, tokens_per_second, gflops (1e9 model operations per second), mfu
    (their share of the measured rate of matrix products), learning_rate, grad_norm, commitment,
    codebook_used, codebook_perplexity, and lists of them by unit: codebook_used_by_unit, ...

or `validation_loss`, `validation_bpb` and `validation_tokens`. A line of samples.jsonl has `step`,
and the `text` that the model wrote then after a `prompt`.
"""

import json
import os
from collections import deque
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from transformer_vq.errors import UserError

Record = dict[str, Any]  # a line of metrics.jsonl

SPIKE_WINDOW = 32  # logged losses that say what is usual


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """The records of a metrics.jsonl; none if there is no file. A half-written end is left out.

    Raises `ValueError` naming the first line that is none of ours.
    """
    try:
        lines = Path(path).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            records[-1]["step"]  # every record has one
        except (ValueError, TypeError, KeyError):
            raise UserError(f"line {number} of {path} is damaged: remove it") from None
    return records


class Tracker(Protocol):
    """Another place that shows what metrics.jsonl has (`transformer_vq.show.trackers`)."""

    def start(self, folder: Path, records: Sequence[Record]) -> None:
        """Begin with the run in `folder`, of which these records are known."""
        ...

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """A file of records, open for more. Those beyond `step` are of a lost future: they go.

    Of several processes, only one `writes`.
    """

    def __init__(self, path: Path, step: int, *, writes: bool = True):
        self._path = path
        self._file: FileIO | None = None
        self.kept = [record for record in read_metrics(path) if record["step"] <= step]
        if not writes:
            return
        draft = path.with_name(f".{path.name}.new")
        try:
            draft.write_text("".join(json.dumps(record) + "\n" for record in self.kept))
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from None
        draft.replace(path)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Add a line, which other programs see at once. Raises `OSError` naming the file."""
        if self._file is None:
            return
        line = json.dumps(record).encode() + b"\n"
        try:
            while line:  # a disk that fills up takes a part first
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class MetricsLog:
    """metrics.jsonl, open for more from `step` on, and the trackers that get the same records."""

    def __init__(
        self, path: Path, step: int, trackers: Sequence[Tracker] = (), *, writes: bool = True
    ):
        self._lines, self._trackers = JsonLines(path, step, writes=writes), trackers
        self._validated: dict[int, float] = {}
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        for record in self._lines.kept:
            self._note(record)
        for tracker in trackers:
            tracker.start(path.parent, self._lines.kept)
        self._lines.kept = []  # of a long run they are many

    def write(self, record: Record) -> None:
        """Add a line. Raises `OSError` naming the file if that cannot be."""
        self._note(record)
        self._lines.write(record)
        for tracker in self._trackers:
            tracker.write(record)

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

    def close(self) -> None:
        self._lines.close()
        for tracker in self._trackers:
            tracker.close()
