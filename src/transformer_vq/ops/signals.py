"""Ctrl-C and SIGTERM as a wish that a long job grants when it has reached a good place."""

import signal
import threading
from typing import Any, Self


class Interrupted(Exception):
    """Someone asked to stop."""


class StopSignals:
    """While it is open, the first Ctrl-C or SIGTERM is noted in `requested`; the next one acts.

    In another thread than the main one, where Python gives no signals, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._handlers.items():
            # None: it was not of Python, as that of `jax.distributed` is not.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def check(self, *_progress: int) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self.requested:
            raise Interrupted

    def _note(self, *_signal: object) -> None:
        self.requested = True
        self.__exit__()
