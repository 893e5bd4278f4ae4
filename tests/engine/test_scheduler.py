"""Continuous batching: what a request gets does not depend on what else there is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.plain import MODEL, VOCAB
from tests.engine.scheduling import SLOTS, Clock, answer, run
from transformer_vq import SamplingParams, generate, score, stream
from transformer_vq.engine.device import Device
from transformer_vq.engine.scheduler import (
    ALONE,
    FIRST_STEPS,
    NARROW_AFTER,
    Request,
    Scheduler,
)
from transformer_vq.errors import UserError
from transformer_vq.sharding import data_mesh


@pytest.fixture(scope="module")
def device():
    """All programs, compiled once."""
    return Device(MODEL, (1, SLOTS), largest=16)


@pytest.fixture
def compilations():
    """What JAX compiles while the test runs."""
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


def random_request(rng, **fields):
    prompt = rng.integers(0, VOCAB, rng.integers(1, 40)).tolist()
    params = SamplingParams(
        seed=int(rng.integers(0, 1000)),
        max_tokens=int(rng.integers(1, 40)),
        top_p=float(rng.choice([1.0, 0.9])),
        repetition_penalty=float(rng.choice([1.0, 1.3])),
        stop=[[7], [3, 4]],
        logprobs=bool(rng.integers(0, 2)),
    )
    return Request(prompt, [params], **fields)


def again(request):
    return Request(request.prompt, request.params)


def test_alone_it_is_what_generate_gives(device):
    """To the bit, log-probabilities included: the batch of one is the same batch."""
    prompt, params = [5, 1, 60], SamplingParams(seed=3, max_tokens=50, logprobs=True, stop=[[7]])
    request = Request(prompt, [params])
    tokens, finish = answer(run(Scheduler(device), [(0, request)]), request)
    expected = list(stream(MODEL, [prompt], params))
    assert tokens == expected and finish in ("stop", "length")
    assert [t.logprob for t in tokens] == [t.logprob for t in expected]
    assert [t.top_logprobs for t in tokens] == [t.top_logprobs for t in expected]
    other = Request(prompt, [dataclasses.replace(params, seed=4)])
    assert answer(run(Scheduler(device), [(0, other)]), other)[0] != expected


def test_exact_whatever_the_load(device, compilations):
    """Requests that arrive at any time give the bits that each gives alone; nothing compiles."""
    rng = np.random.default_rng(0)
    requests = [random_request(rng) for _ in range(24)]
    together = run(
        Scheduler(device, exact=True, clock=Clock()),
        [(int(rng.integers(0, 40)), request) for request in requests],
    )
    for request in requests:
        alone = again(request)
        tokens, finish = answer(run(Scheduler(device, exact=True), [(0, alone)]), alone)
        assert (tokens, finish) == answer(together, request)
        mine = answer(together, request)[0]
        assert [t.logprob for t in tokens] == [t.logprob for t in mine]
    assert not compilations
    jnp.zeros(5) + 1  # the listener hears
    jax.jit(lambda x: x + 3)(np.zeros(7))
    assert compilations


def test_widths(device):
    """A second request moves the first one to the wide batch; alone again it moves back."""
    clock = Clock()
    scheduler = Scheduler(device, clock=clock)
    long = Request([1, 2], [SamplingParams(max_tokens=600, seed=1)])
    short = Request([3], [SamplingParams(max_tokens=5)])
    events, widths = [], []
    scheduler.add(long)
    for step in range(400):
        scheduler.step_seconds = dict.fromkeys(device.slots, 0.25 / 20)  # 20 steps a dispatch
        if step == 3:
            scheduler.add(short)
        if step == 12:
            clock.now += 2
        events += scheduler.step()
        widths.append(scheduler.width)
        if scheduler.idle:
            break
    assert widths[0] == 1 and SLOTS in widths and widths[-1] == 1
    tokens, finish = answer(events, long)
    assert finish == "length"
    assert tokens == generate(MODEL, [long.prompt], long.params)[0]
    assert answer(events, short)[0] == generate(MODEL, [short.prompt], short.params)[0]


def test_samples_of_one_prompt(device):
    """One prompt read, as many answers as seeds, more of them than slots."""
    params = [SamplingParams(seed=10 + i, max_tokens=12) for i in range(5)]
    request = Request([9] * 20, params)
    scheduler = Scheduler(device, exact=True)
    events = run(scheduler, [(0, request)])
    assert scheduler.prompt_tokens == 20
    answers = [answer(events, request, i)[0] for i in range(5)]
    for i, p in enumerate(params):
        one = Request([9] * 20, [p])
        assert answer(run(Scheduler(device, exact=True), [(0, one)]), one)[0] == answers[i]
    assert len(set(map(tuple, answers))) == 5
    assert [e.last for e in events].count(True) == 1 and events[-1].last


def test_scores(device):
    """The probabilities of a prompt are those of `score`, and its tokens'."""
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, VOCAB, 45).tolist()
    request = Request(prompt, [SamplingParams(max_tokens=1)], scored=True)
    scores = run(Scheduler(device), [(0, request)])[0].scores
    expected = score(MODEL, [prompt])[0]
    np.testing.assert_allclose(scores.logprobs[1:], np.array(expected[1:]), atol=1e-5)
    for i, token in enumerate(prompt):
        found = dict(zip(scores.top_tokens[i].tolist(), scores.top_logprobs[i], strict=True))
        assert found.get(token, scores.logprobs[i]) == scores.logprobs[i]  # to the bit
        assert scores.top_logprobs[i].max() >= scores.logprobs[i]
    assert any(scores.top_tokens[i, 0] != token for i, token in enumerate(prompt))


