"""Requests to stop, which a long job grants when it has reached a good point."""

import math
import signal
import threading
import time
from typing import Any, Self

import jax
from jax.sharding import Mesh

from transformer_vq.sharding import any_process


class Interrupted(Exception):
    """Someone asked to stop."""


class StopSignals:
    """While it is open, the first Ctrl-C or SIGTERM is noted in `requested`; the next one acts.

    SIGHUP, of a terminal that closes, is noted however often it comes; a process that ignores it
    (nohup) goes on doing so. In another thread than the main one, where Python gives no signals,
    it does nothing.
    """

    STOP = (signal.SIGINT, signal.SIGTERM)
    HANG_UP: tuple[signal.Signals, ...] = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            kept = [s for s in self.HANG_UP if signal.getsignal(s) != signal.SIG_IGN]
            self._handlers = {s: signal.signal(s, self._note) for s in (*self.STOP, *kept)}
        return self

    def __exit__(self, *_exception: object) -> None:
        self._give_back(*self._handlers)

    def request(self) -> None:
        """Ask for a stop, as a signal does."""
        self.requested = True

    def check(self, *_progress: int) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self.requested:
            raise Interrupted

    def _note(self, number: int, _frame: object) -> None:
        self.requested = True
        # A closing terminal may send SIGHUP twice, and a SIGTERM with it: neither must act at once.
        if number in self.STOP:
            self._give_back(*self.STOP)

    def _give_back(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self._handlers:
                handler = self._handlers.pop(number)
                # None: it was not of Python, as that of `jax.distributed` is not.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopRequests:
    """Whether a job should stop, or has no time left: what all of its processes agree on.

    One process alone knows at once. Several learn of each other's requests with the work: all of
    them `share` theirs while the devices are busy, and `hear` the answer when that work is done.
    """

    def __init__(self, signals: StopSignals, mesh: Mesh, max_seconds: float | None):
        self._signals, self._mesh = signals, mesh
        limit = math.inf if max_seconds is None else max_seconds
        self._end = time.monotonic() + limit
        self._agreed = (False, False)  # as last heard

    def _own(self) -> tuple[bool, bool]:
        return self._signals.requested, time.monotonic() >= self._end

    def share(self) -> jax.Array | None:
        """The requests of any process: computed behind the work under way, and read as it is."""
        return any_process(self._mesh, self._own()) if jax.process_count() > 1 else None

    def hear(self, shared: jax.Array | None = None) -> tuple[bool, bool]:
        """Whether to stop, and whether the time is over, as far as all processes know."""
        if jax.process_count() == 1:
            self._agreed = self._own()
        elif shared is not None:
            stop, over = jax.device_get(shared)
            self._agreed = bool(stop), bool(over)
        return self._agreed

    def check(self, *_progress: int) -> None:
        """Raise `Interrupted` if any process was asked to stop; all must ask."""
        if self.hear(self.share())[0]:
            raise Interrupted
