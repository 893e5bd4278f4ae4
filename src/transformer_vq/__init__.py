"""Transformer-VQ: generative models over very long sequences, at linear cost."""

from transformer_vq.config import ModelConfig
from transformer_vq.nn.model import Model, State, extend, init_model, init_state

__all__ = ["Model", "ModelConfig", "State", "extend", "init_model", "init_state"]
