"""What tests of the server share: stores, services that are loaded, a device without a model."""

import asyncio
import time
from types import SimpleNamespace

import httpx
import numpy as np

from transformer_vq.data import ByteTokenizer
from transformer_vq.engine.engine import Engine
from transformer_vq.engine.request import Token
from transformer_vq.engine.scheduler import Event, Snapshot
from transformer_vq.errors import UserError
from transformer_vq.serve.service import Loaded, Service
from transformer_vq.serve.states import StateStore

ROW = 10


class State:
    """A state that only knows how long its text was."""

    def __init__(self, position):
        self.position = [position]


def snapshot(position):
    return Snapshot(State(position), np.zeros(2, bool), np.zeros(2, np.int32))


def unpack(data, name):
    if not data.isdigit():
        raise UserError(f"{name} is damaged")
    return snapshot(int(data))


def make_store(folder=None, most=5 * ROW, grid=4):
    pack = lambda s: str(s.position).encode()  # noqa: E731
    return StateStore(ROW, most, folder, grid=grid, pack=pack, unpack=unpack)


def known(store, tokens, mode="any", owner=""):
    found = store.find(owner, tokens, mode)
    return found.length if found else 0


class Failing:
    """A scheduler that fails at its first step."""

    device = SimpleNamespace(slots={1: None}, prepare=lambda: None)
    idle = True
    drafted = 0, 0
    running = waiting = prompt_tokens = written_tokens = dispatches = 0
    step_seconds = {1: 0.0}  # noqa: RUF012

    def add(self, request):
        self.idle = False

    def step(self, meanwhile):
        raise RuntimeError("the device has gone")


def loaded(service):
    parts = dict(name="m", tokenizer=ByteTokenizer(), vocab_size=256, ends_documents=False)
    service.loaded = Loaded(**parts, capacity=9, store=make_store(), cache="any")
    return Failing()


class Alphabet:
    """Answers a prompt with the letters that follow it; sample i begins i letters later.

    A letter's log-probability is minus the seed. Three letters are written at a step.
    """

    device = SimpleNamespace(slots={2: None}, prepare=lambda: None)
    running = waiting = prompt_tokens = written_tokens = dispatches = 0
    step_seconds = {1: 0.0}  # noqa: RUF012
    hurries = False

    def __init__(self):
        self.requests, self.cancelled, self.read = [], [], []

    @property
    def idle(self):
        return not self.requests

    def add(self, request):
        request.live = request.rows
        request.written_so_far = {i: 0 for i in range(len(request.params))}
        self.read.append(request)
        self.requests.append((request, [*request.written_so_far]))

    def cancel(self, request, choice=None):
        self.cancelled.append(choice)
        for i, (known, choices) in enumerate(self.requests):
            if known is request:
                choices[:] = [] if choice is None else [c for c in choices if c != choice]
                if not choices:
                    del self.requests[i]
                    return True
        return False

    def step(self, meanwhile):
        meanwhile()
        time.sleep(0.001)
        events = [Event(request, None) for request in self.read]
        self.read.clear()
        for request, choices in list(self.requests):
            for i in list(choices):
                params, done = request.params[i], request.written_so_far[i]
                first = int(request.prompt[-1]) + 1 + i + done
                count = min(3, params.max_tokens - done)
                logprob = -float(params.seed)
                tokens = [
                    Token((first + k) % 256, i, logprob, {(first + k) % 256: logprob})
                    for k in range(count)
                ]
                request.written_so_far[i] += count
                finish = "length" if done + count == params.max_tokens else None
                if finish:
                    choices.remove(i)
                last = not choices
                events.append(Event(request, i, tokens, finish, last=last))
            if not choices:
                self.requests = [r for r in self.requests if r[0] is not request]
        return events


async def until(true):
    for _ in range(10_000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come")


def served(act, **options):
    """What `act(client, service, scheduler)` gives, with a client of the application."""
    from transformer_vq.serve.server import make_app  # which needs the extra serve

    service, scheduler = Service(), Alphabet()

    def make():
        loaded(service)
        service.loaded = service.loaded.__class__(**{**vars(service.loaded), "capacity": None})
        return scheduler

    engine = service.engine = Engine(make, service.deliver, **options)

    async def go():
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            service.bind()
            engine.start()
            await until(lambda: engine.scheduler)
            return await act(client, service, scheduler)

    try:
        return asyncio.run(go())
    finally:
        engine.close()