def test_cancel_in_every_phase(device):
    """The row is free before the next dispatch, and the others do not notice."""
    scheduler = Scheduler(device, exact=True)
    params = SamplingParams(max_tokens=400, seed=2)
    waiting, reading, running = (Request([i] * 40, [params]) for i in range(3))
    scheduler.step_seconds = dict.fromkeys(device.slots, 0.1)
    scheduler.add(running)
    while not scheduler.running:
        scheduler.step()
    scheduler.add(reading)
    scheduler.step()
    scheduler.add(waiting)
    assert scheduler.waiting == 2
    for request in (waiting, reading):
        assert scheduler.cancel(request)
        assert not scheduler.cancel(request)
    assert (scheduler.waiting, scheduler.running) == (0, 1)
    assert scheduler.cancel(running) and scheduler.idle
    other = random_request(np.random.default_rng(5))
    alone = again(other)
    assert answer(run(scheduler, [(0, other)]), other) == answer(
        run(Scheduler(device, exact=True), [(0, alone)]), alone
    )


def test_continued_is_unbroken(device):
    """From the snapshots after a prompt and after an answer; penalties go on counting."""
    params = SamplingParams(
        seed=4, max_tokens=24, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3
    )
    prompt = list(range(20))
    whole = Request(prompt, [params])
    expected = answer(run(Scheduler(device, exact=True), [(0, whole)]), whole)[0]
    first = Request(
        prompt,
        [dataclasses.replace(params, max_tokens=10)],
        keep=frozenset({16, 20}),
        keep_answers=True,
    )
    events = run(Scheduler(device, exact=True), [(0, first)])
    assert answer(events, first)[0] == expected[:10]
    rest = Request([], [dataclasses.replace(params, max_tokens=14)], events[-1].snapshot)
    assert events[-1].snapshot.position == 30
    later = run(Scheduler(device, exact=True), [(0, rest)])
    assert answer(later, rest)[0] == expected[10:]
    snapshots = events[0].snapshots
    assert sorted(snapshots) == [16, 20]
    for known, start in snapshots.items():
        request = Request(prompt, [params], start, known=known)
        scheduler = Scheduler(device, exact=True)
        assert answer(run(scheduler, [(0, request)]), request)[0] == expected
        assert scheduler.prompt_tokens == 20 - known
    # What was written and is read again counts as written.
    reread = Request(
        prompt + expected[:10], [dataclasses.replace(params, max_tokens=14)], written=10
    )
    assert answer(run(Scheduler(device, exact=True), [(0, reread)]), reread)[0] == expected[10:]
    as_prompt = dataclasses.replace(reread, written=0)
    assert answer(run(Scheduler(device), [(0, as_prompt)]), as_prompt)[0] != expected[10:]


