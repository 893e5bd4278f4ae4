"""The progress of training on the terminal."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from transformer_vq.errors import plain
from transformer_vq.run.log import Record
from transformer_vq.run.observer import Observer
from transformer_vq.show.console import Console
from transformer_vq.show.words import duration

PLAIN_SECONDS = 10.0  # between lines, where there is no terminal


class Progress(Observer):
    """A live view on the terminal: how far it is, what it measures, and what is safe on disk.

    Where the output is no terminal, a plain line every ten seconds. If the terminal or the reader
    of the output has gone, telling anything raises `BrokenPipeError`.
    """

    def __init__(
        self,
        steps: int,
        tokens_per_step: int,
        *,
        max_seconds: float | None = None,
        console: Console | None = None,
        reword: Callable[[str], str] = str,
    ):
        """`steps`: updates in all. `max_seconds`: of this session, if it has a limit.

        `reword`: what becomes of a line before it is printed.
        """
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._console = console or Console()
        self._reword = reword
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._last_line = -PLAIN_SECONDS
        self._newest: Record | None = None
        self._validation: Record | None = None
        self._best: Record | None = None
        self._saved: int | None = None
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._view, console=self._console)

    def start(self, folder: Path, records: Sequence[Record]) -> None:
        """Begin the live view; what was validated before is known."""
        for record in records:
            if "validation_loss" in record and "validation_bpb" in record:
                self._note_validation(record)
        if self._live is not None:
            self._live.start()

    def close(self) -> None:
        """End the live view, and leave the last one on the screen."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line of its own, which stays."""
        try:
            line = plain(self._reword(text))
            whole = not self._console.is_terminal or _longest_word(line) > self._console.width
            self._console.print(line, highlight=False, markup=False, soft_wrap=whole)
        except BrokenPipeError:
            raise
        except OSError as error:  # a terminal that was closed; a full disk behind the output
            raise BrokenPipeError(error.errno, error.strerror) from error

    def saved(self, step: int) -> None:
        """Show that there is a checkpoint of `step`."""
        self._saved = step

    def record(self, record: Record, logged: bool) -> None:
        """Show the newest measurement; a validation stays on the screen."""
        step = record["step"]
        if "validation_loss" in record:
            self._note_validation(record)
            loss, bpb = record["validation_loss"], record["validation_bpb"]
            right = record.get("validation_accuracy")
            accuracy = "" if right is None else f", {right:.1%} of the answers right"
            self.say(f"step {step}: validation loss {loss:.4f}, {bpb:.4f} bpb{accuracy}")
            return
        self._newest = record
        late = time.monotonic() - self._last_line >= PLAIN_SECONDS
        if self._live is None and (late or step >= self._steps):
            self._last_line = time.monotonic()
            parts = (f"{label} {value}" for label, value in _shown(record))
            self.say(
                "  ".join([f"step {step}/{self._steps}", *parts, f"{self._left(record)} left"])
            )

    def _note_validation(self, record: Record) -> None:
        self._validation = record
        if self._best is None or record["validation_loss"] < self._best["validation_loss"]:
            self._best = record

    def _left(self, record: Record) -> str:
        left = (self._steps - record["step"]) * self._tokens_per_step / record["tokens_per_second"]
        if self._deadline is not None:
            left = max(min(left, self._deadline - time.monotonic()), 0.0)
        return duration(left)

    def _view(self) -> RenderableType:
        """The live view: a bar, a table of one row, and what was validated and saved."""
        record = self._newest
        if record is None:
            return Text("compiling the train step …", style="dim")
        step = record["step"]
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        times = f"{duration(record['seconds'])} spent, {self._left(record)} left"
        bar = ProgressBar(total=self._steps, completed=step, complete_style="cyan")
        head.add_row(bar, f"{step:,}/{self._steps:,}  {step / self._steps:.0%}  {times}")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        labels, values = zip(*_fitting(_shown(record), self._console.width), strict=True)
        for label in labels:
            table.add_column(label, justify="right", no_wrap=True)
        table.add_row(*values, style="bold")
        last = []
        if self._validation is not None and self._best is not None:
            last.append(f"validation {self._validation['validation_bpb']:.4f} bpb")
            best, at = self._best["validation_bpb"], self._best["step"]
            last.append(
                "the best so far"
                if self._best is self._validation
                else f"best {best:.4f} at step {at:,}"
            )
        last.append("no checkpoint yet" if self._saved is None else f"checkpoint {self._saved:,}")
        return Group(head, table, Text(", ".join(last), style="dim", no_wrap=True))


def _longest_word(line: str) -> int:
    return max(map(len, line.split()), default=0)


def _fitting(columns: list[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """The first columns, as many as a terminal shows whole; one at least."""
    used = 0
    for count, (label, value) in enumerate(columns):
        used += max(len(label), len(value))
        if count and used > width:
            return columns[:count]
        used += 2  # between two columns
    return columns


def _shown(record: Record) -> list[tuple[str, str]]:
    """What people look at while a model trains: labels and values."""
    formats = {
        "loss": ("loss", "{:.4f}"),
        "bpb": ("bpb", "{:.4f}"),
        "grad_norm": ("grad norm", "{:.3g}"),
        "learning_rate": ("rate", "{:.1e}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "gflops": ("GFLOP/s", "{:,.3g}"),
        "mfu": ("MFU", "{:.0%}"),
        "codebook_used": ("codes", "{:.0%}"),
        "codebook_perplexity": ("perplexity", "{:.3g}"),
        "far_mass": ("far mass", "{:.2f}"),
    }
    return [
        (label, form.format(record[name]))
        for name, (label, form) in formats.items()
        if name in record
    ]
