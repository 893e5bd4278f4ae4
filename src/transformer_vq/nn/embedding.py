"""The way in and the way out of a model: tokens to features, features to logits."""

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import layers, products
from transformer_vq.nn.layers import iota
from transformer_vq.nn.timeline import Timeline
from transformer_vq.sharding import whole_columns
from transformer_vq.types import Features, Params, Tokens


@jax.named_scope("embedding")
def embed(params: Params, tokens: Tokens, timeline: Timeline, config: ModelConfig) -> Features:
    """The input of the first unit. Positions count from the start of the document."""
    dtype = jnp.dtype(config.compute_dtype)
    x = whole_columns(params["embedding"])[tokens].astype(dtype)
    if config.absolute_positions:
        position = config.ring_len + iota(tokens.shape[1]) - timeline.first
        wave = layers.sinusoid(position, config.d_model, config.max_wavelength, dtype)
        x = x + (params["position_scale"].astype(wave.dtype) * wave).astype(dtype)
    return x


@jax.named_scope("logits")
def to_logits(params: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits of features `[..., D]`: `[..., vocab_size]`, in wide precision."""
    dtype = layers.wide_dtype(config.compute_dtype)
    if config.final_norm:
        x = layers.norm(params["final_norm"], x)
    w_out = params["w_out"] if "w_out" in params else products.OutputMajor(params["embedding"])
    if not isinstance(w_out, products.Narrow):
        w_out = jax.tree.map(lambda a: a.astype(dtype), w_out)
    logits = products.matmul(x.astype(dtype), w_out) + params["output_bias"].astype(dtype)
    logits = logits * config.logit_scale
    if config.logit_cap:
        logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
    return logits
