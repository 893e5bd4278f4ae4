"""Drafts: the same tokens, whatever is guessed; and only where they are worth it."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.plain import MODEL, make_model, random_prompt, random_request
from tests.engine.scheduling import answer
from tests.engine.scheduling import run as run_all
from tests.helpers import DOUBLE, close
from transformer_vq import Model, SamplingParams, generate, stream
from transformer_vq.engine import draft as drafts
from transformer_vq.engine.batch import Session
from transformer_vq.engine.device import Device
from transformer_vq.engine.pace import SIZES, SPARED, TRIAL, Pace
from transformer_vq.engine.scheduler import Request, Scheduler
from transformer_vq.errors import UserError
from transformer_vq.ops.draft import LONGEST_MATCH, _continued
from transformer_vq.sharding import data_mesh

STEPS = 8  # of a dispatch here


def double_model(**fields):
    """The model of `plain`, of other sizes, in float64."""
    model = make_model(**DOUBLE, **fields)
    params, codebook = jax.tree.map(jnp.float64, (model.params, model.codebook))
    return Model(params, codebook, model.config)


def requests(rng, count, **fields):
    """Prompts that repeat themselves, and controls of all kinds."""
    drawn = [random_request(rng) for _ in range(count)]
    prompts = [(random_prompt(rng, 5) * 9)[: rng.integers(1, 17)] for _ in drawn]
    params = [dataclasses.replace(p, **fields) for _, p in drawn]
    for i in range(0, count, 2):  # half of them likely to repeat themselves
        params[i] = dataclasses.replace(params[i], temperature=0.1, max_tokens=33)
    return prompts, params


def run(model, prompts, params, draft=False, state=None):
    """Tokens with their log-probabilities, the state that is left, and what was guessed."""
    session = Session(model, prompts, params, state, steps=STEPS, draft=draft)
    outputs = [[] for _ in prompts]
    for token in session:
        outputs[token.row].append((int(token), token.logprob))
    return outputs, session.state, session.drafted


def same(drafted, plain, params):
    """Tokens are equal; so are states, where no stop sequence ended the row."""
    for row, (a, b) in enumerate(zip(drafted[0], plain[0], strict=True)):
        assert [t for t, _ in a] == [t for t, _ in b]
        if params[row].logprobs:
            np.testing.assert_allclose([p for _, p in a], [p for _, p in b], atol=1e-6)
        if len(b) == params[row].max_tokens:
            close(*(jax.tree.map(lambda x, row=row: x[row], s[1]) for s in (drafted, plain)))


def of_sizes(monkeypatch, *sizes):
    """Dispatches of these sizes, one after the other, whatever is fast."""
    turns = itertools.cycle(sizes)
    monkeypatch.setattr(Pace, "choose", lambda self, steps: (next(turns), steps))


def test_the_same_tokens(double, monkeypatch):
    """Over seeds, controls, sizes of batches and rounds: those of plain decoding."""
    of_sizes(monkeypatch, 4, 16, 1, 4)
    model, rng = double_model(), np.random.default_rng(5)
    guessed = right = 0
    plain = None
    for _ in range(6):
        prompts, params = requests(rng, rng.choice([5, 8]), logprobs=True)
        plain = run(model, prompts, params)
        drafted = run(model, prompts, params, draft=True)
        same(drafted, plain, params)
        guessed, right = guessed + drafted[2][0], right + drafted[2][1]
    assert plain and plain[2] == (0, 0)
    assert 0.1 * guessed < right < guessed  # some are right, and some are not


@pytest.mark.slow
def test_requests_that_join(double, monkeypatch):
    """Where one has ended, the next one's text is what its guesses come from."""
    of_sizes(monkeypatch, 4, 1, 4)
    model = double_model()
    prompts, params = requests(np.random.default_rng(7), 11, logprobs=True, stop=())
    plain = generate(model, prompts, params, slots=8)
    assert generate(model, prompts, params, slots=8, draft=True) == plain
    itself = Session(model, prompts, params, slots=8, draft=model)
    assert len(list(itself)) == sum(map(len, plain))
    guessed, right = itself.drafted
    assert right >= guessed - 3 * len(prompts) > 0  # a row's last round is cut short


def test_what_a_program_was_given_stays(monkeypatch):
    """JAX may read an array of the host where it is, while the program runs."""
    given = []
    monkeypatch.setattr(drafts, "_emptied", lambda _, state, rows: given.append(rows) or state)
    guide = drafts.Drafts(MODEL, 3, 64)
    for row in (1, 2):
        guide.begin(row, [])
        guide._reader()
    assert [rows.tolist() for rows in given] == [[False, True, False], [False, False, True]]


