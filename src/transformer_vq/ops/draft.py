"""Drafted decoding: tokens are guessed ahead, tried together, and kept while they are right.

A row's draw depends on its key, its position and the logits alone. So a guess is right when it *is*
the token that is drawn in its place, and the output is that of plain decoding, at any temperature
and with every control. A round reads the weights once: the token that is drawn for certain, and
the guesses after it, go through `read_few`; what is right is committed.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from transformer_vq.nn.decode import Decoder, decode_step
from transformer_vq.nn.few import commit, read_few
from transformer_vq.nn.layers import iota
from transformer_vq.nn.model import State
from transformer_vq.ops.decode import (
    Controls,
    Generated,
    Pause,
    Rows,
    controlled_logits,
    draw_at,
    empty_output,
    likeliest,
    unsound,
)

LONGEST_MATCH = 12  # tokens: more of the text before says no more of what comes


class Drafted(NamedTuple):
    """What one dispatch did."""

    rows: Rows
    guide: State | None  # the state of the guide
    new: Generated
    rounds: jax.Array  # int32 [B]: in how many rounds each row took part


@functools.partial(
    jax.jit,
    static_argnames=("size", "steps", "with_logprobs"),
    donate_argnames=("rows", "guide_state"),
)
def draft_tokens(
    decoder: Decoder,
    controls: Controls,
    rows: Rows,
    keep: ArrayLike,
    pause: Pause,
    recent: jax.Array,
    guide: Decoder | None,
    guide_state: State | None,
    rounds: ArrayLike,
    *,
    size: int,
    steps: int,
    with_logprobs: bool,
) -> Drafted:
    """`generate_tokens` by rounds of `size` tokens per row, in one program.

    It ends after `rounds`, or when every active row has `pause.steps` tokens (at most `steps`) or
    up to `size - 1` more.

    `recent` int32 `[B, H]`: the text of each row so far, its newest token last, -1 where there is
    none. Guesses are what followed the last place in it that is like its end; with a `guide`, a
    small model whose state has consumed the same tokens, what that draws with the same keys.
    """
    batch = rows.counts.shape[0]
    rows = replace(rows, active=rows.active & keep)
    out = empty_output(rows, steps + size - 1, with_logprobs)
    row, started, most = iota(batch)[:, None], rows.active, jnp.minimum(pause.steps, steps)

    def turn(carry):
        i, rows, guide_state, recent, out, took_part = carry
        state = rows.state
        running = rows.active & (out.lengths < most)
        logits = controlled_logits(state.logits, controls, rows)
        first = draw_at(controls.key, state.position, logits)
        taken = running & ~_stops(first[:, None], controls)[:, 0] & ~unsound(state)
        recent = _pushed(recent, first[:, None], taken.astype(jnp.int32))
        if guide is None or guide_state is None:
            guesses = _continued(recent, size - 1)
        else:
            guesses = _guided(guide, guide_state, first, controls, rows, size - 1)
        tokens = jnp.concatenate([first[:, None], guesses], axis=1)
        lengths = jnp.where(taken, jnp.minimum(rows.remaining, size), 0)
        pending = read_few(decoder, state, tokens, lengths)
        accepted = _accepted(pending.logits, tokens, lengths, controls, rows)
        if guide is not None and guide_state is not None:
            seen = read_few(guide, guide_state, tokens, lengths)
            guide_state = commit(guide.config, guide_state, seen, accepted)
        kept = iota(size) < accepted[:, None]
        logits = (state.logits, pending.logits) if with_logprobs else None
        out = _written(out, tokens, kept, logits)._replace(lengths=out.lengths + accepted)
        remaining = rows.remaining - accepted
        rows = Rows(
            state=commit(decoder.config, state, pending, accepted),
            prompt=rows.prompt,
            counts=rows.counts.at[row, tokens].add(kept.astype(jnp.int32)),
            generated=rows.generated + accepted,
            remaining=remaining,
            active=jnp.where(running, taken & (remaining > 0), rows.active),
        )
        recent = _pushed(recent, guesses, jnp.maximum(accepted - 1, 0))
        return i + 1, rows, guide_state, recent, out, took_part + taken.astype(jnp.int32)

    def unfinished(carry) -> jax.Array:
        i, rows, _, _, out, _ = carry
        early = pause.at_end & jnp.any(started & ~rows.active)
        return (i < rounds) & jnp.any(rows.active & (out.lengths < most)) & ~early

    start = (jnp.int32(0), rows, guide_state, recent, out, jnp.zeros(batch, jnp.int32))
    _, rows, guide_state, _, out, took_part = jax.lax.while_loop(unfinished, turn, start)
    out = out._replace(active=rows.active, unsound=unsound(rows.state))
    return Drafted(rows, guide_state, out, took_part)


def _accepted(
    logits: jax.Array, tokens: jax.Array, lengths: jax.Array, controls: Controls, rows: Rows
) -> jax.Array:
    """How many of the tokens `[B, T]` each row keeps: the first, which was drawn, and the guesses
    after it up to the first wrong one, of at most `lengths` tokens. `[B]`.

    `logits` `[B, T, vocab]`: those after each token.
    """
    guesses, logits = tokens[:, 1:], logits[:, :-1]
    right = _drawn_after(logits, tokens, controls, rows) == guesses
    right &= ~_stops(guesses, controls) & ~jnp.isnan(logits).any(2)
    accepted = 1 + jnp.cumprod(right.astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
    return jnp.minimum(accepted, lengths)


def _written(
    out: Generated, tokens: jax.Array, kept: jax.Array, logits: tuple[jax.Array, jax.Array] | None
) -> Generated:
    """The output with those of the tokens `[B, T]` that are `kept` at the end of each row.

    `logits`, if log-probabilities are asked for: before the first token, and after each of them.
    """
    row, columns = iota(len(tokens))[:, None], iota(tokens.shape[1])
    at = jnp.where(kept, out.lengths[:, None] + columns, out.tokens.shape[1])
    out = out._replace(tokens=out.tokens.at[row, at].set(tokens, mode="drop"))
    if logits is None:
        return out
    first, after = logits
    before = jnp.concatenate([first[:, None], after[:, :-1]], axis=1)
    chosen, top_tokens, top_logprobs = likeliest(before, tokens, out.top_tokens.shape[2])
    return out._replace(
        logprobs=out.logprobs.at[row, at].set(chosen, mode="drop"),
        top_tokens=out.top_tokens.at[row, at].set(top_tokens, mode="drop"),
        top_logprobs=out.top_logprobs.at[row, at].set(top_logprobs, mode="drop"),
    )


def _stops(tokens: jax.Array, controls: Controls) -> jax.Array:
    """Which of the tokens `[B, T]` end their row."""
    return jnp.any(tokens[..., None] == controls.stop_tokens[:, None], axis=-1)


def _pushed(recent: jax.Array, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """The text of each row after the first `counts` `[B]` of the tokens `[B, T]`."""
    both = jnp.concatenate([recent, tokens], axis=1)
    return jnp.take_along_axis(both, iota(recent.shape[1]) + counts[:, None], axis=1)


def _continued(recent: jax.Array, count: int) -> jax.Array:
    """What followed the last place that is most like the end of the text, `[B, count]`.

    Where it runs into the end it begins again, so that what repeats itself goes on repeating.
    """
    size = recent.shape[1]
    like = jnp.ones(recent[:, :-1].shape, bool)
    matched = jnp.zeros(like.shape, jnp.int32)
    for back in range(LONGEST_MATCH):
        token = recent[:, size - 1 - back, None]
        there = jnp.pad(recent, ((0, 0), (back, 0)), constant_values=-1)[:, : size - 1]
        like &= (there == token) & (token >= 0)
        matched += like.astype(jnp.int32)
    best = jnp.argmax(matched * size + iota(size - 1), axis=1).astype(jnp.int32)[:, None]
    at = best + 1 + iota(count) % (size - 1 - best)
    return jnp.maximum(jnp.take_along_axis(recent, at, axis=1), 0)


def _guided(
    guide: Decoder, state: State, first: jax.Array, controls: Controls, rows: Rows, count: int
) -> jax.Array:
    """What the guide draws after the first token, `[B, count]`, with the keys of the rows."""
    row, position = iota(len(first)), rows.state.position

    def draw(carry, i):
        state, counts, token = carry
        state = decode_step(guide, state, token)
        counts = counts.at[row, token].add(1)
        after = replace(rows, counts=counts, generated=rows.generated + 1 + i)
        logits = controlled_logits(state.logits, controls, after)
        token = draw_at(controls.key, position + 1 + i, logits)
        return (state, counts, token), token

    _, guesses = jax.lax.scan(draw, (state, rows.counts, first), iota(count))
    return guesses.T


def _drawn_after(logits: jax.Array, tokens: jax.Array, controls: Controls, rows: Rows) -> jax.Array:
    """What is drawn after each of the tokens `[B, T]` but the last, from its logits
    `[B, T - 1, vocab]`, if all up to it are taken: `[B, T - 1]`."""
    vocab = rows.counts.shape[1]
    each = (tokens[:, :-1, None] == iota(vocab)).astype(jnp.int32)
    counts = rows.counts[:, None] + jnp.cumsum(each, axis=1, dtype=jnp.int32)

    def draw(logits: jax.Array, counts: jax.Array, i: jax.Array) -> jax.Array:
        after = replace(rows, counts=counts, generated=rows.generated + i)
        controlled = controlled_logits(logits, controls, after)
        return draw_at(controls.key, rows.state.position + i, controlled)

    return jax.vmap(draw, in_axes=(1, 1, 0), out_axes=1)(logits, counts, 1 + iota(logits.shape[1]))
