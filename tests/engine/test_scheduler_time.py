"""Continuous batching: who gets the time of the device. No model is needed for that."""

import pytest

from tests.engine.scheduling import Clock, FakeDevice, run
from transformer_vq import SamplingParams
from transformer_vq.engine.scheduler import FIRST_STEPS, Request, Scheduler


@pytest.fixture
def device():
    return FakeDevice()


def test_half_of_the_time_is_for_those_who_write(device, monkeypatch):
    """While rows decode, a long prompt gets a chunk only when they have had as long."""
    clock = Clock()
    scheduler = Scheduler(device, clock=clock)
    spent = {"read": 0.0, "decode": 0.0}

    def slow(owner, name, seconds):
        method = getattr(owner, name)

        def call(*args, **kwargs):
            clock.now += seconds
            spent[name] += seconds
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    slow(device, "read", 1.0)
    for slots in device.slots.values():
        slow(slots, "decode", 0.25)
    scheduler.step_seconds = dict.fromkeys(device.slots, 0.06)
    writer = Request([1], [SamplingParams(max_tokens=2000)])
    scheduler.add(writer)
    scheduler.step()
    spent.update(read=0.0, decode=0.0)
    scheduler.add(Request([2] * 100, [SamplingParams(max_tokens=1)]))
    while scheduler.waiting:
        scheduler.step()
    assert spent["read"] == 7.0
    assert spent["decode"] >= 0.9 * 6


def test_only_the_last_chunk_of_who_is_alone_is_not_waited_for(device, monkeypatch):
    """Its first token is called for meanwhile; chunks before are not called for without end."""
    waits = []
    monkeypatch.setattr(device, "wait", lambda state: waits.append(scheduler.running))
    scheduler = Scheduler(device, clock=Clock())
    scheduler.add(Request([1] * (2 * device.largest + 1), [SamplingParams(max_tokens=2000)]))
    while not scheduler.running:
        scheduler.step()
    assert waits == [0, 0]
    scheduler.add(Request([2] * (device.largest + 1), []))
    while scheduler.waiting:
        scheduler.step()
    assert waits == [0, 0, 1, 1]


def test_who_has_waited_for_a_chunk_waits_for_a_short_dispatch(device, monkeypatch):
    scheduler, decode, steps = Scheduler(device, clock=Clock()), device.slots[1].decode, []

    def counted(*args, **kwargs):
        steps.append(kwargs["steps"])
        return decode(*args, **kwargs)

    scheduler.step_seconds = dict.fromkeys(device.slots, 0.002)
    monkeypatch.setattr(device.slots[1], "decode", counted)
    monkeypatch.setattr(scheduler, "_measure", lambda seconds: None)
    scheduler.add(Request([1], [SamplingParams(max_tokens=2000)], streams=True))
    for _ in range(3):
        scheduler.step()
    scheduler.add(Request([2] * (device.largest + 1), []))
    for _ in range(4):
        scheduler.step()
    assert steps == [FIRST_STEPS, 30, 30, 7, 7, 30, 30]


@pytest.mark.parametrize(
    ("streams", "seconds", "expected"),
    [
        (True, 0.05, [7, 18, 7, 18]),  # after a chunk a quarter of the usual, then what is owed
        (True, 0.18, [7, 30, 30, 22]),  # the last one what is left of it
        (False, 0.0485, [25, 25, 25, 25]),  # and not 125
        (False, 0.1985, [100, 100, 100, 100]),
    ],
)
def test_a_chunk_waits_for_no_more_than_its_half(device, monkeypatch, streams, seconds, expected):
    """Where prompts wait, a dispatch is no longer than the last chunk took."""
    clock, steps = Clock(), []
    scheduler, decode, read = Scheduler(device, clock=clock), device.slots[1].decode, device.read

    def slow_decode(*args, **kwargs):
        steps.append(kwargs["steps"])
        clock.now += 0.002 * kwargs["steps"]
        return decode(*args, **kwargs)

    def slow_read(*args):
        clock.now += seconds
        return read(*args)

    monkeypatch.setattr(scheduler, "_measure", lambda seconds: None)
    monkeypatch.setattr(device.slots[1], "decode", slow_decode)
    scheduler.step_seconds = dict.fromkeys(device.slots, 0.002)
    scheduler.add(Request([1], [SamplingParams(max_tokens=5000)], streams=streams))
    for _ in range(3):
        scheduler.step()
    monkeypatch.setattr(device, "read", slow_read)
    scheduler.add(Request([2] * (5 * device.largest), []))
    steps.clear()
    for _ in range(4):
        scheduler.step()
    assert steps == expected


@pytest.mark.parametrize(("streams", "expected"), [(True, [1] * 8), (False, [1, 1, 4, 2])])
def test_a_slow_model_is_known_after_its_first_steps(device, monkeypatch, streams, expected):
    """Nothing is guessed of it: a dispatch follows the time of a step from the first one on."""
    clock = Clock()
    scheduler, decode, steps = Scheduler(device, clock=clock), device.slots[1].decode, []

    def slow(*args, **kwargs):
        new = decode(*args, **kwargs)
        steps.append(int(new.lengths.max()))
        clock.now += 0.05 * steps[-1]
        return new

    monkeypatch.setattr(device.slots[1], "decode", slow)
    run(scheduler, [(0, Request([1], [SamplingParams(max_tokens=8)], streams=streams))])
    assert steps == expected