def test_others_work_while_the_device_does(monkeypatch):
    """Between the call of a program and the wait for what it gives, once in each dispatch."""
    of_sizes(monkeypatch, 1, 4)
    happened = []

    def new(token):
        return SimpleNamespace(tokens=np.full((1, 4), token), lengths=np.array([2]))

    def plain(*args):
        happened.append("plain")
        return None, new(1)

    def drafted(*args, **sizes):
        happened.append("drafted")
        return SimpleNamespace(rows=None, guide=None, new=new(2), rounds=np.array([1]))

    monkeypatch.setattr(drafts, "draft_tokens", drafted)
    monkeypatch.setattr(jax, "device_get", lambda x: happened.append("waits") or x)
    itself = drafts.Drafts(True, 1, 64)
    args = None, None, None, np.ones(1, bool), SimpleNamespace(steps=2)
    for _ in range(2):
        itself.dispatch(
            plain, args, with_logprobs=False, meanwhile=lambda: happened.append("others")
        )
    assert happened == ["plain", "others", "waits", "drafted", "others", "waits"]
    assert itself.text(0) == [1, 1, 2, 2]


@pytest.mark.slow
def test_drafts_of_a_scheduler(double, monkeypatch):
    """Requests that come and go, in one slot and in three: the tokens of each alone, no drafts."""
    of_sizes(monkeypatch, 4, 1, 4)
    monkeypatch.setattr(drafts, "SIZES", (1, 4))
    model, rng = double_model(), np.random.default_rng(8)
    embedding = model.params["embedding"] + 0.3
    guide = Model({**model.params, "embedding": embedding}, model.codebook, model.config)
    device = Device(model, (1, 3), largest=16, draft=guide)
    prompts, params = requests(rng, 9, logprobs=True)
    given = [Request(prompt, [p]) for prompt, p in zip(prompts, params, strict=True)]
    scheduler = Scheduler(device)
    events = run_all(scheduler, [(4 * i, request) for i, request in enumerate(given)])
    plain, _, _ = run(model, prompts, params)
    for request, expected, p in zip(given, plain, params, strict=True):
        tokens, _ = answer(events, request)
        assert [int(t) for t in tokens] == [t for t, _ in expected]
        if p.logprobs:
            np.testing.assert_allclose(
                [t.logprob for t in tokens], [x for _, x in expected], atol=1e-6
            )
    guessed, right = scheduler.drafted
    assert 0 < right < guessed


@pytest.mark.slow
def test_a_row_of_no_numbers_ends_with_drafts_too(double, monkeypatch):
    of_sizes(monkeypatch, 4)
    model = double_model()
    params = {**model.params, "embedding": model.params["embedding"].at[7].set(jnp.nan)}
    bad = Model(params, model.codebook, model.config)
    given = [[1], [7], *[[3]] * 6], SamplingParams(max_tokens=9, banned_tokens=[7])
    expected = generate(model, *given)
    found = [[] for _ in expected]
    with pytest.raises(UserError, match="request 1 ends early: the model gives no probabilities"):
        for token in stream(bad, *given, draft=True):
            found[token.row].append(int(token))
    assert not found[1] and found[0] == expected[0] and found[2:] == expected[2:]


def test_a_model_that_guesses(double, monkeypatch):
    """The model itself guesses every token right; a smaller one some. And across a saved state."""
    of_sizes(monkeypatch, 4, 1, 4)
    model, rng = double_model(), np.random.default_rng(6)
    prompts, params = requests(rng, 8, logprobs=True, stop=(), max_tokens=25)
    plain = run(model, prompts, params)
    itself = run(model, prompts, params, draft=model)
    same(itself, plain, params)
    cut = 3 * len(prompts)  # a row's last round is cut short
    assert itself[2][1] >= itself[2][0] - cut > 0
    other = Model(
        {**model.params, "embedding": model.params["embedding"] + 0.3}, model.codebook, model.config
    )
    smaller = run(model, prompts, params, draft=other)
    same(smaller, plain, params)
    assert 0 < smaller[2][1] < smaller[2][0]
    # From a state, of which the small model knows nothing.
    more = [[]] * 8, params
    again = run(model, *more, draft=other, state=plain[1])
    same(again, run(model, *more, state=plain[1]), params)


