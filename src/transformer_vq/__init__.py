"""Transformer-VQ: generative models over very long sequences, at linear cost."""

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.io.state import StateError, load_state, save_state
from transformer_vq.nn.extend import extend
from transformer_vq.nn.model import Model, State, init_model, init_state
from transformer_vq.ops.generate import SamplingParams, Token, generate, stream
from transformer_vq.ops.sample import SampleConfig, sample_op

__all__ = [
    "Model",
    "ModelConfig",
    "SampleConfig",
    "SamplingParams",
    "State",
    "StateError",
    "Token",
    "TrainConfig",
    "extend",
    "generate",
    "init_model",
    "init_state",
    "load_state",
    "sample_op",
    "save_state",
    "stream",
]
