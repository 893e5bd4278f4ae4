"""Who follows a run as it goes: the terminal, TensorBoard, a test."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformer_vq.errors import UserError, is_listed, require_kind, shown
from transformer_vq.run.log import Record


class Observer:
    """What a run tells. Each method does nothing here: take up those that are wanted."""

    def start(self, folder: Path, records: Sequence[Record]) -> None:
        """A session begins in a run folder, whose metrics.jsonl has these records."""

    def record(self, record: Record, logged: bool) -> None:
        """A batch or a validation was measured; `logged`: metrics.jsonl has the record."""

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is on its way to the disk."""

    def say(self, text: str) -> None:
        """Something happened that people want to know, in a line of text."""

    def close(self) -> None:
        """The session is over. Not called if `start` failed."""


class Observers(Observer):
    """Several observers as one.

    One that raises `BrokenPipeError`, because whoever read it has gone, is told no more;
    `on_broken_pipe` is called instead. Raises `UserError` for what is no observer.
    """

    def __init__(self, observers: Sequence[Observer], on_broken_pipe: Callable[[], None]):
        if not is_listed(observers):
            raise UserError(f"observers is {shown(observers)}: give a list of them")
        self._observers, self._on_broken_pipe = list(observers), on_broken_pipe
        for observer in self._observers:
            require_kind("an observer", observer, Observer, "of transformer_vq.run.observer")
        self._started: list[Observer] = []

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        for observer in list(self._observers):
            try:
                tell(observer)
            except BrokenPipeError:
                self._observers.remove(observer)
                self._on_broken_pipe()

    def start(self, folder: Path, records: Sequence[Record]) -> None:
        def start(observer: Observer) -> None:
            observer.start(folder, records)
            self._started.append(observer)

        self._tell(start)

    def record(self, record: Record, logged: bool) -> None:
        self._tell(lambda observer: observer.record(record, logged))

    def saved(self, step: int) -> None:
        self._tell(lambda observer: observer.saved(step))

    def say(self, text: str) -> None:
        self._tell(lambda observer: observer.say(text))

    def close(self) -> None:
        while self._started:
            try:
                self._started.pop().close()
            except BrokenPipeError:
                self._on_broken_pipe()
