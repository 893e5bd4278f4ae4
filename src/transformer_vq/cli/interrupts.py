"""Ctrl-C: it ends a command, whatever runs at that moment."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

Result = TypeVar("Result")

AGAIN = 0.5  # seconds from one interrupt to the next, where that was lost
SOON = 0.05  # from one that came in the midst of an import


class Interrupts:
    """While it is open, Ctrl-C raises `KeyboardInterrupt` until that has ended what is in it.

    Python raises it once, and where that happens in a callback of a library, as JAX's at a garbage
    collection, it is printed or lost, and the work goes on. (Here it is not printed, either.)
    A module that is imported is imported first: in the midst of its start, one written in C fails
    for another reason, or takes the process down.

    `last`: the process is about to end by it, so a further Ctrl-C finds nothing to interrupt.
    """

    def __init__(self, *, last: bool = False) -> None:
        self._last = last
        self._ours = False
        self._caller: FrameType | None = None
        self._alarm: Any = None  # the handler that was there
        self._hook: Any = None

    def __enter__(self) -> Self:
        self._caller = sys._getframe(1)
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if self._ours:
            ends = self._last and kind is not None and issubclass(kind, KeyboardInterrupt)
            signal.signal(signal.SIGINT, signal.SIG_IGN if ends else signal.default_int_handler)
            if self._hook is not None:
                sys.unraisablehook = self._hook
            if self._alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, self._alarm)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        timed = hasattr(signal, "setitimer")  # not on Windows
        if timed and self._alarm is None:
            self._alarm = signal.signal(signal.SIGALRM, self._interrupt)
        if self._hook is None:
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        if timed:
            wait = _imports(frame, self._caller)
            signal.setitimer(signal.ITIMER_REAL, SOON if wait else AGAIN, AGAIN)
            if wait:
                return
        raise KeyboardInterrupt

    def _unraisable(self, lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            self._hook(lost)


def _imports(frame: FrameType | None, caller: FrameType | None) -> bool:
    """Whether a module is being imported there, since the caller: it may be one itself."""
    while frame is not None and frame is not caller:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def interruptible(work: Callable[[], Result]) -> Result:
    """What `work` gives, made in a thread of its own.

    Python raises `KeyboardInterrupt` in the main thread, between two of its own instructions: where
    that is in the midst of a long call of a library in C, Ctrl-C waits for the end of the call.
    Here the main thread only waits. Work that nobody waits for any more ends with the process.
    """
    made: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(AGAIN)
    if failed:
        raise failed[0]
    return made[0]


def leave(status: int) -> NoReturn:
    """End the process at once.

    Threads of XLA may still compute something that nobody waits for. The end of the interpreter
    would take away what they use, and crash now and then.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it
            stream.flush()
    os._exit(status)
