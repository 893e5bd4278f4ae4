"""Forgetting: by how much a token makes the keys before it fade (Lin et al., 2025, in log form).

Token t adds `l_t = log sigmoid(x_t w + b) - 1 / tau_max`, which is below 0, to the score of every
older key: per key/value head, learned (`ModelConfig.forget`); and `-1 / far_decay` where that is
set. So a key's weight is a product over the tokens after it, and folds into the cache exactly
(docs/mathematics.md, "A bounded past").
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.config import ModelConfig
from transformer_vq.nn import products
from transformer_vq.nn.layers import iota, wide
from transformer_vq.nn.timeline import Timeline
from transformer_vq.types import Fades, Features, Params

# Of a fade: nothing is left of a key then, and sums of fades stay small enough to subtract.
LEAST = -20.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForgetGate:
    """The constants of a unit's gate, in wide."""

    weight: jax.Array | None  # [D, G]; None where the rate is constant
    bias: jax.Array  # [G]
    learned: jax.Array | None = None  # []: 0 in a unit that forgets by the horizon alone, else 1

    @classmethod
    def of(cls, params: Params, unit: int | jax.Array, config: ModelConfig) -> "ForgetGate":
        """The gate of unit number `unit`, of its parameters."""
        weight = wide(params["w_forget"]) if config.forget == "gated" else None
        bias = wide(params["b_forget"])
        if config.long_units == 0:
            return cls(weight, bias)
        return cls(weight, bias, learns(unit, config).astype(bias.dtype))


def learns(unit: int | np.ndarray | jax.Array, config: ModelConfig) -> jax.Array:
    """Whether the gate of a unit is learned: not that of the `long_units`."""
    return jnp.asarray(unit) < config.num_units - config.long_units


def forget_start(config: ModelConfig) -> np.ndarray:
    """The first biases `[N, G]`: time constants from twice the window to half of the horizon, on a
    logarithmic scale over units and heads, the shortest first."""
    shape = (config.num_units, config.num_kv_heads)
    longest = config.forget_horizon / 2
    taus = np.geomspace(min(2.0 * max(config.window_len, 1), longest), longest, int(np.prod(shape)))
    return -np.log(np.expm1(1 / taus - 1 / config.forget_horizon)).reshape(shape)


def time_constants(params: Params, config: ModelConfig) -> jax.Array:
    """Tokens `[N, G]` after which a key has lost a nat, where the gate gets nothing from the token.

    `params`: those of the units, stacked.
    """
    rate = jax.nn.softplus(-wide(params["b_forget"]))
    rate = jnp.where(learns(iota(rate.shape[0]), config)[:, None], rate, 0)
    return 1 / (rate + 1 / config.forget_horizon)


@jax.named_scope("forget")
def fades(
    gate: ForgetGate | None, x: Features, timeline: Timeline, config: ModelConfig
) -> Fades | None:
    """l: what each token, of normed features x, adds to the scores of all keys before it,
    `[B, T, G]`, in wide, below 0, and 0 at padding. None where keys do not fade.

    `log_fades` of the oracle (`nn/reference.py`).
    """
    if not config.fades:
        return None
    shape = (*x.shape[:2], config.num_kv_heads)
    rate = jnp.zeros(shape, wide(x).dtype)
    if gate is not None:
        logits = (
            gate.bias
            if gate.weight is None
            else products.matmul_exact(wide(x), gate.weight) + gate.bias
        )
        learned = jax.nn.softplus(-logits).astype(rate.dtype)
        if gate.learned is not None:
            learned = learned * gate.learned
        rate = rate + learned + 1 / config.forget_horizon
    if config.far_decay:
        rate = rate + 1 / config.far_decay
    real = iota(x.shape[1]) < timeline.length[:, None]
    return jnp.where(real[..., None], jnp.maximum(-rate, LEAST), 0.0)
