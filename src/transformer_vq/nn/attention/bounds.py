"""The cap on far keys, which else weigh more and more as a text grows (`ModelConfig.far_cap`).

A query with n > `far_cap` keys beyond its window lowers their scores by `log(n / far_cap)`, so that
together they weigh as if there were `far_cap` of them. The offset is of the query alone and so
folds into the cache exactly (docs/mathematics.md, "A bounded past").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from transformer_vq.config import ModelConfig
from transformer_vq.nn.layers import wide_dtype
from transformer_vq.types import FarOffsets, NearOffsets


def keys_beyond(
    index: Int[jax.Array, "*#any"], first: Int[jax.Array, "*any"], config: ModelConfig
) -> Int[jax.Array, "*any"]:
    """How many keys of its document are beyond the window of the query at a timeline index.

    `first`: index of the document's first key.
    """
    return jnp.maximum(index - first - config.window_len, 0)


def cap_offsets(beyond: Int[jax.Array, "*any"], config: ModelConfig) -> Float[jax.Array, "*any"]:
    """What keys beyond the window gain in score when there are so many: 0, or less; in wide."""
    beyond = beyond.astype(wide_dtype(config.compute_dtype))
    return -jnp.log(jnp.maximum(beyond / config.far_cap, 1))


def block_offsets(
    distance: Int[jax.Array, "c j"], beyond: Int[jax.Array, "B n c"], config: ModelConfig
) -> tuple[NearOffsets | None, FarOffsets | None]:
    """What the scores of a block's queries gain: by key of their span, of which some are beyond the
    window, and for all codes alike.

    `distance`: of each key of a span from each query. `beyond`: of each query, as above.
    None where there is no cap.
    """
    if not config.far_cap:
        return None, None
    far = cap_offsets(beyond, config)
    near = jnp.where(distance > config.window_len, far[..., None], 0)
    return near[:, None], far