def test_continued():
    """What followed the last place that is most like the end, against plain loops."""
    rng, size, count = np.random.default_rng(0), 40, 9
    recent = rng.integers(0, 3, (50, size)).astype(np.int32)
    for row, text in enumerate(recent):
        text[: rng.integers(0, size)] = -1
        if row % 5 == 0:  # a period
            text[-20:] = np.resize(rng.integers(0, 50, 1 + row // 5), 20)
    found = np.asarray(_continued(jnp.asarray(recent), count))
    for row, text in enumerate(recent.tolist()):
        lengths = []
        for end in range(size - 1):  # of the place
            n = 0
            while n <= min(end, LONGEST_MATCH - 1) and text[end - n] == text[-1 - n] >= 0:
                n += 1
            lengths.append(n)
        best = max(range(size - 1), key=lambda end: (lengths[end], end))
        expected = text[best + 1 :]
        while len(expected) < count:
            expected += text[best + 1 :]
        np.testing.assert_array_equal(found[row], np.maximum(expected[:count], 0))
    assert len(set(found.ravel().tolist())) > 10


def decode(pace, speeds, tokens, noise=lambda: 1.0):
    """Seconds that so many tokens take where a size has these tokens a round, seconds a round."""
    seconds, sizes = 0.0, []
    while tokens > 0:
        size, rounds = pace.choose(32)
        per_round, cost = speeds[size]
        rounds = min(rounds, max(1, round(32 / per_round)))
        pace.measure(size, rounds, rounds * per_round, rounds * cost * noise())
        seconds, tokens = seconds + rounds * cost, tokens - rounds * per_round
        sizes.append(size)
    return seconds, sizes


REPEATS = {1: (1, 1.0), 4: (4, 1.9), 16: (16, 3.4)}
PROSE = {1: (1, 1.0), 4: (1.9, 1.4), 16: (2.0, 2.4)}
HOPELESS = {1: (1, 1.0), 4: (1.02, 1.9), 16: (1.02, 3.4)}


@pytest.mark.parametrize(("speeds", "best"), [(REPEATS, 16), (PROSE, 4), (HOPELESS, 1)])
def test_the_fastest_goes_on(speeds, best):
    pace = Pace()
    seconds, sizes = decode(pace, speeds, 3000)
    per_round, cost = speeds[best]
    assert max(set(sizes), key=sizes.count) == best
    assert seconds < 1.02 * 3000 * cost / per_round + 64  # two dispatches to compare with
    assert set(sizes) == ({1, 4} if best == 1 else set(SIZES))


def test_a_busy_machine_is_not_taken_for_a_slow_size():
    """Times that go up and down by half: what does not pay stays off, what does goes on. By one
    measurement at a time, it would lose twice as much of what the best size brings."""
    took, best = {}, {"pays": REPEATS[16], "pays a little": PROSE[4], "does not": HOPELESS[1]}
    for what, speeds in zip(best, (REPEATS, PROSE, HOPELESS), strict=True):
        per_round, cost = best[what]
        noise = functools.partial(np.random.default_rng(0).lognormal, 0, 0.4)
        runs = [decode(Pace(), speeds, 3000, noise) for _ in range(100)]
        took[what] = [seconds / 3000 * per_round / cost for seconds, _ in runs]
    assert np.mean(took["pays"]) < 1.15 and np.mean(took["pays a little"]) < 1.2
    assert max(took["does not"]) < 1.05


def test_switched_off_and_on_again():
    """A text that stops repeating is soon decoded plainly, and one that begins to, with drafts."""
    pace = Pace()
    decode(pace, REPEATS, 1000)
    hopeless, _ = decode(pace, HOPELESS, 1000)
    assert hopeless < 1.25 * 1000
    _, sizes = decode(pace, HOPELESS, 10_000)
    lost = TRIAL * (1.9 - 1.02)
    assert sizes.count(4) <= 3 + 10_000 / (SPARED * lost) and set(sizes) == {1, 4}
    seconds, sizes = decode(pace, REPEATS, 3000)
    assert sizes[-1] == 16 and seconds < 1500


def test_a_trial_is_short():
    """The first dispatch of a size compiles it: it has one round, and is not timed."""
    pace = Pace()
    sizes = []
    for _ in range(4):
        size, rounds = pace.choose(32)
        sizes.append((size, rounds))
        pace.measure(size, rounds, rounds, 1000.0 if len(sizes) in (1, 3) else rounds)
    assert sizes == [(1, 1), (1, 32), (4, 1), (4, TRIAL)]


def test_one_quick_step_tells_nothing():
    """As of a stream's first dispatch: most of its time comes of every dispatch."""
    pace = Pace()
    for _ in range(2):
        pace.measure(1, 1, 1, 0.0005)
    assert pace.choose(32) == (1, 32)  # still nothing to compare with
    pace.measure(1, 1, 1, 0.05)  # of a large model
    assert pace.choose(32) == (4, 1)


def test_refused():
    full = make_model(attention="full")
    with pytest.raises(UserError, match="draft is a model of full attention, which takes so many"):
        Device(MODEL, (1,), largest=16, draft=full)
    params = SamplingParams(max_tokens=2)
    with pytest.raises(UserError, match="draft has a vocabulary of 32 tokens and the model one of"):
        generate(MODEL, [[1]], params, draft=make_model(vocab_size=32))
    with pytest.raises(UserError, match="draft is 3: it must be a Model"):
        generate(MODEL, [[1]], params, draft=3)
    with pytest.raises(UserError, match="draft is for one device, and there is a mesh"):
        generate(MODEL, [[1]], params, draft=True, mesh=data_mesh())
