"""Where a request ends: stop tokens, stop sequences and texts, wherever dispatches are cut."""

import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.plain import (
    BATCH,
    MODEL,
    ends,
    plain_generate,
    prompts_and_seeds,
)
from transformer_vq import (
    SamplingParams,
    generate,
    stream,
)
from transformer_vq.engine.batch import STEPS_PER_DISPATCH
from transformer_vq.engine.output import Output
from transformer_vq.engine.request import Token


def test_stop_tokens():
    """At the first of them, which is not returned; not before `min_tokens`."""
    prompts, _ = prompts_and_seeds(seed=7)
    params = [
        SamplingParams(max_tokens=60, seed=i, stop=stop, min_tokens=low)
        for i, (stop, low) in enumerate(
            [(range(8), 0), (range(8, 16), 0), ((3,), 0), ([[5], [6]], 20),
             ("0123", 40), (list("45678"), 0), (b"9", 5), (range(4, 12), 33)]
        )
    ]  # fmt: skip
    outputs = generate(MODEL, prompts, params)
    assert outputs == plain_generate(MODEL, prompts, params)
    assert any(len(x) < 60 for x in outputs) and all(
        len(x) >= p.min_tokens for x, p in zip(outputs, params, strict=True)
    )


@functools.cache
def coin_flips():
    """Eight unbroken runs of two tokens, 80 long: whatever is repeated overlaps itself."""
    params = [SamplingParams(seed=i, max_tokens=80, allowed_tokens=COIN) for i in range(BATCH)]
    return generate(MODEL, [[1]] * BATCH, params)


COIN = (48, 49)  # "0" and "1"


def cut_short(tokens, p):
    """What is left of an unbroken run with the stop sequences of p."""
    for n in range(1, len(tokens) + 1):
        rest = ends(tokens[:n], p)
        if rest is not None:
            return tokens[:rest]
    return tokens


STOPS = st.lists(st.lists(st.sampled_from(COIN), min_size=2, max_size=7), min_size=1, max_size=3)


@settings(max_examples=15)  # of eight rows each
@given(st.lists(st.tuples(STOPS, st.integers(0, 40)), min_size=BATCH, max_size=BATCH))
def test_stop_sequences(rows):
    """Any sequences, that overlap themselves and each other and span dispatches."""
    params = [
        SamplingParams(seed=i, max_tokens=80, allowed_tokens=COIN, stop=stop, min_tokens=low)
        for i, (stop, low) in enumerate(rows)
    ]
    outputs = [[] for _ in rows]
    for token in stream(MODEL, [[1]] * BATCH, params):
        outputs[token.row].append(int(token))
        # Never more than the final output, at no moment.
        whole = cut_short(coin_flips()[token.row], params[token.row])
        assert len(outputs[token.row]) <= len(whole)
    expected = [cut_short(run, p) for run, p in zip(coin_flips(), params, strict=True)]
    assert outputs == expected


def test_stop_strings():
    """Text is its UTF-8 bytes; a beginning that repeats is not lost: "001" in "0001"."""
    runs = ["".join(map(chr, run)) for run in coin_flips()]
    stops = ["0001", "1110", "00101", "10011", "011", "1010", "00", "11"]
    assert any("0001" in run and "00001" in run for run in runs)  # control
    params = [
        SamplingParams(seed=i, max_tokens=80, allowed_tokens=COIN, stop=stop)
        for i, stop in enumerate(stops)
    ]
    outputs = generate(MODEL, [[1]] * BATCH, params)
    assert ["".join(map(chr, x)) for x in outputs] == [
        run.split(stop)[0] for run, stop in zip(runs, stops, strict=True)
    ]
    as_bytes = [dataclasses.replace(p, stop=[p.stop.encode()]) for p in params]
    as_lists = [dataclasses.replace(p, stop=[list(p.stop.encode())]) for p in params]
    assert generate(MODEL, [[1]] * BATCH, as_bytes) == outputs
    assert generate(MODEL, [[1]] * BATCH, as_lists) == outputs


def test_a_beginning_of_a_stop_is_given_out_at_the_end():
    """If `max_tokens`, or a stop token, comes before the rest of it."""
    run = coin_flips()[0]
    never = (*run[29:40], 1 - run[40])
    params = SamplingParams(max_tokens=40, allowed_tokens=COIN, stop=[[*run[29:40], 50]])
    assert generate(MODEL, [[1]] * BATCH, params)[0] == run[:40], never
    first = run.index(COIN[1])
    params = SamplingParams(max_tokens=40, allowed_tokens=COIN, stop=[COIN[1], [COIN[0]] * 9])
    assert generate(MODEL, [[1]] * BATCH, params)[0] == run[:first]


def test_stop_across_dispatches():
    """A sequence that begins in one dispatch and ends in the next is held back between them."""
    run = coin_flips()[3]
    edge = STEPS_PER_DISPATCH
    stop = run[edge - 6 : edge + 6]
    params = SamplingParams(seed=3, max_tokens=80, allowed_tokens=COIN, stop=[stop])
    expected = cut_short(run, params)
    assert len(expected) == edge - 6  # control: it is the first
    assert generate(MODEL, [[1]] * BATCH, params)[0] == expected


def passed_on(text, stop, **fields):
    """What an `Output` passes on at each token, and at the end."""
    output = Output(SamplingParams(stop=stop, **fields))
    pieces = [output.push(Token(token, 0)) for token in text.encode()]
    return ["".join(map(chr, piece)) for piece in (*pieces, output.flush())], output.ended


def test_output_holds_back_what_may_be_a_stop():
    assert passed_on("abcd", "bcx") == (["a", "", "", "bcd", ""], False)
    assert passed_on("abc", "bcx") == (["a", "", "", "bc"], False)
    assert passed_on("abcd", ["bc"]) == (["a", "", "", "", ""], True)
    assert passed_on("aabab", "abab") == (["", "a", "", "", "", ""], True)
    assert passed_on("abcd", ["bc"], min_tokens=2) == (["a", "b", "c", "d", ""], False)
    assert passed_on("abcd", ["b"])[0] == ["a", "b", "c", "d", ""]  # the device's business
