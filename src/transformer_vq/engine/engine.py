"""A scheduler in a thread of its own: requests from any thread, news of them as they come."""

import functools
import threading
from collections.abc import Callable

from transformer_vq.engine.scheduler import Event, Request, Scheduler
from transformer_vq.errors import UserError

MOST_TOKENS = 16_000_000  # of prompts that are waiting or being read, all together


class QueueFull(UserError):
    """There are as many requests as are allowed: come again later."""


class EngineDead(UserError):
    """The engine has ended, and takes no requests."""


class Engine:
    """One thread that owns the device and does what requests ask.

    Args:
      make: the scheduler, made in that thread; it loads and compiles, so it takes a while.
      deliver: gets the events of each step, in that thread. It must be quick. Where the next step
        only decodes, it is called once the device is at work on that.
      max_queue: rows of requests beyond those that have a slot; more are refused.

    `on_ready` is called once requests are taken, `on_end` at the end of the thread, with the error
    if it failed: both in that thread.
    """

    def __init__(
        self,
        make: Callable[[], Scheduler],
        deliver: Callable[[list[Event]], None],
        *,
        max_queue: int = 64,
    ):
        self._make, self._deliver, self._max_queue = make, deliver, max_queue
        self.on_ready: Callable[[], None] = lambda: None
        self.on_end: Callable[[Exception | None], None] = lambda error: None
        self._changed = threading.Condition()
        self._inbox: list[Callable[[Scheduler], None]] = []
        self._live: set[Request] = set()
        self._untold: list[Event] = []  # of the last step
        self._closing = False
        self._dead = False
        self.error: Exception | None = None  # what made it fail
        self.scheduler: Scheduler | None = None  # once it is ready; others only read its numbers
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load; `scheduler` is there once requests can be taken."""
        self._thread.start()

    def close(self, timeout: float | None = None) -> bool:
        """End after the current step, whatever is left, and wait for that: whether it has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none. Raises `QueueFull` or `EngineDead` at once.

        Where nothing else is to be done, any number is taken: waiting would not help.
        """
        with self._changed:
            if self._dead or self._closing or self.scheduler is None:
                raise EngineDead("the engine takes no requests: it is starting or has ended")
            slots = max(self.scheduler.device.slots)
            rows = sum(live.rows for live in self._live)
            if self._live and rows + sum(r.rows for r in requests) > slots + self._max_queue:
                raise QueueFull(
                    f"{rows} answers are being written or waiting, and {slots} + "
                    f"{self._max_queue} are the most: try again later"
                )
            tokens = sum(len(r.prompt) for r in (*self._live, *requests))
            if self._live and tokens > MOST_TOKENS:
                raise QueueFull(
                    f"the prompts of all requests would have {tokens:,} tokens, and "
                    f"{MOST_TOKENS:,} are the most: try again later"
                )
            self._live.update(requests)
            for request in requests:
                self._inbox.append(functools.partial(_add, request))
            self._changed.notify()

    def cancel(self, request: Request, choice: int | None = None) -> None:
        """Forget a request, or one of its answers, wherever it is; it may have ended already."""

        def forget(scheduler: Scheduler) -> None:
            if scheduler.cancel(request, choice):
                self._live.discard(request)

        with self._changed:
            self._inbox.append(forget)
            self._changed.notify()

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def _run(self) -> None:
        try:
            scheduler = self._make()
            with self._changed:
                self.scheduler = scheduler
            self.on_ready()
            while self._do(scheduler):
                pass
        except Exception as error:
            self.error = error
        self._tell()
        with self._changed:
            self._dead = True
            lost, self._live = self._live, set()
        if lost:
            why = "the engine has ended"
            self._deliver([Event(r, None, finish="error", error=why, last=True) for r in lost])
        self.on_end(self.error)

    def _do(self, scheduler: Scheduler) -> bool:
        """What has come in, and one step. Whether to go on."""
        if scheduler.idle:
            scheduler.device.prepare()
        with self._changed:
            while not (self._inbox or self._closing or not scheduler.idle):
                self._changed.wait()
            if self._closing:
                return False
            inbox, self._inbox = self._inbox, []
            for command in inbox:
                command(scheduler)
        events = scheduler.step(self._tell)
        with self._changed:
            self._live.difference_update(event.request for event in events if event.last)
        self._untold = events
        if scheduler.idle or scheduler.hurries:
            self._tell()
        return True

    def _tell(self) -> None:
        events, self._untold = self._untold, []
        if events:
            self._deliver(events)


def _add(request: Request, scheduler: Scheduler) -> None:
    scheduler.add(request)
