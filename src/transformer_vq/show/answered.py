"""The progress of a job of many requests, on standard error."""

from time import monotonic as now
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from transformer_vq.show.console import Console
from transformer_vq.show.progress import PLAIN_SECONDS
from transformer_vq.show.words import duration


class Answered:
    """How many requests have their answers, and how fast: a live line, or a plain one now and then.

    Args:
      total: requests.
      answered: those that have their answers already.
      failed: of them, those whose answers are errors.
    """

    def __init__(self, total: int, answered: int, failed: int, *, console: Console | None = None):
        self._total, self._answered, self._failed = total, answered, failed
        self._console = console or Console(stderr=True)
        self._since: float | None = None  # the first answer of now: there was compiling before it
        self._first = 0
        self._tokens = 0
        self._last_line = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> "Answered":
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("answering"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("", total=self._total, completed=self._answered, said="compiling …")
            self._bar.start()
        return self

    def __exit__(self, *_exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def one_more(self, tokens: int) -> None:
        """An answer, for which so many tokens were read and written; 0: an error."""
        time = now()
        self._answered += 1
        self._failed += not tokens
        if self._since is None:
            self._since, self._first, self._last_line = time, self._answered, time
            return
        self._tokens += tokens
        seconds = max(time - self._since, 1e-3)
        rate = (self._answered - self._first) / seconds
        said = f"{rate:.3g} answers/s  {self._tokens / seconds:,.0f} tokens/s"
        if self._failed:
            said += f"  {self._failed:,} failed"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._answered, said=said)
        elif time - self._last_line >= PLAIN_SECONDS:
            self._last_line = time
            left = duration((self._total - self._answered) / rate)
            line = f"{self._answered:,} of {self._total:,} answered  {said}  {left} left"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
