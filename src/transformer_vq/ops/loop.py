"""A training run: data in, metrics and checkpoints out, resumable at any point."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import Batch, Batches, Source, as_source, check_tokens, require_length
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.metrics import MetricsLog, Record
from transformer_vq.nn.model import Model
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.run import DataSource, RunError, RunInfo, checkpoints_of, open_run
from transformer_vq.ops.signals import Interrupted, StopSignals
from transformer_vq.ops.train import Metrics, TrainState, init_train_state, make_train_step
from transformer_vq.sharding import data_mesh, replicated, require_divisible, shard_rows

Status = Literal["done", "out of time", "interrupted"]


@dataclass(frozen=True)
class TrainResult:
    """How a sitting of `train` ended. What it did is on disk, whatever the status."""

    status: Status
    step: int
    seconds: float  # of training, all sittings together
    validation_loss: float | None  # at that step; None if interrupted or without validation data


def train(
    config: ModelConfig,
    train: TrainConfig,
    tokens: np.ndarray | Source,
    validation: np.ndarray | Source | None,
    folder: str | os.PathLike,
    *,
    data: DataSource | None = None,
    tokenizer: str = "",
    resume: bool = False,
    max_seconds: float | None = None,
    mesh: Mesh | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
) -> TrainResult:
    """Train a model and leave it in a run folder; or go on with the run that the folder holds.

    The same arguments give the same losses, digit for digit, in one sitting or in many: after
    `resume`, metrics.jsonl reads as that of an unbroken run. Ctrl-C and SIGTERM finish the update
    under way, save it and return; a second one acts at once.

    Args:
      config: the model. Its `vocab_size` covers the tokens.
      train: the run. An update is a piece of a batch, so a run ends with the batch that reaches
        `train.steps`. Between sittings, all but the data fields (`run.DATA_FIELDS`) may change.
      tokens: what to train on: a source, or bare integers `[N]`, memory-mapped or not.
      validation: the same, scored every `evaluate_every` updates and at the end.
      folder: of the run; made if need be.
      data: what the tokens are part of, for the record; a resumed run must have the same.
      tokenizer: the name of what made the tokens; by default that of the source.
      resume: go on from the newest checkpoint, or start if there is none yet.
      max_seconds: stop this sitting after about so long and a batch at least, with a checkpoint.
        The schedule of the learning rate goes by steps all the same.
      mesh: the devices, with an axis `data`; all of them by default.
      on_record: called with the measurements of every batch and every validation.
      say: called with a line of text when something happens that people want to know.

    Raises:
      RunError: if the folder cannot be used (`run.open_run`), or the loss is not finite.
      CheckpointError: if a checkpoint cannot be read or written, say for a full disk.
      DataError: if there are too few tokens.
      ValueError: for a token outside of the vocabulary, or a batch that the devices cannot share.
    """
    mesh = mesh or data_mesh()
    require_divisible(train.batch_size, mesh)
    source = as_source(tokens)
    held_out = None if validation is None else as_source(validation)
    require_length(source.tokens, train.sequence_len)
    for part in (source, held_out):
        _require_in_vocabulary(part, config.vocab_size)
    if held_out is not None and len(held_out.tokens) < 2:
        say("the validation split is too short to score: none is made")
        held_out = None
    data = data or DataSource.of("", source)
    folder = Path(folder)
    tokenizer = tokenizer or source.tokenizer.name
    info = open_run(folder, RunInfo(config, train, data, tokenizer), resume=resume)
    if jax.process_index() == 0:
        source.tokenizer.save(folder)
    step = info.step
    with (
        StopSignals() as stop,
        checkpoints_of(folder, train.keep_checkpoints) as checkpoints,
        contextlib.closing(MetricsLog(folder / "metrics.jsonl", step)) as log,
        contextlib.closing(_batches(source, train, step)) as batches,
    ):
        if step:
            say(f"resuming at step {step}")
        rate = source.bytes_per_token
        sitting = _Sitting(info, rate, held_out, mesh, stop, checkpoints, log, on_record, say)
        return sitting.run(batches, max_seconds)


class _Sitting:
    """What happens between the start or resumption of a run and its end or interruption."""

    def __init__(
        self,
        info: RunInfo,
        bytes_per_token: float,
        validation: Source | None,
        mesh: Mesh,
        stop: StopSignals,
        checkpoints: Checkpoints,
        log: MetricsLog,
        on_record: Callable[[Record], None],
        say: Callable[[str], None],
    ):
        self.info, self.config, self.train = info, info.config, info.train
        self.bytes_per_token = bytes_per_token
        self.validation, self.mesh, self.stop = validation, mesh, stop
        self.checkpoints, self.log = checkpoints, log
        self.on_record, self.say = on_record, say
        self.began = time.monotonic()

    def run(self, batches: Generator[Batch], max_seconds: float | None) -> TrainResult:
        train_state, step = self.initial_state(), self.info.step
        compiled = unread = None
        while True:
            # Here `train_state` is that after `step` updates, and perhaps still being computed.
            ended = self.status(step, max_seconds)
            validates = self.due(step, self.train.evaluate_every) or ended
            saves = self.due(step, self.train.checkpoint_every) or ended
            if unread and (validates or saves):
                self.read(*unread)  # a loss that is not finite must not be saved
                unread = None
            if validates and ended != "interrupted" and not self.validate(step, train_state):
                continue  # interrupted
            if saves and step > self.info.step:
                self.save(step, train_state, wait=bool(ended))
            if ended:
                loss = self.log.validation_loss(step)
                return TrainResult(ended, step, self.seconds(), loss)
            if validates or saves:
                self.mark(step)

            batch = shard_rows(self.mesh, next(batches))
            compiled = compiled or self.compile(step, train_state, batch)
            train_state, metrics = compiled(train_state, batch)
            if unread:  # the device is busy with this batch while the last one is read
                self.read(*unread)
            step += self.train.updates_per_sequence
            unread = step, metrics

    def initial_state(self) -> TrainState:
        """The state to go on from: that of the checkpoint at `info.step`, or a new one."""
        whole = replicated(self.mesh)
        # The function itself, and not one made here, so that JAX finds what it compiled before.
        init = jax.jit(init_train_state, static_argnums=(0, 1), out_shardings=whole)
        if not self.info.step:
            return init(self.config, self.train)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            init.eval_shape(self.config, self.train),
        )
        return self.checkpoints.restore(self.info.step, like)[0]

    def compile(self, step: int, train_state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """The train step, ready to be called."""
        start = time.monotonic()
        train_step = make_train_step(self.config, self.train, self.mesh)
        compiled = train_step.lower(train_state, batch).compile()
        self.say(f"compiled the train step in {time.monotonic() - start:.1f} s")
        self.mark(step)
        return compiled

    def status(self, step: int, max_seconds: float | None) -> Status | None:
        """How the sitting ends now, or None if it goes on."""
        if self.stop.requested:
            return "interrupted"
        if step >= self.train.steps:
            return "done"
        over = max_seconds is not None and time.monotonic() - self.began >= max_seconds
        return "out of time" if over and step > self.info.step else None

    def due(self, step: int, every: int) -> bool:
        """Whether the batch that led to `step` updates passed a multiple of `every`; 0 is never."""
        return every > 0 and step // every > (step - self.train.updates_per_sequence) // every >= 0

    def seconds(self) -> float:
        return self.info.seconds + time.monotonic() - self.began

    def mark(self, step: int) -> None:
        """Measure the speed from here on."""
        self.marked = time.monotonic(), step

    def read(self, step: int, metrics: Metrics) -> None:
        """Wait for the metrics of the batch that led to `step` updates, and tell the world."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise self.diverged(step, name, values[name])
        then, before = self.marked
        tokens = (step - before) * self.train.batch_size * self.train.update_len
        record = {
            "step": step,
            "loss": (loss := values.pop("loss")),
            "bpb": loss / math.log(2.0) / self.bytes_per_token,
            "tokens_per_second": tokens / (time.monotonic() - then),
            "seconds": self.seconds(),
            **values,
        }
        if self.due(step, self.train.log_every):
            self.log.write(record)
            self.mark(step)
        self.on_record(record)

    def diverged(self, step: int, name: str, value: float) -> RunError:
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        advice = (
            "nothing was saved before: start again with a lower learning rate"
            if latest is None
            else f"step {latest} in {self.checkpoints.folder} is the last good checkpoint: "
            f"resume from it, say with a lower learning rate"
        )
        return RunError(f"the {name} is {value} at step {step}, and {advice}")

    def validate(self, step: int, train_state: TrainState) -> bool:
        """Score the validation data, unless that was done; False if it was interrupted."""
        if self.validation is None or not step or self.log.validation_loss(step) is not None:
            return True
        full = self.config.attention == "full"  # which knows the distances it was trained on
        lengths = dict(chunk_len=self.train.sequence_len, context_len=self.train.sequence_len)
        try:
            result = evaluate(
                Model(train_state.params, train_state.codebook, self.config),
                self.validation,
                max_tokens=self.train.evaluate_tokens or None,
                on_progress=self.stop.check,
                **(lengths if full else {}),
            )
        except Interrupted:
            return False
        record = {
            "step": step,
            "validation_loss": result.loss,
            "validation_bpb": result.bpb,
            "validation_tokens": result.tokens,
            "seconds": self.seconds(),
        }
        self.log.write(record)
        self.on_record(record)
        return True

    def save(self, step: int, train_state: TrainState, *, wait: bool) -> None:
        info = dataclasses.replace(self.info, step=step, seconds=self.seconds())
        loss = self.log.validation_loss(step)
        metrics = {} if loss is None else {"validation_loss": loss}
        self.checkpoints.save(step, train_state, info.to_dict(), metrics=metrics, wait=wait)
        if wait:
            self.say(f"saved step {step} in {self.checkpoints.folder}")


def _batches(source: Source, train: TrainConfig, step: int) -> Generator[Batch]:
    """This process's share of the batches from the one that follows `step` updates."""
    batches = Batches(
        source.tokens,
        starts=source.starts,
        whole_documents=source.image_shape is not None,
        streaming=train.streaming,
        batch_size=train.batch_size,
        sequence_len=train.sequence_len,
        seed=train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    yield from batches.iterate(step // train.updates_per_sequence)


def _require_in_vocabulary(source: Source | None, vocab_size: int) -> None:
    """Raise `ValueError` naming the first token outside of the vocabulary."""
    tokens = np.zeros(0, np.uint8) if source is None else source.tokens
    if not len(tokens) or np.iinfo(tokens.dtype).max < vocab_size:
        return  # bytes need no look
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        check_tokens(tokens, vocab_size)
