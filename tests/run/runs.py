"""Runs of a small model on one device, what they tell, and a train step compiled once for all."""

import functools

import jax
import jax.numpy as jnp

from tests.helpers import CONFIG, START, TOKENS, raw, replace
from transformer_vq.config import TrainConfig
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.ops.train import make_train_step
from transformer_vq.run import loop
from transformer_vq.run.folder import DataSource
from transformer_vq.run.log import read_metrics
from transformer_vq.run.observer import Observer
from transformer_vq.sharding import data_mesh

TRAIN = TrainConfig(
    batch_size=2,
    sequence_len=16,
    update_len=8,
    steps=20,
    warmup_steps=4,
    learning_rate=0.02,
    log_every=2,
    evaluate_every=8,
    evaluate_tokens=64,
    checkpoint_every=4,
    keep_checkpoints=9,
)
DROPOUT = CONFIG.replace(dropout_residual=0.1, dropout_sinusoid=0.1, dropout_layer=0.1)


def train(folder, config=DROPOUT, train=TRAIN, tokens=TOKENS[:540], **options):
    mesh = data_mesh(jax.devices()[:1])
    options = {"data": DataSource.of("walk", TOKENS), "mesh": mesh, **options}
    return loop.train(config, train, tokens, TOKENS[540:], folder, **options)


class Told(Observer):
    """What a run tells, as lists; `on_record` gets each record as it comes."""

    def __init__(self, on_record=lambda record: None):
        self.records, self.said, self.steps, self.on_record = [], [], [], on_record

    def record(self, record, logged):
        self.records.append(record)
        self.on_record(record)

    def saved(self, step):
        self.steps.append(step)

    def say(self, text):
        self.said.append(text)


def history(folder):
    """The lines of metrics.jsonl, without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "gflops", "mfu")
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def weights(folder, step=None):
    state = START(DROPOUT, TRAIN)
    return raw(Checkpoints(folder / "checkpoints").restore(step, state)[0])


class Compiled:
    """A train step that is compiled once for all runs, and may be told to go wrong."""

    bad_step, bad_loss = None, jnp.nan

    def __init__(self, *arguments):
        self.step, self.program = make_train_step(*arguments), None

    def lower(self, *arguments):
        self.program = self.program or self.step.lower(*arguments).compile()
        return self

    def compile(self):
        return self

    def __call__(self, state, batch):
        state, metrics = self.program(state, batch)
        if state.step == self.bad_step:
            metrics |= {"loss": jnp.float32(self.bad_loss)}
        return state, metrics


def make_compiled(config, train, mesh):
    """In the place of `make_train_step`. No update depends on what is replaced here."""
    return _compiled(config, replace(train, max_loss_spike=0.0, sample_tokens=0), mesh)


_compiled = functools.cache(Compiled)
