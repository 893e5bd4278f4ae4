"""A training run: data in, metrics and checkpoints out, resumable at any point."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_vq import costs
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import Batch, Source
from transformer_vq.errors import UserError, as_path, require_kind, shown
from transformer_vq.fields import as_amount
from transformer_vq.nn.model import Model
from transformer_vq.ops.evaluate import Evaluation, evaluate
from transformer_vq.ops.train import (
    Metrics,
    TrainState,
    init_train_state,
    make_train_step,
    require_trainable,
    start_codebook,
    train_state_shapes,
    train_state_shardings,
    trained_model,
)
from transformer_vq.run.files import RunFiles, open_files
from transformer_vq.run.folder import DataSource, RunInfo
from transformer_vq.run.health import Health
from transformer_vq.run.inputs import Inputs
from transformer_vq.run.log import Record
from transformer_vq.run.observer import Observer, Observers
from transformer_vq.run.peak import peak_flops
from transformer_vq.run.stop import Interrupted, StopRequests, StopSignals
from transformer_vq.sharding import as_mesh, data_mesh, shard_rows, traced_on

Status = Literal["done", "out of time", "interrupted"]


@dataclass(frozen=True)
class TrainResult:
    """How a session of `train` ended. What it did is on disk, whatever the status."""

    status: Status
    step: int
    seconds: float  # of training, all sessions together
    validation_loss: float | None  # at that step; None if interrupted or without validation data


def train(
    config: ModelConfig,
    train: TrainConfig,
    tokens: np.ndarray | Source,
    validation: np.ndarray | Source | None,
    folder: str | os.PathLike,
    *,
    data: DataSource | None = None,
    resume: bool = False,
    max_seconds: float | None = None,
    mesh: Mesh | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    observers: Sequence[Observer] = (),
) -> TrainResult:
    """Train a model and leave it in a run folder; or go on with the run that the folder holds.

    The same arguments give the same losses, digit for digit, in one session or in many: after
    `resume`, metrics.jsonl reads as that of an unbroken run. Ctrl-C, SIGTERM, SIGHUP and an
    observer whose reader has gone (`BrokenPipeError`) end it after the update under way, which is
    saved; a second Ctrl-C or SIGTERM acts at once.

    Of several processes (`jax.distributed`), all make this call, with a folder that all see. The
    first one writes and tells; a stop that any of them is asked for, all of them agree on.

    Args:
      config: the model. Its `vocab_size` covers the tokens.
      train: the run. An update is a chunk of a batch, so a run ends with the batch that reaches
        `train.steps`. Between sessions, all but the data fields (`run.DATA_FIELDS`) may change.
      tokens: what to train on: a source, or bare integers `[N]`, memory-mapped or not.
      validation: the same, scored every `evaluate_every` updates and at the end.
      folder: of the run; made if need be. One program at a time may train in it.
      data: what the tokens are part of, for the record; a resumed run must have the same.
      resume: go on from the newest checkpoint, or start if there is none yet.
      max_seconds: stop this session after about so long and a batch at least, with a checkpoint.
        The schedule of the learning rate goes by steps all the same.
      mesh: the devices (`sharding.make_mesh`); all of them by default, which then differ in
        their rows only. A run can go on with another mesh.
      decode: tokens to text. With it, each validation adds `train.sample_tokens` tokens to
        samples.jsonl, drawn after the same prompt by the same seed. (Not with several processes.)
      observers: are told what happens (`run.observer`).

    Raises:
      RunError: if the folder cannot be used (`run.open_run`, `run.lock`), if the model diverges
        (a loss, a gradient or a weight is not finite, or a loss far above what it was,
        `train.max_loss_spike`), or if the disk is full.
      LogError: if the folder is removed or moved.
      CheckpointError: if a checkpoint cannot be read or written, say for a full disk.
      DataError: if there are too few tokens.
      UserError: for a token outside of the vocabulary, a batch that the devices cannot share, and
        whatever else cannot be used.
    """
    require_kind("config", config, ModelConfig)
    require_kind("train", train, TrainConfig)
    mesh = data_mesh() if mesh is None else as_mesh(mesh)
    folder = as_path("folder", folder)
    _check_options(data, resume, decode)
    limit = None if max_seconds is None else as_amount("max_seconds", max_seconds)
    require_trainable(config, train, mesh)
    inputs = Inputs.of(tokens, validation, config, train)
    source = inputs.source
    given = RunInfo(config, train, data or DataSource.of("", source), source.tokenizer.name)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        heard = observers if jax.process_index() == 0 else ()
        told = Observers(heard, on_broken_pipe=signals.request)
        files = stack.enter_context(
            open_files(folder, given, inputs, resume=resume, decode=decode, say=told.say)
        )
        stack.callback(told.close)
        told.start(folder, files.log.take_kept())
        for note in (*train.notes(), *inputs.notes, *files.notes):
            told.say(note)
        training = _Training(
            files=files,
            inputs=inputs,
            mesh=mesh,
            stop=StopRequests(signals, mesh, limit),
            observers=told,
        )
        batches = inputs.batches(train, files.info.step, mesh)
        stack.enter_context(contextlib.closing(batches))
        with training.health.stops_on_full_disk():
            return training.run(batches)


def _check_options(data: Any, resume: Any, decode: Any) -> None:
    """Raise `UserError` for an option of `train` that is none."""
    if data is not None:
        require_kind("data", data, DataSource, "of transformer_vq.run.folder")
    require_kind("resume", resume, bool)
    if not (decode is None or callable(decode)):
        raise UserError(f"decode is {shown(decode)}: it must be a function of tokens")


@dataclass(frozen=True)
class Due:
    """What is to be done with the model as it is, before the next update."""

    validate: bool
    save: bool
    ends: Status | None

    def __bool__(self) -> bool:
        return self.validate or self.save or self.ends is not None


@dataclass(frozen=True)
class Pending:
    """A batch that was given to the device: what it measured is not known yet."""

    step: int  # updates done with it
    metrics: Metrics
    stop: jax.Array | None  # requests to stop, of all processes


@dataclass
class _Training:
    """A session: what happens between the start or resumption of a run and its end."""

    files: RunFiles
    inputs: Inputs
    mesh: Mesh
    stop: StopRequests
    observers: Observer

    def __post_init__(self) -> None:
        self.info = self.files.info  # as the session began
        self.config, self.train = self.info.config, self.info.train
        self.checkpoints, self.log = self.files.checkpoints, self.files.log
        self.health = Health(self.files, self.inputs.source, self.mesh)
        self.began = time.monotonic()
        self.step = self.info.step
        self.pending: Pending | None = None
        self.compiled: jax.stages.Compiled | None = None

    def run(self, batches: Generator[Batch]) -> TrainResult:
        self.state = self.initial_state()
        while True:
            # Here `state` is that after `step` updates, and perhaps still being computed.
            due = self.due()
            if due:
                self.settle()  # a loss that is not sound must be neither validated nor saved
            if due.validate and not self.validate():
                due = self.due()  # a stop was asked for meanwhile
            if due.save:
                self.save(ends=due.ends)
            if due.ends:
                loss = self.log.validation_loss(self.step)
                return TrainResult(due.ends, self.step, self.seconds(), loss)
            if due:
                self.mark(self.step)
            self.update(next(batches))

    # What is due

    def due(self) -> Due:
        ends = self.ends()
        measured = self.log.validation_loss(self.step) is not None
        can_validate = self.inputs.validation is not None and self.step > 0 and not measured
        validate = self.passed(self.train.evaluate_every) or ends is not None
        save = self.passed(self.train.checkpoint_every) or ends is not None
        return Due(
            validate=validate and can_validate and ends != "interrupted",
            save=save and self.step > self.info.step,
            ends=ends,
        )

    def ends(self) -> Status | None:
        """How the session ends now, or None if it goes on."""
        interrupted, over = self.stop.hear()
        if interrupted:
            return "interrupted"
        if self.step >= self.train.steps:
            return "done"
        return "out of time" if over and self.step > self.info.step else None

    def passed(self, every: int, step: int | None = None) -> bool:
        """Whether the batch that led to `step` passed a multiple of `every`; 0 is never."""
        step = self.step if step is None else step
        return every > 0 and step // every > (step - self.train.updates_per_sequence) // every >= 0

    # Updates

    def initial_state(self) -> TrainState:
        """The state to go on from: that of the checkpoint at `info.step`, or a new one."""
        placed = train_state_shardings(self.config, self.train, self.mesh)
        # The function itself, and not one made here, so that JAX finds what it compiled before.
        init = jax.jit(init_train_state, static_argnums=(0, 1), out_shardings=placed)
        if not self.info.step:
            return init(self.config, self.train)
        like = train_state_shapes(self.config, self.train, self.mesh)
        return self.checkpoints.restore(self.info.step, like)[0]

    def update(self, batch: Batch) -> None:
        """Give the device a batch, then read what the one before it measured."""
        batch = shard_rows(self.mesh, batch)
        if self.compiled is None:
            if not self.step and self.config.attention == "vq":
                self.state = self.first_codebook(self.state, batch)
            self.compiled = self.compile(batch)
        self.state, metrics = self.compiled(self.state, batch)
        before, self.step = self.pending, self.step + self.train.updates_per_sequence
        self.pending = Pending(self.step, metrics, self.stop.share())
        if before is not None:  # the device is busy with this batch meanwhile
            self.read(before)

    def first_codebook(self, train_state: TrainState, batch: Batch) -> TrainState:
        """The state before the first update, with codewords as `codebook_init` says."""
        if self.train.codebook_init == "random":
            return train_state
        placed = train_state_shardings(self.config, self.train, self.mesh)

        def start(train_state: TrainState, batch: Batch) -> TrainState:
            with traced_on(self.mesh):
                return start_codebook(self.config, self.train, train_state, batch)

        return jax.jit(start, out_shardings=placed, donate_argnums=0)(train_state, batch)

    def compile(self, batch: Batch) -> jax.stages.Compiled:
        """The train step, ready to be called."""
        start = time.monotonic()
        train_step = make_train_step(self.config, self.train, self.mesh)
        compiled = train_step.lower(self.state, batch).compile()
        self.observers.say(f"compiled the train step in {time.monotonic() - start:.1f} s")
        self.peak = peak_flops(self.mesh, self.config.compute_dtype)
        self.mark(self.step)
        return compiled

    # Measurements

    def seconds(self) -> float:
        return self.info.seconds + time.monotonic() - self.began

    def mark(self, step: int) -> None:
        """Measure the speed from here on, with `step` updates done."""
        self.marked = time.monotonic(), step

    def settle(self) -> None:
        """Wait for the batch under way, so that all that was measured is known and sound."""
        if self.pending is not None:
            before, self.pending = self.pending, None
            self.read(before)

    def read(self, done: Pending) -> None:
        """Wait for the metrics of a batch, and tell them."""
        self.stop.hear(done.stop)
        values = {
            name: np.asarray(value).tolist() for name, value in jax.device_get(done.metrics).items()
        }
        self.health.require_sound(done.step, values)
        logged = self.passed(self.train.log_every, done.step)
        speed = self.speed(done.step, mark=logged)
        flops = speed * costs.run_flops(self.config, self.train)
        loss = values.pop("loss")
        record = {
            "step": done.step,
            "loss": loss,
            "bpb": loss / math.log(2.0) / self.inputs.source.bytes_per_token,
            "tokens_per_second": speed,
            "gflops": flops / 1e9,
            "mfu": flops / self.peak,
            "seconds": self.seconds(),
            **values,
        }
        self.tell(record, logged=logged)

    def speed(self, step: int, *, mark: bool) -> float:
        """Tokens per second since the last mark, now that `step` updates are done.

        A device that computes while it is given work, as a CPU does, is done with the next batch
        too. When that one is read nothing is left to be timed, and the speed is still this one.
        """
        newest = self.pending
        if newest is not None and all(x.is_ready() for x in jax.tree.leaves(newest.metrics)):
            step = newest.step
        then, before = self.marked
        if step > before:
            tokens = (step - before) * self.train.batch_size * self.train.update_len
            self.last_speed = tokens / (time.monotonic() - then)
            if mark:
                self.mark(step)
        return self.last_speed

    def tell(self, record: Record, *, logged: bool = True) -> None:
        """Write a record to metrics.jsonl, if it is to be logged, and tell it."""
        if logged:
            self.log.write(record)
        self.observers.record(record, logged)

    # Validation

    def validate(self) -> bool:
        """Score the validation data and draw a sample; False if it was interrupted."""
        assert self.inputs.validation is not None  # then it is not due
        model = trained_model(self.state, self.config)
        try:
            result = self.evaluate(model, self.inputs.validation)
            self.health.require_learnt(self.step, self.state, result.loss)
            if self.files.samples:
                self.files.samples.write(self.step, model, self.stop.check)
        except Interrupted:
            return False
        accuracy = {} if result.accuracy is None else {"validation_accuracy": result.accuracy}
        self.tell(
            {
                "step": self.step,
                "validation_loss": result.loss,
                "validation_bpb": result.bpb,
                "validation_tokens": result.tokens,
                **accuracy,
                "seconds": self.seconds(),
            }
        )
        return True

    def evaluate(self, model: Model, source: Source) -> Evaluation:
        """Score what `train.evaluate_tokens` asks for. Raises `Interrupted`."""
        lengths = {}
        if self.info.context_limit is not None:
            lengths = dict.fromkeys(("chunk_len", "context_len"), self.info.context_limit)
        most = self.train.evaluate_tokens or None
        return evaluate(model, source, max_tokens=most, on_progress=self.stop.check, **lengths)

    # Saving

    def save(self, ends: Status | None) -> None:
        """Save the model, if it is sound. At the end of the session, wait until that is done."""
        self.log.require_in_place()
        self.health.require_finite(self.step, self.state)
        loss = self.log.validation_loss(self.step)
        if loss is None and ends in ("done", "out of time"):  # nothing has looked at it yet
            self.health.require_learnt(self.step, self.state)
        info = dataclasses.replace(self.info, step=self.step, seconds=self.seconds())
        metrics = {} if loss is None else {"validation_loss": loss}
        self.checkpoints.save(
            self.step, self.state, info.to_dict(), metrics=metrics, wait=ends is not None
        )
        self.observers.saved(self.step)
        if ends:
            self.observers.say(f"saved step {self.step} in {self.checkpoints.folder}")
