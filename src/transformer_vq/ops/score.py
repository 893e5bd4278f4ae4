"""Scoring: how probable a model finds the tokens of given texts."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.nn.model import Model, State, forward
from transformer_vq.ops.generate import SamplingParams, Session, prompt_pieces
from transformer_vq.ops.loss import token_nll


def score(
    model: Model, texts: Sequence[Sequence[int]], state: State | None = None
) -> list[list[float | None]]:
    """The log-probability of every token of every text given all before it, in nats.

    Texts are read block-parallel, as prompts are. The first token of a text that follows nothing
    has no probability: None. With a `state`, of one row each or one row for all, texts continue it.

    Raises `ValueError` as `generate` does.
    """
    session = Session(model, texts, SamplingParams(max_tokens=1), state)
    state = session.state
    rows = state.position.shape[0]
    known = np.asarray(state.position) > 0
    scores: list[list[float | None]] = [[] for _ in texts]
    for tokens, lengths in prompt_pieces([list(text) for text in texts], rows):
        state, logprobs = _score_piece(model, state, tokens, lengths)
        for row, found in enumerate(np.asarray(logprobs)):
            scores[row] += found[: lengths[row]].tolist()
    for row, known_row in enumerate(known):
        if scores[row] and not known_row:
            scores[row][0] = None
    return scores


@functools.partial(jax.jit, donate_argnames="state")
def _score_piece(
    model: Model, state: State, tokens: jax.Array, lengths: jax.Array
) -> tuple[State, jax.Array]:
    """The state after a piece of every text, `[B, T]`, and the log-probabilities of its tokens."""
    before = jax.nn.log_softmax(state.logits)
    first = jnp.take_along_axis(before, tokens[:, :1], axis=1)
    features, state, _ = forward(model, state, tokens, lengths=lengths)
    if tokens.shape[1] == 1:
        return state, first
    rest = -token_nll(model, features[:, :-1], tokens[:, 1:])
    return state, jnp.concatenate([first, rest], axis=1).astype(jnp.float32)
