"""Scores of texts: what `extend` says of every token, however long the texts are."""

import jax
import numpy as np
import pytest

from tests.engine.plain import EXTEND, LENGTH, MODEL, VOCAB, empty_state, random_prompt
from transformer_vq import (
    SamplingParams,
    generate,
    init_state,
    score,
)
from transformer_vq.engine import prefill
from transformer_vq.engine.score import score_chunks
from transformer_vq.ops import decode


def plain(model, text, state=None):
    """The same, one text at a time and from whole logits."""
    state = init_state(model.config, 1) if state is None else state
    size = np.array([len(text)], np.int32)
    tokens = np.pad(np.array([text], np.int32), [(0, 0), (0, LENGTH - len(text))])
    logits, _ = EXTEND(model, state, tokens, lengths=size)  # of one shape: compiled once
    logits = np.concatenate([state.logits, logits[0, : len(text) - 1]])
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(text)), text]


def test_scores_of_ragged_texts(monkeypatch):
    """Texts that take one piece and many; one token; the first of a text has no score."""
    monkeypatch.setattr(prefill, "PREFILL_SIZES", (1, 4, 16))
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, VOCAB, n).tolist() for n in (1, 5, 16, 37)]
    for text, scores in zip(texts, score(MODEL, texts), strict=True):
        assert scores[0] is None and len(scores) == len(text)
        np.testing.assert_allclose(np.array(scores[1:], float), plain(MODEL, text)[1:], atol=2e-5)
    wrong = score(MODEL, [text[::-1] for text in texts])[3]  # control
    assert max(abs(a - b) for a, b in zip(wrong[1:], scores[1:], strict=True)) > 0.1


def test_scores_with_alternatives_in_parts(monkeypatch):
    """Logits of some positions at a time: as all at once, and the likeliest tokens of each."""
    monkeypatch.setattr(decode, "_SCORED_AT_ONCE", 4)
    text = np.random.default_rng(6).integers(0, VOCAB, 16)
    tokens, lengths = text[None].astype(np.int32), np.array([16], np.int32)
    _, found = decode.prefill_scored(MODEL, init_state(MODEL.config, 1), tokens, lengths)
    np.testing.assert_allclose(found.logprobs[0, 1:], plain(MODEL, text)[1:], atol=2e-5)
    logits, _ = EXTEND(MODEL, init_state(MODEL.config, 1), tokens)
    best = np.argsort(-np.asarray(logits[0]), axis=-1)[:, : decode.TOP_LOGPROBS]
    assert np.array_equal(found.top_tokens[0, 1:], best[:-1])
    assert not np.array_equal(found.top_tokens[0, :-1], best[:-1])  # control: one place off


def test_scores_continue_a_state():
    """Of one row for all, as a fork: the first token then has a score too."""
    rng = np.random.default_rng(4)
    prompt, texts = random_prompt(rng), [random_prompt(rng) for _ in range(3)]
    tokens = np.array([prompt], np.int32)
    _, state = EXTEND(MODEL, init_state(MODEL.config, 1), tokens)
    before = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    for text, scores in zip(texts, score(MODEL, texts, state), strict=True):
        whole = plain(MODEL, prompt + text)[len(prompt) :]
        np.testing.assert_allclose(np.array(scores, float), whole, atol=2e-5)
    for leaf, as_it_was in zip(jax.tree.leaves(state), before, strict=True):
        np.testing.assert_array_equal(leaf, as_it_was)


def test_scores_are_the_log_probabilities_of_sampling():
    from transformer_vq import stream

    params = SamplingParams(max_tokens=20, logprobs=True, temperature=0.7, seed=3)
    tokens = list(stream(MODEL, [[5, 6]], params))
    assert generate(MODEL, [[5, 6]], params)[0] == tokens
    scores = score(MODEL, [[5, 6, *tokens]])[0][2:]
    np.testing.assert_allclose(scores, [t.logprob for t in tokens], atol=2e-5)


def test_wrong_texts():
    with pytest.raises(ValueError, match="text 1 is empty"):
        score(MODEL, [[1], []])
    with pytest.raises(ValueError, match="text 0 has the token 64"):
        score(MODEL, [[VOCAB]])
    with pytest.raises(ValueError, match="3 rows for 2 prompts"):
        score(MODEL, [[1], [2]], empty_state(MODEL, 3))


def test_a_text_in_pieces():
    """Wherever it is cut, the scores are those of the whole."""
    rng = np.random.default_rng(5)
    text = rng.integers(0, VOCAB, 100).tolist()
    (whole,) = score(MODEL, [text])
    for cuts in ([40], [1, 2, 50, 99]):
        pieces = [piece.tolist() for piece in np.split(np.array(text), cuts)]
        found = list(score_chunks(MODEL, iter(pieces)))
        assert [piece for piece, _ in found] == pieces
        scores = [s for _, some in found for s in some]
        assert scores[0] is whole[0] is None
        np.testing.assert_allclose(scores[1:], whole[1:], atol=2e-5)
    apart = [s for piece in pieces for s in score(MODEL, [piece])[0]]  # control
    assert None in apart[1:]
