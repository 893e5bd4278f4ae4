"""Ctrl-C: it ends a command, whatever runs at that moment."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn, Self

AGAIN = 0.5  # seconds


class Interrupts:
    """While it is open, Ctrl-C raises `KeyboardInterrupt` until that has ended what is in it.

    Python raises it once, and where that happens in a callback of a library, as JAX's at a garbage
    collection, it is printed or lost, and the work goes on. (Here it is not printed, either.)
    """

    def __init__(self) -> None:
        self._ours = False
        self._alarm: Any = None  # the handler that was there
        self._hook: Any = None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._ours:
            if self._hook is not None:
                sys.unraisablehook = self._hook
            if self._alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, self._alarm)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _first(self, number: int, frame: FrameType | None) -> NoReturn:
        if self._alarm is None and hasattr(signal, "setitimer"):  # not on Windows
            self._alarm = signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        if self._hook is None:
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        raise KeyboardInterrupt

    def _unraisable(self, lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            self._hook(lost)


def leave(status: int) -> NoReturn:
    """End the process at once.

    Threads of XLA may still compute something that nobody waits for. The end of the interpreter
    would take away what they use, and crash now and then.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it
            stream.flush()
    os._exit(status)
