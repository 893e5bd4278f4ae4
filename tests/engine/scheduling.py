"""Requests given to a scheduler, and what came of each; a device that has no model."""

import time

import numpy as np

from tests.engine.plain import VOCAB
from transformer_vq.engine.running import Dispatch, Snapshot

SLOTS = 3  # of the wide batch


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now


def run(scheduler, arrivals):
    """The events of requests, which arrive before some steps: `[(step, request)]`."""
    arrivals, events, step = sorted(arrivals, key=lambda a: a[0]), [], 0
    while arrivals or not scheduler.idle:
        while arrivals and arrivals[0][0] <= step:
            scheduler.add(arrivals.pop(0)[1])
        events += scheduler.step()
        step += 1
        assert step < 2000
    return events


def answer(events, request, choice=0):
    """The tokens of an answer and how it ended."""
    mine = [e for e in events if e.request is request and e.choice == choice]
    assert sum(e.finish is not None for e in mine) == 1 and mine[-1].finish
    return [token for e in mine for token in e.tokens], mine[-1].finish


class FakeSlots:
    """Rows that write token 0 at once, as many as they may; who wants time to pass adds it."""

    drafted = (0, 0)

    def __init__(self, width):
        self.width, self.left = width, [0] * width

    def insert(self, slot, start, params, text):
        self.left[slot] = params.max_tokens

    def move(self, slot, to, to_slot):
        to.left[to_slot] = self.left[slot]

    def snapshot(self, slot):
        return Snapshot(None, np.zeros(1, bool), np.zeros(1, np.int32))

    def decode(self, keep, *, steps, at_end, with_logprobs, meanwhile=lambda: None):
        time.sleep(1e-4)  # other threads have their turn
        meanwhile()
        live = np.flatnonzero(keep)
        if at_end:
            steps = min(steps, *(self.left[slot] for slot in live))
        lengths = np.zeros(self.width, np.int32)
        for slot in live:
            lengths[slot] = min(steps, self.left[slot])
            self.left[slot] -= lengths[slot]
        nothing = np.zeros((self.width, steps, 0))
        return Dispatch(
            tokens=np.zeros((self.width, steps), np.int32),
            lengths=lengths,
            logprobs=np.zeros((self.width, steps)),
            top_tokens=nothing,
            top_logprobs=nothing,
            active=np.array(self.left) > 0,
            unsound=np.zeros(self.width, bool),
        )


class FakeDevice:
    """What a scheduler asks of a device, without a model: for tests of when what is done."""

    largest, vocab_size = 16, VOCAB

    def __init__(self):
        self.slots = {width: FakeSlots(width) for width in (1, SLOTS)}

    def prepare(self):
        pass

    def begin(self, start):
        return None

    def copy(self, state):
        return state

    def read(self, state, tokens):
        return state

    def wait(self, state):
        pass

    def is_sound(self, state):
        return True
