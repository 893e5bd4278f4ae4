"""What bounds the mass of far keys, which else grows with the text: a decay, and a cap.

Both are options of a model that change no array of it (`ModelConfig.far_decay`, `far_cap`), and
both fold into the cache exactly (docs/mathematics.md, "A bounded past"):

- decay: a key at distance d loses `d / far_decay` of its score. A code then has a mass, the sum of
  `exp(-d / far_decay)` over its far keys, in place of a count;
- cap: a query with n > `far_cap` keys beyond its window lowers their scores by `log(n / far_cap)`,
  so that together they weigh as if there were `far_cap` of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from transformer_vq.config import ModelConfig
from transformer_vq.nn.layers import iota, wide_dtype
from transformer_vq.types import FarOffsets, NearOffsets


class Decay(NamedTuple):
    """How mass fades: by the factor `exp(-rate)` with every token."""

    rate: float  # 1 / far_decay
    ring_len: int  # W

    @classmethod
    def of(cls, config: ModelConfig) -> "Decay | None":
        """That of a model; None if it has none."""
        return cls(1 / config.far_decay, config.ring_len) if config.far_decay else None

    def left(self, tokens: Int[jax.Array, "*any"]) -> Float[jax.Array, "*any"]:
        """What is left of a mass after so many tokens; all of it where they are below 0."""
        return jnp.exp(-self.rate * jnp.maximum(tokens, 0).astype(float))


def keys_beyond(
    index: Int[jax.Array, "*#any"], first: Int[jax.Array, "*any"], config: ModelConfig
) -> Int[jax.Array, "*any"]:
    """How many keys of its document are beyond the window of the query at a timeline index.

    `first`: index of the document's first key.
    """
    return jnp.maximum(index - first - config.window_len, 0)


def cap_offsets(beyond: Int[jax.Array, "*any"], config: ModelConfig) -> Float[jax.Array, "*any"]:
    """What keys beyond the window gain in score when there are so many: 0, or less."""
    dtype = wide_dtype(config.compute_dtype)
    if not config.far_cap:
        return jnp.zeros(beyond.shape, dtype)
    return -jnp.log(jnp.maximum(beyond.astype(dtype) / config.far_cap, 1))


def block_offsets(
    distance: Int[jax.Array, "c j"], beyond: Int[jax.Array, "B n c"], config: ModelConfig
) -> tuple[NearOffsets, FarOffsets] | tuple[None, None]:
    """What the scores of a block's queries gain: by key of their span, and for all codes alike.

    `distance`: of each key of a span from each query. `beyond`: of each query, as above. The mass
    of codes is that at the token before the block. None where nothing is bounded.
    """
    if not config.far_decay and not config.far_cap:
        return None, None
    far = cap_offsets(beyond, config)
    near = jnp.where(distance > config.window_len, far[..., None], 0)
    if decay := Decay.of(config):
        near = near - decay.rate * distance.astype(far.dtype)
        far = far - decay.rate * (1 + iota(distance.shape[0])).astype(far.dtype)
    return near, far
