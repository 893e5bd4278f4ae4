"""A model of random numbers, to be sampled from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq import Model, ModelConfig
from transformer_vq.nn.model import model_specs

VOCAB, EOS, BATCH, LENGTH = 17, 3, 16, 30


@functools.cache
def make_model(**fields):
    """A model of random numbers, made without a compilation."""
    sizes = dict(vocab_size=VOCAB, d_model=16, d_k=8, num_layers=1, codebook_size=6, window_len=4)
    config = ModelConfig(**{**sizes, "block_len": 5, **fields})
    rng = np.random.default_rng(0)

    def numbers(spec):
        return jnp.asarray(spec.scale * rng.normal(size=spec.shape), jnp.float32)

    return Model(*jax.tree.map(numbers, model_specs(config)), config)
