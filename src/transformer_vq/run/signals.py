"""Ctrl-C and SIGTERM as a wish that a long job grants when it has reached a good place."""

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


class Wishes:
    """Whether a job should stop, or has no time left: what all of its processes agree on.

    One process alone knows its wishes at once. Several learn of each other's with the work: all of
    them `share` theirs while the devices are busy, and `hear` the answer when that work is done.
    """

    def __init__(self, stop: StopSignals, mesh: Mesh, max_seconds: float | None):
        self._stop, self._mesh = stop, mesh
        limit = math.inf if max_seconds is None else max_seconds
        self._end = time.monotonic() + limit
        self._agreed = (False, False)  # as last heard

    def _own(self) -> tuple[bool, bool]:
        return self._stop.requested, time.monotonic() >= self._end

    def share(self) -> jax.Array | None:
        """What any process wishes: computed behind the work under way, and read as it is."""
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
