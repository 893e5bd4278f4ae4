"""Small models that learn to remember: how long they are trained, and what they are asked."""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from transformer_vq import Model, ModelConfig, TrainConfig
from transformer_vq.data import Task
from transformer_vq.measure import recall
from transformer_vq.ops.scores import Evaluation

CONFIG = ModelConfig(d_model=8, d_k=4, num_layers=1, codebook_size=4, block_len=16, window_len=3)
TRAIN = TrainConfig(batch_size=2, sequence_len=16, steps=5, codebook_init="random")
TASK = Task(pairs=2, filler=5, episodes=100)


@pytest.mark.parametrize(("max_seconds", "updates"), [(None, 5), (100, 5), (2, 4), (0.5, 2)])
def test_all_updates_or_as_many_as_there_is_time_for(monkeypatch, max_seconds, updates):
    """Each update takes a second; the time is looked at after it, and begins after the first."""
    seen, clock = [], itertools.count(1000)

    def step(state, batch):
        seen.append(batch.inputs)
        return state, {"loss": jnp.float32(0)}

    monkeypatch.setattr(recall, "make_train_step", lambda config, train: step)
    monkeypatch.setattr(recall.time, "monotonic", lambda: float(next(clock)))
    model = recall.train_on(CONFIG, TRAIN, TASK.source().split("train"), max_seconds=max_seconds)
    assert isinstance(model, Model) and len(seen) == updates
    assert len({batch.tobytes() for batch in seen}) == updates  # each of other episodes


@pytest.mark.parametrize(("attention", "rows"), [("vq", 7), ("full", 1)])
def test_asked_are_held_out_episodes(monkeypatch, attention, rows):
    def asked(model, source, **given):
        assert given["rows"] == rows and len(source.starts) == 7
        assert source.counted.sum() == 7 * TASK.pairs
        return Evaluation(0.0, 14, [], accuracy=0.25)

    monkeypatch.setattr(recall, "evaluate", asked)
    config = CONFIG.replace(attention=attention)
    model: Model = SimpleNamespace(config=config)  # pyright: ignore[reportAssignmentType]
    assert recall.share_right(model, TASK, episodes=7) == 0.25
