"""Scoring: how probable a model finds the tokens of given texts."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.engine.prefill import Prompts, begin, check_model, check_prompts, prompt_chunks
from transformer_vq.nn.forward import forward
from transformer_vq.nn.model import Model, State
from transformer_vq.ops.loss import token_nll

Scores = list[float | None]  # of the tokens of a text


def score(model: Model, texts: Prompts, state: State | None = None) -> list[Scores]:
    """The log-probability of every token of every text given all before it, in nats.

    Texts are read block-parallel, as prompts are. The first token of a text that follows nothing
    has no probability: None. With a `state`, of one row each or one row for all, texts continue it.

    Raises `ValueError` as `generate` does.
    """
    return _score(model, texts, state)[0]


def score_chunks(
    model: Model, chunks: Iterable[Sequence[int]], state: State | None = None
) -> Iterator[tuple[Sequence[int], Scores]]:
    """`score` of one text that comes in chunks: each with its scores, in memory for one of them.

    Where it is cut changes nothing but the rounding. (A state of full attention holds no more
    than it was made for: there, the text is one chunk.) Raises `ValueError` as `score` does.
    """
    for chunk in chunks:
        (scores,), state = _score(model, [chunk], state)
        yield chunk, scores


def _score(model: Model, texts: Prompts, state: State | None) -> tuple[list[Scores], State]:
    """The scores of texts, and the state after them, one row each."""
    check_model(model, state)
    given = check_prompts(texts, model.config, state, "text")
    now = begin(model.config, state, [len(text) for text in given], len(given), None)
    known = np.asarray(now.position) > 0
    scores: list[Scores] = [[] for _ in given]
    for tokens, lengths in prompt_chunks(given, len(given)):
        now, logprobs = _score_chunk(model, now, tokens, lengths)
        for row, found in enumerate(np.asarray(logprobs)):
            scores[row] += found[: lengths[row]].tolist()
    for row, known_row in enumerate(known):
        if scores[row] and not known_row:
            scores[row][0] = None
    return scores, now


@functools.partial(jax.jit, donate_argnames="state")
def _score_chunk(
    model: Model, state: State, tokens: jax.Array, lengths: jax.Array
) -> tuple[State, jax.Array]:
    """The state after a chunk of every text, `[B, T]`, and the log-probabilities of its tokens."""
    before = jax.nn.log_softmax(state.logits)
    first = jnp.take_along_axis(before, tokens[:, :1], axis=1)
    out = forward(model, state, tokens, lengths=lengths)
    if tokens.shape[1] == 1:
        return out.state, first
    rest = -token_nll(model, out.features[:, :-1], tokens[:, 1:])
    return out.state, jnp.concatenate([first, rest], axis=1).astype(jnp.float32)
