"""A scheduler in its thread: requests from any thread, a bounded queue, its end told to all."""

import queue

import pytest

from tests.engine.scheduling import SLOTS, FakeDevice, answer
from transformer_vq import SamplingParams
from transformer_vq.engine.engine import Engine, EngineDead, QueueFull
from transformer_vq.engine.scheduler import Request, Scheduler


@pytest.fixture
def device():
    return FakeDevice()


def test_engine(device, monkeypatch):
    """Requests of several threads; a full queue refuses at once; its end is told to all."""
    news: queue.Queue = queue.Queue()
    ended: queue.Queue = queue.Queue()
    engine = Engine(lambda: Scheduler(device, exact=True), news.put, max_queue=2)
    engine.on_end = ended.put
    with pytest.raises(EngineDead, match="takes no requests: it is starting or has ended"):
        engine.submit(Request([1], []))
    prepared: queue.Queue = queue.Queue()
    monkeypatch.setattr(device, "prepare", lambda: prepared.put(True))
    engine.start()
    assert prepared.get(timeout=60)  # before anybody asks for something
    while engine.scheduler is None:
        pass
    params = [SamplingParams(max_tokens=10**9)]
    requests = [Request([i], params) for i in range(SLOTS + 2)]
    for request in requests:
        engine.submit(request)
    with pytest.raises(QueueFull, match=r"5 answers .* 3 \+ 2 are the most: try again later"):
        engine.submit(Request([9], params))
    for request in requests[1:]:
        engine.cancel(request)
    last = Request([9], [SamplingParams(max_tokens=3)])
    while engine.live > 1:
        pass
    engine.submit(last)
    events = []
    while not any(e.request is last and e.last for e in events):
        events += news.get(timeout=60)
    assert len(answer(events, last)[0]) == 3
    engine.close()
    assert ended.get(timeout=60) is None
    while not any(e.request is requests[0] and e.last for e in events):
        events += news.get(timeout=60)
    assert events[-1].finish == "error"
    with pytest.raises(EngineDead):
        engine.submit(last)


def test_an_engine_that_fails_says_so(device, monkeypatch):
    news: queue.Queue = queue.Queue()
    ended: queue.Queue = queue.Queue()
    engine = Engine(lambda: Scheduler(device), news.put)
    engine.on_end = ended.put
    engine.start()
    while engine.scheduler is None:
        pass

    def fail(*args, **kwargs):
        raise RuntimeError("the device has gone")

    monkeypatch.setattr(device.slots[1], "decode", fail)
    engine.submit(Request([1], [SamplingParams()]))
    assert isinstance(ended.get(timeout=60), RuntimeError)
    events = []
    while not any(e.finish for e in events):
        events += news.get(timeout=60)
    assert events[-1].finish == "error" and events[-1].last
