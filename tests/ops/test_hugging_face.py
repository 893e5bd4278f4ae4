"""Sampling controls beside Hugging Face's: against a recording always, live where torch is there.

Controls without a processor of theirs are not here: presence and frequency penalties. What they
have and we have not: epsilon, eta and top-h cutoffs, penalties of n-grams.
"""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TESTS, hugging_face
from transformer_vq import SamplingParams
from transformer_vq.engine.controls import controls_batch
from transformer_vq.nn.prob import REMOVED
from transformer_vq.ops.decode import Rows, controlled_logits

DATA = TESTS / "data" / "recorded"
CONTROLLED = jax.jit(controlled_logits)
MAKER = importlib.util.spec_from_file_location("make", DATA / "make_hf_processors.py")


def maker():
    module = importlib.util.module_from_spec(MAKER)
    MAKER.loader.exec_module(module)
    return module


@functools.cache
def recorded():
    with np.load(DATA / "hf_processors.npz") as arrays:
        return dict(arrays)


def as_params(case, stops) -> SamplingParams:
    """The same by our names."""
    ours = dict(case)
    renamed = {"min_new_tokens": "min_tokens", "suppress_tokens": "banned_tokens"}
    renamed |= {"bad_words_ids": "banned_tokens"}
    ours = {renamed.get(name, name): value for name, value in ours.items()}
    if "sequence_bias" in ours:
        ours["logit_bias"] = dict(ours.pop("sequence_bias"))
    return SamplingParams(**ours, stop=[[stop] for stop in stops])


def controlled(recording, params) -> np.ndarray:
    """The recording's logits after our controls."""
    logits, tokens = recording["logits"], recording["tokens"].astype(int)
    rows, vocab = logits.shape
    prompt, counts = np.zeros((rows, vocab), bool), np.zeros((rows, vocab), np.int32)
    for row, count in enumerate(recording["generated"]):
        known = tokens[row][tokens[row] >= 0]
        prompt[row, known[: len(known) - count]] = True
        np.add.at(counts[row], known[len(known) - count :], 1)
    before = Rows(
        state=None,
        prompt=jnp.asarray(prompt),
        counts=jnp.asarray(counts),
        generated=jnp.asarray(recording["generated"], jnp.int32),
        remaining=jnp.ones(rows, jnp.int32),
        active=jnp.ones(rows, bool),
    )
    return np.asarray(CONTROLLED(logits, controls_batch([params] * rows, rows, vocab), before))


def same(ours, theirs) -> bool:
    """The same tokens removed, and the same logits of the others, in float32."""
    kept = np.isfinite(theirs)
    if not np.array_equal(ours > REMOVED / 2, kept):
        return False
    return np.allclose(ours[kept], theirs[kept], rtol=1e-6, atol=1e-6)


def check(recording):
    stops, cases = maker().STOPS, json.loads(str(recording["cases"]))
    ours = [controlled(recording, as_params(case, stops)) for case in cases]
    for i, case in enumerate(cases):
        # Controls: of the recorded logits, those of this case alone are like ours.
        like = [j for j, theirs in enumerate(recording["outputs"]) if same(ours[i], theirs)]
        assert like == [i], f"{case}: like {[cases[j] for j in like]}"
        assert not same(recording["logits"], recording["outputs"][i]), f"{case} does nothing"


def test_recorded_processors():
    """Every processor alone, and several in the order in which Hugging Face applies them."""
    check(recorded())


NUDGED = {
    "temperature": 1.00001,
    "repetition_penalty": 1.00001,
    "top_k": 2.0,
    "top_p": 0.8,
    "min_p": 1.5,
    "typical_p": 1.5,
    "min_new_tokens": 2,
}


@pytest.mark.parametrize("name", NUDGED)
def test_a_little_more_is_not_the_recording(name):
    """Control: a value a little off would be found out."""
    recording, stops = recorded(), maker().STOPS
    cases = json.loads(str(recording["cases"]))
    i = next(i for i, case in enumerate(cases) if list(case) == [name] and case[name] != 1)
    value = type(cases[i][name])(cases[i][name] * NUDGED[name])
    for changed, expected in ((cases[i][name], True), (value, False)):
        out = controlled(recording, as_params({name: changed}, stops))
        assert same(out, recording["outputs"][i]) is expected


def test_the_recording_is_of_what_the_script_says():
    """Of all its cases, and small."""
    assert json.loads(str(recorded()["cases"])) == maker().CASES
    assert set(json.loads(str(recorded()["made_with"]))) == {"torch", "transformers"}
    assert (DATA / "hf_processors.npz").stat().st_size < 200_000


def test_processors_live():
    """The installed version: on the recorded logits, where it must give the recording, and more."""
    hugging_face()
    live = maker().record(maker().ROWS, 0)
    for name in ("logits", "tokens", "generated"):
        np.testing.assert_array_equal(live[name], recorded()[name])
    np.testing.assert_allclose(live["outputs"], recorded()["outputs"], rtol=1e-6)
    check(maker().record(100, 1))
