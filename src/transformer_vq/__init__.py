"""Transformer-VQ: generative models over very long sequences, at linear cost."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_vq.config import ModelConfig, TrainConfig
    from transformer_vq.engine.batch import generate, stream
    from transformer_vq.engine.request import SamplingParams, Token
    from transformer_vq.engine.score import score
    from transformer_vq.io.state import StateError, load_state, save_state
    from transformer_vq.nn.extend import extend
    from transformer_vq.nn.model import Model, State, init_model, init_state
    from transformer_vq.ops.sample import SampleConfig, sample_op

# Public name: the module it lives in, imported when first asked for. So `tvq --help` and readers of
# configurations do not wait for JAX.
_HOMES = {
    "config": ["ModelConfig", "TrainConfig"],
    "io.state": ["StateError", "load_state", "save_state"],
    "nn.extend": ["extend"],
    "nn.model": ["Model", "State", "init_model", "init_state"],
    "engine.batch": ["generate", "stream"],
    "engine.request": ["SamplingParams", "Token"],
    "ops.sample": ["SampleConfig", "sample_op"],
    "engine.score": ["score"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

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
    "score",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
