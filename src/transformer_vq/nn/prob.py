"""Sampling methods: pure functions from logits to logits.

All take logits `[..., vocab]` and parameters with the leading shape of the logits (or scalars), so
that every row of a batch has its own and none causes a compilation. A token that may not be drawn
gets the logit `REMOVED`; the others keep theirs. Each parameter has a value that changes nothing,
to the bit.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from transformer_vq.nn.layers import wide, wide_dtype

COLDEST = 1e-5  # lower temperatures count as this one: logits over it are still finite
REMOVED = -1e10  # finite: differences and products of logits stay numbers


def temperature(logits: jax.Array, value: ArrayLike) -> jax.Array:
    """Logits over the temperature (Ackley et al., 1985); 0 is greedy: only the best stays."""
    value, logits = _column(value, logits), wide(logits)
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    greedy = jnp.where(jnp.arange(logits.shape[-1]) == best, logits, REMOVED)
    scaled = _drawable(logits / jnp.maximum(value, COLDEST), logits)
    return jnp.where(value > 0, scaled, greedy)


def top_k(logits: jax.Array, k: ArrayLike) -> jax.Array:
    """Keep the k best tokens, and what ties with the last (Fan et al., 2018); 0: all."""
    k, wider = _column(k, logits), wide(logits)
    kept = wider >= _threshold(wider, jnp.ones_like(wider), jnp.minimum(k, logits.shape[-1]))
    return jnp.where(kept | (k <= 0), logits, REMOVED)


def nucleus(logits: jax.Array, p: ArrayLike) -> jax.Array:
    """Keep the smallest set of most probable tokens whose mass reaches p (Holtzman et al., 2020).

    The best token always stays; of equal tokens, those with higher ids stay first. 1: all.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    kept = smallest_set(probabilities, probabilities, p)
    return jnp.where(kept | (_column(p, logits) >= 1.0), logits, REMOVED)


def typical(logits: jax.Array, p: ArrayLike) -> jax.Array:
    """Keep the smallest set of tokens, those of most typical surprise first, whose mass reaches p.

    Typical is a surprise near the entropy (Meister et al., 2023). 1: all.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(log_p)
    entropy = -jnp.sum(probabilities * jnp.where(probabilities > 0, log_p, 0.0), -1, keepdims=True)
    kept = smallest_set(-jnp.abs(-log_p - entropy), probabilities, p)
    return jnp.where(kept | (_column(p, logits) >= 1.0), logits, REMOVED)


def min_p(logits: jax.Array, p: ArrayLike) -> jax.Array:
    """Keep tokens at least p times as probable as the best (Nguyen et al., 2024); 0: all."""
    p, wider = _column(p, logits), wide(logits)
    best = jnp.max(wider, axis=-1, keepdims=True)
    kept = wider >= best + jnp.log(jnp.where(p > 0, p, 1.0))
    return jnp.where(kept | (p <= 0), logits, REMOVED)


def repetition_penalty(logits: jax.Array, seen: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Divide positive and multiply negative logits of seen tokens (Keskar et al., 2019); 1: none.

    `seen` is bool `[..., vocab]`: tokens of the prompt or generated so far.
    """
    penalty, logits = _column(penalty, logits), wide(logits)
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, _drawable(penalized, logits), logits)


def presence_and_frequency(
    logits: jax.Array, counts: jax.Array, presence: ArrayLike, frequency: ArrayLike
) -> jax.Array:
    """Subtract `presence` from generated tokens and `frequency` times their number; 0, 0: none.

    The penalties of OpenAI's completion API. `counts` is int32 `[..., vocab]`, generated only.
    """
    presence, frequency = _column(presence, logits), _column(frequency, logits)
    logits = wide(logits)
    generated, counts = (x.astype(logits.dtype) for x in (counts > 0, counts))
    return _drawable(logits - presence * generated - frequency * counts, logits)


def draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """One token per row, int32 `[B]`, from logits `[B, vocab]` with a key per row (Gumbel-max)."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
    return jnp.argmax(logits.astype(jnp.float32) + noise, axis=-1).astype(jnp.int32)


# Smallest sets, without a sort.


def smallest_set(score: jax.Array, mass: jax.Array, target: ArrayLike) -> jax.Array:
    """The shortest list of tokens, best score first, whose mass reaches `target`: bool `[..., V]`.

    The best token is always in it. Of equal scores, higher ids come first.
    """
    score, mass, target = wide(score), wide(mass), _column(target, mass)
    threshold = _threshold(score, mass, target)
    above, equal = score > threshold, score == threshold
    missing = target - jnp.sum(jnp.where(above, mass, 0.0), axis=-1, keepdims=True)
    ties = jnp.where(equal, mass, 0.0)
    before = jnp.flip(jnp.cumsum(jnp.flip(ties, -1), axis=-1), -1) - ties
    return above | equal & ((before < missing) | (before == 0.0))


@jax.jit  # a loop: without it, every call outside of a jit would compile
def _threshold(score: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """The largest score t for which the tokens of score >= t have at least the target mass.

    All three are of one dtype. Found bit by bit: floats order like their bits (once those of
    negative ones are flipped), so as many sums over the vocabulary as a score has bits give the
    exact answer. The best score, if the target is 0; the worst, if all mass together falls short of
    it (by rounding).
    """
    width = score.dtype.itemsize * 8
    whole = jnp.uint64 if width == 64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(score, whole)
    sign = jnp.array(1 << (width - 1), whole)
    order = jnp.where(bits & sign, ~bits, bits | sign)

    def turn(i, found):
        candidate = found | (sign >> i.astype(whole))
        reached = jnp.sum(jnp.where(order >= candidate, mass, 0.0), axis=-1, keepdims=True)
        return jnp.where(reached >= target, candidate, found)

    found = jax.lax.fori_loop(0, width, turn, jnp.zeros_like(order[..., :1]))
    found = jnp.clip(found, order.min(-1, keepdims=True), order.max(-1, keepdims=True))
    bits = jnp.where(found & sign, found ^ sign, ~found)
    return jax.lax.bitcast_convert_type(bits, score.dtype)


def _drawable(changed: jax.Array, logits: jax.Array) -> jax.Array:
    """Changed logits: what was removed stays so, and all else finite and far above it."""
    return jnp.where(logits <= REMOVED / 2, REMOVED, jnp.clip(changed, REMOVED / 10, -REMOVED / 10))


def _column(value: ArrayLike, logits: jax.Array) -> jax.Array:
    """A parameter of the leading shape of the logits, or a scalar, with an axis for the tokens, in
    the wide precision of the logits."""
    value = jnp.asarray(value, wide_dtype(jnp.result_type(logits)))
    return value if value.ndim == 0 else value[..., None]
