"""What a run measures: `metrics.jsonl`, and progress on the terminal.

A line of metrics.jsonl is a JSON object with `step` (updates done) and `seconds` (of training so
far), and then either what the update measured,

    loss (nats per token), bpb, tokens_per_second, learning_rate, grad_norm, commitment,
    codebook_used, codebook_perplexity

or `validation_loss`, `validation_bpb` and `validation_tokens`.
"""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

Record = dict[str, Any]  # a line of metrics.jsonl

PLAIN_SECONDS = 10.0  # between lines, where there is no terminal


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """The records of a metrics.jsonl; none if there is no file. A half-written end is left out."""
    try:
        lines = Path(path).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


class MetricsLog:
    """metrics.jsonl, open for more. Lines beyond `step` are of a future that was lost: they go.

    Of several processes, only one `writes`.
    """

    def __init__(self, path: Path, step: int, *, writes: bool = True):
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        self._validated = {r["step"]: r["validation_loss"] for r in kept if "validation_loss" in r}
        self._file: TextIO | None = None
        if not writes:
            return
        draft = path.with_name(f".{path.name}.new")
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        draft.replace(path)
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Add a line, and let other programs see it at once."""
        if "validation_loss" in record:
            self._validated[record["step"]] = record["validation_loss"]
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def validation_loss(self, step: int) -> float | None:
        """The validation loss after `step` updates, if it was measured."""
        return self._validated.get(step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Progress:
    """A live line on the terminal: loss, bits per byte, speed, use of the codebook, time left.

    Where the output is no terminal, a plain line every ten seconds. A context manager; give `show`
    and `say` to `transformer_vq.ops.loop.train`.
    """

    def __init__(
        self,
        steps: int,
        tokens_per_step: int,
        *,
        max_seconds: float | None = None,
        console: Console | None = None,
    ):
        """`steps`: updates in all. `max_seconds`: of this sitting, if it has a limit."""
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._console = console or Console()
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._last_line = -PLAIN_SECONDS
        self._bar: Bar | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task("compiling", total=steps)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line of its own, which stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, record: Record) -> None:
        """Show the newest measurement; a validation stays on the screen."""
        step = record["step"]
        if "validation_loss" in record:
            loss, bpb = record["validation_loss"], record["validation_bpb"]
            self.say(f"step {step}: validation loss {loss:.4f}, {bpb:.4f} bpb")
            return
        text = self._describe(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step >= self._steps or time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._steps}  {text}")

    def _describe(self, record: Record) -> str:
        speed = record["tokens_per_second"]
        left = (self._steps - record["step"]) * self._tokens_per_step / speed
        if self._deadline is not None:
            left = max(min(left, self._deadline - time.monotonic()), 0.0)
        parts = [f"loss {record['loss']:.4f}", f"{record['bpb']:.4f} bpb", f"{speed:,.0f} tokens/s"]
        if "codebook_used" in record:
            parts.append(f"codes {record['codebook_used']:.0%}")
        return "  ".join([*parts, f"{duration(left)} left"])


def duration(seconds: float) -> str:
    """Seconds as people read them: `1:05`, or `2:03:04` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
