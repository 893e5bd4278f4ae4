"""A model of random numbers, to be written and read."""

import jax
import numpy as np

from transformer_vq import Model, ModelConfig
from transformer_vq.nn.model import model_specs

SIZES = dict(vocab_size=17, d_model=16, d_k=8, num_layers=1, codebook_size=6, window_len=5)


def make_model(seed=0, **fields):
    """A model of random numbers, made without a compilation."""
    config = ModelConfig(**{**SIZES, **fields})
    rng = np.random.default_rng(seed)

    def numbers(spec):
        return rng.normal(size=spec.shape).astype(config.param_dtype)

    return Model(*jax.tree.map(numbers, model_specs(config)), config)
