"""The compiled programs of decoding: prompts are read, and many tokens drawn, for a batch of rows.

A step is the same everywhere: take the logits in the state, apply each row's controls, draw a token
with the row's own key, consume it. Rows never meet, so a request's tokens depend on its prompt, its
parameters and its seed alone. Requests are handled on the host, in `engine/`.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from transformer_vq import sharding
from transformer_vq.config import ModelConfig
from transformer_vq.nn import prob
from transformer_vq.nn.decode import Decoder, decode_step, prepare
from transformer_vq.nn.embedding import to_logits
from transformer_vq.nn.few import commit, read_few
from transformer_vq.nn.forward import forward
from transformer_vq.nn.layers import iota
from transformer_vq.nn.model import Model, State, init_state

TOP_LOGPROBS = 20  # alternatives reported with log-probabilities


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Controls:
    """How each row is sampled: arrays, so that no value causes a compilation."""

    key: jax.Array  # uint32 [B, 2]: raw key of the row's seed
    temperature: jax.Array  # [B]; this and the next are float32 unless noted
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # [B]
    min_p: jax.Array  # [B]
    typical_p: jax.Array  # [B]
    repetition_penalty: jax.Array  # [B]
    presence_penalty: jax.Array  # [B]
    frequency_penalty: jax.Array  # [B]
    bias: jax.Array  # [B, vocab]: added to the logits; prob.REMOVED for banned tokens
    stop_tokens: jax.Array  # int32 [B, stops]; -1 where there is none
    min_tokens: jax.Array  # int32 [B]: no stop token before so many


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Requests in flight."""

    state: State
    prompt: jax.Array  # bool [B, vocab]: tokens seen in the prompt
    counts: jax.Array  # int32 [B, vocab]: how often each token was generated
    generated: jax.Array  # int32 [B]
    remaining: jax.Array  # int32 [B]: tokens left to generate
    active: jax.Array  # bool [B]


class Pause(NamedTuple):
    """Where a dispatch ends before its rows do: traced, so that no value causes a compilation."""

    steps: ArrayLike  # int32: after so many
    at_end: ArrayLike  # bool: as soon as one row ends


class Generated(NamedTuple):
    """What one dispatch generated: row b has `lengths[b]` new tokens, at the start of its row."""

    tokens: jax.Array  # int32 [B, steps]
    lengths: jax.Array  # int32 [B]
    logprobs: jax.Array  # float32 [B, steps]: of the tokens, under the model (no controls)
    top_tokens: jax.Array  # int32 [B, steps, TOP_LOGPROBS or fewer]; [B, steps, 0] unless asked
    top_logprobs: jax.Array  # float32, same shape
    active: jax.Array  # bool [B]: rows that go on
    unsound: jax.Array  # bool [B]: rows whose logits are not numbers now


@jax.named_scope("controls")
def controlled_logits(logits: jax.Array, controls: Controls, rows: Rows) -> jax.Array:
    """Logits `[B, vocab]` after every control, in the order that Hugging Face applies them.

    A filter that no row uses is skipped at run time; one that some rows use leaves the others'
    logits as they are, to the bit.
    """

    def when(used: jax.Array, method, logits: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.any(used), method, lambda logits, _: logits, logits, value)

    early = rows.generated < controls.min_tokens
    vocab = iota(logits.shape[-1])
    is_stop = jnp.any(controls.stop_tokens[:, :, None] == vocab, axis=1)
    removed = early[:, None] & is_stop | (controls.bias <= prob.REMOVED / 2)
    logits = jnp.where(removed, prob.REMOVED, logits + controls.bias.astype(logits.dtype))
    seen = rows.prompt | (rows.counts > 0)
    logits = prob.repetition_penalty(logits, seen, controls.repetition_penalty)
    logits = prob.presence_and_frequency(
        logits, rows.counts, controls.presence_penalty, controls.frequency_penalty
    )
    logits = prob.temperature(logits, controls.temperature)
    logits = when(controls.top_k > 0, prob.top_k, logits, controls.top_k)
    logits = when(controls.top_p < 1, prob.nucleus, logits, controls.top_p)
    logits = prob.min_p(logits, controls.min_p)
    return when(controls.typical_p < 1, prob.typical, logits, controls.typical_p)