@pytest.mark.slow
def test_devices_share_the_slots(device, compilations):
    """On a mesh: the tokens of one device, as rows go between devices; so do states."""
    mesh = data_mesh(jax.devices()[1:3])  # of which none is JAX's default
    shared = Device(MODEL, (2, 4), largest=16, mesh=mesh)
    params = [
        SamplingParams(seed=i, max_tokens=n, top_p=0.9) for i, n in enumerate((30, 30, 60, 60))
    ]
    expected = [generate(MODEL, [[i] * 18], p)[0] for i, p in enumerate(params)]
    requests = [Request([i] * 18, [p], keep_answers=True) for i, p in enumerate(params)]
    gone = Request([5], [SamplingParams(max_tokens=10**6)])
    clock = Clock()
    scheduler, events, widths = Scheduler(shared, clock=clock), [], []
    compilations.clear()
    for request in (*requests[:2], gone):
        scheduler.add(request)
    while not scheduler.idle:
        if gone.live and scheduler.running == 3:
            assert scheduler.cancel(gone) and scheduler.running == 2
            for request in requests[2:]:
                scheduler.add(request)
        scheduler.step_seconds = dict.fromkeys(shared.slots, ALONE / 4)  # 4 steps a dispatch
        events += scheduler.step()
        widths.append(scheduler.width)
        clock.now += NARROW_AFTER / 2
    assert widths[0] == widths[-1] == 2 and 4 in widths
    assert [answer(events, request)[0] for request in requests] == expected
    after = next(e.snapshot for e in events if e.request is requests[2] and e.snapshot)
    read = Request([1] * 20, [], keep=frozenset({20}))
    before = run(Scheduler(device), [(0, read)])[0].snapshots[20]
    for start in (before, after):
        rest = [Request([], [SamplingParams(seed=2, max_tokens=9)], start) for _ in range(2)]
        found = [
            answer(run(Scheduler(d), [(0, r)]), r)
            for d, r in zip((device, shared), rest, strict=True)
        ]
        assert found[0] == found[1]
    assert not compilations
    with pytest.raises(UserError, match="slots is 1: it must be a multiple of the 2 devices"):
        Device(MODEL, (1, 4), mesh=mesh)
    with pytest.raises(UserError, match="draft is for one device, and there is a mesh"):
        Device(MODEL, (2,), mesh=mesh, draft=True)


def test_a_row_that_is_not_numbers_ends_alone(device):
    good = random_request(np.random.default_rng(6))
    alone = again(good)
    expected = answer(run(Scheduler(device, exact=True), [(0, alone)]), alone)
    keep = Request([1], [], keep=frozenset({1}))
    sound = run(Scheduler(device), [(0, keep)])[0].snapshots[1]
    state = jax.tree.map(lambda x: x, sound.state)
    values = jnp.full_like(state.units[0].values, jnp.nan)
    units = (dataclasses.replace(state.units[0], values=values), *state.units[1:])
    broken = dataclasses.replace(sound, state=dataclasses.replace(state, units=units))
    bad = Request([], [SamplingParams(max_tokens=9)], broken)
    events = run(Scheduler(device, exact=True), [(0, bad), (0, good)])
    tokens, finish = answer(events, bad)
    assert len(tokens) == 1 and finish == "error"  # its first token was drawn from sound logits
    assert answer(events, good) == expected
    unread = Request([2], [SamplingParams()], broken)
    assert [e.finish for e in run(Scheduler(device), [(0, unread)])] == ["error"]


def test_a_first_token_does_not_wait_for_a_long_dispatch(device):
    """Where somebody reads along: the answer is the same, and begins a few steps later."""
    found = []
    for streams in (True, False):
        scheduler = Scheduler(device, clock=Clock())
        scheduler.step_seconds = dict.fromkeys(device.slots, 0.002)
        request = Request([1, 2, 3], [SamplingParams(max_tokens=60, seed=1)], streams=streams)
        events = [e for e in run(scheduler, [(0, request)]) if e.tokens]
        found.append(([len(e.tokens) for e in events][:2], answer(events, request)))
    ((first, second), streamed), ((all_at_once, *_), whole) = found
    assert 1 <= first <= FIRST_STEPS < second < all_at_once
    assert streamed == whole


def test_requests_leave_no_arrays(device):
    rng = np.random.default_rng(4)
    scheduler, counts = Scheduler(device), []
    for i in range(30):
        run(scheduler, [(0, random_request(rng, keep_answers=True)), (i % 3, random_request(rng))])
        counts.append(len(jax.live_arrays()))
    assert counts[-1] <= max(counts[:10])


def test_news_are_told_while_the_device_works(device):
    """Once a step: before it reads or waits for nothing, and else while rows are decoded."""
    scheduler, told, slots = Scheduler(device), [], device.slots[1]
    decode = slots._ahead[False]

    def at_work(*args):
        out = decode(*args)
        told.append("at work")
        return out

    slots._ahead[False] = at_work
    try:
        scheduler.add(Request([1] * 20, [SamplingParams(max_tokens=200)], streams=True))
        for _ in range(4):
            scheduler.step(lambda: told.append("told"))
        assert scheduler.running and not scheduler.hurries
    finally:
        slots._ahead[False] = decode
    assert told == ["told", "told", "at work", "at work", "told", "at work", "told"]


def test_chunks_of_other_sizes_are_refused():
    with pytest.raises(UserError, match="chunks is 17: it must be one of 16, 64, 256, 1024"):
        Device(MODEL, (1,), largest=17)
