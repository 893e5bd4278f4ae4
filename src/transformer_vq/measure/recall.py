"""Small models that learn to remember: trained from nothing on a task of memory, then asked."""

import time
from dataclasses import replace

import jax

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import Batches, Source, Task
from transformer_vq.nn.model import Model
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.train import (
    init_train_state,
    make_train_step,
    start_codebook,
    trained_model,
)


def train_on(
    config: ModelConfig, train: TrainConfig, source: Source, *, max_seconds: float | None = None
) -> Model:
    """The model after `train.steps` updates on a source, in memory alone.

    With `max_seconds` it ends sooner if the time is over, which begins after the first update (a
    busy machine compiles slowly).
    """
    end, batches = None, Batches.of(source, train)
    state = jax.jit(init_train_state, static_argnums=(0, 1))(config, train)
    if config.attention == "vq" and train.codebook_init == "data":
        start = jax.jit(start_codebook, static_argnums=(0, 1))
        state = start(config, train, state, batches.batch(0))
    step = make_train_step(config, train)
    for i in range(train.steps // train.updates_per_sequence):
        state, metrics = step(state, batches.batch(i))
        if max_seconds is not None:
            jax.block_until_ready(metrics)
            now = time.monotonic()
            end = now + max_seconds if end is None else end
            if now > end:
                break
    return trained_model(state, config)


def share_right(model: Model, task: Task, *, episodes: int, rows: int = 16) -> float:
    """How often the likeliest token is the answer, in so many held-out episodes of a task."""
    asked = replace(task, episodes=20 * episodes).source().split("test")
    rows = min(rows, episodes) if model.config.attention == "vq" else 1  # its keys are too many
    accuracy = evaluate(model, asked, rows=rows, chunk_len=512).accuracy
    assert accuracy is not None
    return accuracy
