"""Key shift: a key that carries what came before it (as in RWKV's token shift, Peng et al., 2023).

Key t becomes `(1 - m) k_t + m k_(t-1)`, with a learned share m per channel, before it is normed and
quantized. "The value that followed this key" can then be asked for by the key alone
(`ModelConfig.key_shift`).
"""

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn.layers import wide
from transformer_vq.nn.timeline import Timeline
from transformer_vq.types import KeyMix, Keys, LastKey, Params, PerRow


def key_mix(params: Params, config: ModelConfig) -> KeyMix:
    """The share `[G, K]` of the key before in each key, from 0 to 1; 0.5 at the start."""
    shares = jax.nn.sigmoid(wide(params["key_shift"]))
    return shares.reshape(config.num_kv_heads, config.d_k)


@jax.named_scope("key_shift")
def shift_keys(keys: Keys, mix: KeyMix, previous: LastKey, timeline: Timeline) -> Keys:
    """The keys `[B, T, G, K]`, mixed, in wide.

    `previous` `[B, G, K]`: the key before the first of these. There is none before the first key of
    a document: zeros take its place.
    """
    keys = wide(keys)
    before = jnp.concatenate([previous[:, None].astype(keys.dtype), keys[:, :-1]], axis=1)
    first_before = jnp.concatenate([timeline.first_before[:, None], timeline.first[:, :-1]], axis=1)
    same = timeline.first == first_before
    return keys + mix.astype(keys.dtype) * (jnp.where(same[..., None, None], before, 0.0) - keys)


def last_key(keys: Keys, previous: LastKey, length: PerRow) -> LastKey:
    """The last of the first `length` keys as they came, in wide: what the next one is mixed with.
    Where there is none, the one before them."""
    keys = wide(keys)
    last = jnp.clip(length - 1, 0)[:, None, None, None]
    last = jnp.take_along_axis(keys, last, axis=1)[:, 0]
    return jnp.where((length > 0)[:, None, None], last, previous.astype(keys.dtype))