@jax.named_scope("draw")
def draw_at(keys: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
    """A token per row, from the row's key and its position in the sequence.

    So a run that continues from a saved state draws what an unbroken run draws.
    """
    fold = jax.vmap(lambda key, i: jax.random.fold_in(jax.random.wrap_key_data(key), i))
    return prob.draw(fold(keys, position), logits)


@functools.partial(
    jax.jit, static_argnames=("steps", "with_logprobs", "mesh"), donate_argnames="rows"
)
def generate_tokens(
    decoder: Decoder,
    controls: Controls,
    rows: Rows,
    keep: ArrayLike,
    pause: Pause,
    *,
    steps: int,
    with_logprobs: bool,
    mesh: Mesh | None = None,
) -> tuple[Rows, Generated]:
    """Up to `steps` tokens for every active row, in one program; ends early when none is left, or
    where `pause` says.

    A row ends at `remaining` tokens; or at a stop token, which is neither returned nor consumed;
    or, without a token, where its logits are not numbers. All other tokens are consumed, so
    `rows.state` is ready for what comes after them. Rows not in `keep`, bool `[B]`, have ended.

    On a mesh, every device does this with its own rows, and ends when it has none left.
    """
    if mesh is not None:
        alone = functools.partial(generate_tokens, steps=steps, with_logprobs=with_logprobs)

        def own_rows(whole: tuple[Decoder, Pause], *by_row: Any) -> Any:
            return alone(whole[0], *by_row, whole[1])

        return sharding.map_rows(own_rows, mesh)((decoder, pause), controls, rows, keep)
    rows = replace(rows, active=rows.active & keep)
    batch = rows.counts.shape[0]
    out = empty_output(rows, steps, with_logprobs)
    tops = out.top_tokens.shape[2]

    def step(carry: tuple[jax.Array, Rows, Generated]):
        i, rows, out = carry
        state = rows.state
        logits = controlled_logits(state.logits, controls, rows)
        token = draw_at(controls.key, state.position, logits)
        stops = jnp.any(token[:, None] == controls.stop_tokens, axis=1)
        taken = rows.active & ~stops & ~unsound(state)
        one = taken.astype(jnp.int32)  # or none
        out = out._replace(tokens=out.tokens.at[:, i].set(token), lengths=out.lengths + one)
        if with_logprobs:
            chosen, top_tokens, top_logprobs = likeliest(state.logits, token, tops)
            out = out._replace(
                logprobs=out.logprobs.at[:, i].set(chosen),
                top_tokens=out.top_tokens.at[:, i].set(top_tokens),
                top_logprobs=out.top_logprobs.at[:, i].set(top_logprobs),
            )
        remaining = rows.remaining - one
        rows = Rows(
            state=decode_step(decoder, state, token, taken),
            prompt=rows.prompt,
            counts=rows.counts.at[jnp.arange(batch), token].add(one),
            generated=rows.generated + one,
            remaining=remaining,
            active=taken & (remaining > 0),
        )
        return i + 1, rows, out

    def unfinished(carry: tuple[jax.Array, Rows, Generated]) -> jax.Array:
        i, rows, _ = carry
        early = pause.at_end & jnp.any(started & ~rows.active)
        return jnp.any(rows.active) & (i < steps) & (i < pause.steps) & ~early

    started = rows.active
    _, rows, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), rows, out))
    return rows, out._replace(active=rows.active, unsound=unsound(rows.state))


