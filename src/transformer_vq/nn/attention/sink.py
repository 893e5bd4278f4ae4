"""A sink: queries that find nothing may attend to nothing (`ModelConfig.sink`).

It is a key of value 0 with a learned score b per query head, which every query sees (Miller, 2023,
where b = 0). It takes a part of the weight: outputs are those without it, times `share_of_keys`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer_vq.types import HeadScore


def share_of_keys(
    lse: Float[jax.Array, "*any"], nothing: Float[jax.Array, "*#any"]
) -> Float[jax.Array, "*any"]:
    """The part of the weight that is left to the keys, whose scores have this log-sum-exp."""
    return jax.nn.sigmoid(lse - nothing)


def softmax(
    scores: Float[jax.Array, "B G R *T J"], sink: HeadScore | None
) -> Float[jax.Array, "B G R *T J"]:
    """The weights of scores, of which the sink `[H]`, if there is one, has its part."""
    if sink is None:
        return jax.nn.softmax(scores, axis=-1)
    lead = scores.shape[1:3]
    nothing = sink.reshape(*lead, *[1] * (scores.ndim - 3)).astype(scores.dtype)
    nothing = jnp.broadcast_to(nothing, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, nothing], axis=-1), axis=-1)[..., :-1]