def empty_output(rows: Rows, steps: int, with_logprobs: bool) -> Generated:
    """Room for what a dispatch of up to `steps` tokens generates; its last two fields are open."""
    batch, vocab = rows.counts.shape
    tops = min(TOP_LOGPROBS, vocab) if with_logprobs else 0
    return Generated(
        tokens=jnp.zeros((batch, steps), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        logprobs=jnp.zeros((batch, steps), jnp.float32),
        top_tokens=jnp.zeros((batch, steps, tops), jnp.int32),
        top_logprobs=jnp.zeros((batch, steps, tops), jnp.float32),
        active=rows.active,
        unsound=rows.active,
    )


def unsound(state: State) -> jax.Array:
    """Rows whose next token has no probabilities, bool `[B]`: some logit is not a number."""
    return jnp.any(jnp.isnan(state.logits), axis=1)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def prefill(
    model: Model, state: State, tokens: jax.Array, lengths: jax.Array, *, mesh: Mesh | None = None
) -> State:
    """Consume a chunk of every row's prompt, `[B, T]`, block-parallel; on a mesh as above."""
    if mesh is not None:
        return sharding.map_rows(prefill, mesh)(model, state, tokens, lengths)
    state = forward(model, state, tokens, lengths=lengths).state
    return state


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def prefill_few(
    decoder: Decoder,
    state: State,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> State:
    """`prefill` for a few tokens of every row: the table of a state is read once, not rewritten."""
    if mesh is not None:
        return sharding.map_rows(prefill_few, mesh)(decoder, state, tokens, lengths)
    pending = read_few(decoder, state, tokens, lengths, all_stay=True)
    return commit(decoder.config, state, pending, lengths)


class Scored(NamedTuple):
    """How probable the tokens of a piece were, and the likeliest in their places; in nats."""

    logprobs: jax.Array  # float32 [B, T]
    top_tokens: jax.Array  # int32 [B, T, TOP_LOGPROBS or fewer]
    top_logprobs: jax.Array  # float32, same shape


@functools.partial(jax.jit, donate_argnames="state")
def prefill_scored(
    model: Model, state: State, tokens: jax.Array, lengths: jax.Array
) -> tuple[State, Scored]:
    """`prefill`, with the probability of every token given all before it, and alternatives.

    A token and the alternatives in its place come from the same array: where the token is the
    likeliest, the two numbers are equal to the bit.
    """
    batch, length = tokens.shape
    part = min(length, _SCORED_AT_ONCE)

    def parts(x: jax.Array) -> jax.Array:  # [B, T, ...] to [T / part, B, part, ...]
        return jnp.moveaxis(x.reshape(batch, -1, part, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:  # the inverse
        return jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:])

    def score_part(features_tokens: tuple[jax.Array, jax.Array]) -> Scored:
        features, tokens = features_tokens
        return _scored(to_logits(model.params, features, model.config), tokens)

    first = _scored(state.logits[:, None], tokens[:, :1])
    out = forward(model, state, tokens, lengths=lengths)
    following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)  # the last predicts nothing
    rest = jax.lax.map(score_part, (parts(out.features), parts(following)))
    rest = jax.tree.map(lambda x: joined(x)[:, :-1], rest)
    return out.state, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, rest)


@functools.partial(jax.jit, donate_argnames="state")
def prefill_scored_few(
    decoder: Decoder, state: State, tokens: jax.Array, lengths: jax.Array
) -> tuple[State, Scored]:
    """`prefill_few`, with what `prefill_scored` gives."""
    pending = read_few(decoder, state, tokens, lengths)
    logits = jnp.concatenate([state.logits[:, None], pending.logits[:, :-1]], axis=1)
    return commit(decoder.config, state, pending, lengths), _scored(logits, tokens)


def _scored(logits: jax.Array, tokens: jax.Array) -> Scored:
    return likeliest(logits, tokens, min(TOP_LOGPROBS, logits.shape[-1]))


def likeliest(logits: jax.Array, tokens: jax.Array, tops: int) -> Scored:
    """Log-probabilities of the tokens `[...]` under logits `[..., vocab]`, and the best `tops`."""
    logprobs = jax.nn.log_softmax(logits).astype(jnp.float32)
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, tops)
    return Scored(chosen, top_tokens, top_logprobs)


_SCORED_AT_ONCE = 128  # positions whose logits are in memory together

prepare_decoder = jax.jit(prepare, static_argnames="weights")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state(
    config: ModelConfig, batch: int, room: int | None = None, mesh: Mesh | None = None
) -> State:
    """`init_state` as one program, and not one for each shape of an array; on a mesh with its rows
    spread over all devices."""
    state = init_state(config, batch, room=room)
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, sharding.by_device(mesh))
