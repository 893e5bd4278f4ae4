"""A training run: data in, metrics and checkpoints out, resumable at any point."""

import contextlib
import dataclasses
import errno
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_vq import costs
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import (
    Batch,
    Batches,
    Source,
    as_source,
    check_tokens,
    keep_tokenizer,
    require_length,
)
from transformer_vq.io.checkpoint import CheckpointError, Checkpoints
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.train import (
    Metrics,
    TrainState,
    init_train_state,
    make_train_step,
    require_trainable,
    start_codebook,
    train_state_shardings,
    trained_model,
)
from transformer_vq.run.folder import DataSource, RunError, RunInfo, checkpoints_of, open_run
from transformer_vq.run.log import MetricsLog, Record, Tracker
from transformer_vq.run.peak import peak_flops
from transformer_vq.run.samples import SampleLog, open_samples
from transformer_vq.run.signals import Interrupted, StopSignals, Wishes
from transformer_vq.sharding import (
    data_mesh,
    process_share,
    require_same,
    shard_rows,
    traced_on,
)

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
    decode: Callable[[Sequence[int]], str] | None = None,
    trackers: Sequence[Tracker] = (),
    on_record: Callable[[Record], None] = lambda record: None,
    on_save: Callable[[int], None] = lambda step: None,
    say: Callable[[str], None] = lambda text: None,
) -> TrainResult:
    """Train a model and leave it in a run folder; or go on with the run that the folder holds.

    The same arguments give the same losses, digit for digit, in one sitting or in many: after
    `resume`, metrics.jsonl reads as that of an unbroken run. Ctrl-C and SIGTERM finish the update
    under way, save it and return; a second one acts at once.

    Of several processes (`jax.distributed`), all make this call, with a folder that all see. The
    first one writes and tells; a stop that any of them is asked for, all of them agree on.

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
      mesh: the devices (`sharding.make_mesh`); all of them by default, which then differ in
        their rows only. A run can go on with another mesh.
      decode: tokens to text. With it, each validation adds `train.sample_tokens` tokens to
        samples.jsonl, drawn after the same prompt by the same seed. (Not with several processes.)
      trackers: get every record of metrics.jsonl, those from before a resume included.
      on_record: called with the measurements of every batch and every validation.
      on_save: called with the step of a checkpoint that is on its way to the disk.
      say: called with a line of text when something happens that people want to know.

    Raises:
      RunError: if the folder cannot be used (`run.open_run`), if the loss is not finite or far
        above what it was (`train.max_loss_spike`), or if the disk is full.
      CheckpointError: if a checkpoint cannot be read or written, say for a full disk.
      DataError: if there are too few tokens.
      ValueError: for a token outside of the vocabulary, or a batch that the devices cannot share.
    """
    mesh = mesh or data_mesh()
    require_trainable(config, train, mesh)
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
    step, first = info.step, jax.process_index() == 0
    require_same(step, f"the checkpoints in {folder}")
    if first and not step and tokenizer == source.tokenizer.name:
        keep_tokenizer(folder, source.tokenizer)  # and not what an earlier start left here
    elif first:
        source.tokenizer.save(folder)
    else:
        trackers, on_record, say = (), (lambda record: None), (lambda text: None)
    metrics = folder / "metrics.jsonl"
    with (
        StopSignals() as stop,
        checkpoints_of(folder, train.keep_checkpoints) as checkpoints,
        contextlib.closing(MetricsLog(metrics, step, trackers, writes=first)) as log,
        open_samples(folder, info, held_out, decode) as samples,
        contextlib.closing(_batches(source, train, step, mesh)) as batches,
    ):
        if step:
            say(f"resuming at step {step}")
        sitting = _Sitting(
            info,
            source.bytes_per_token,
            held_out,
            mesh,
            Wishes(stop, mesh, max_seconds),
            checkpoints,
            log,
            samples,
            on_record,
            on_save,
            say,
        )
        try:
            return sitting.run(batches)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise sitting.failed(f"the disk of {folder} is full", "free some space") from None


class _Sitting:
    """What happens between the start or resumption of a run and its end or interruption."""

    def __init__(
        self,
        info: RunInfo,
        bytes_per_token: float,
        validation: Source | None,
        mesh: Mesh,
        wishes: Wishes,
        checkpoints: Checkpoints,
        log: MetricsLog,
        samples: SampleLog | None,
        on_record: Callable[[Record], None],
        on_save: Callable[[int], None],
        say: Callable[[str], None],
    ):
        self.info, self.config, self.train = info, info.config, info.train
        self.bytes_per_token = bytes_per_token
        self.validation, self.mesh, self.wishes = validation, mesh, wishes
        self.checkpoints, self.log, self.samples = checkpoints, log, samples
        self.on_record, self.on_save, self.say = on_record, on_save, say
        self.began = time.monotonic()

    def run(self, batches: Generator[Batch]) -> TrainResult:
        train_state, step = self.initial_state(), self.info.step
        compiled = unread = None
        while True:
            # Here `train_state` is that after `step` updates, and perhaps still being computed.
            ended = self.status(step)
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
            if compiled is None:
                if not step and self.config.attention == "vq":
                    train_state = self.first_codebook(train_state, batch)
                compiled = self.compile(step, train_state, batch)
            train_state, metrics = compiled(train_state, batch)
            wishes = self.wishes.share()
            if unread:  # the device is busy with this batch while the last one is read
                self.read(*unread)
            step += self.train.updates_per_sequence
            unread = step, metrics, wishes

    def initial_state(self) -> TrainState:
        """The state to go on from: that of the checkpoint at `info.step`, or a new one."""
        placed = train_state_shardings(self.config, self.train, self.mesh)
        # The function itself, and not one made here, so that JAX finds what it compiled before.
        init = jax.jit(init_train_state, static_argnums=(0, 1), out_shardings=placed)
        if not self.info.step:
            return init(self.config, self.train)
        like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            init.eval_shape(self.config, self.train),
            placed,
        )
        return self.checkpoints.restore(self.info.step, like)[0]

    def first_codebook(self, train_state: TrainState, batch: Batch) -> TrainState:
        """The state before the first update, with codewords as `codebook_init` says."""
        if self.train.codebook_init == "random":
            return train_state
        placed = train_state_shardings(self.config, self.train, self.mesh)

        def start(train_state: TrainState, batch: Batch) -> TrainState:
            with traced_on(self.mesh):
                return start_codebook(self.config, self.train, train_state, batch)

        return jax.jit(start, out_shardings=placed, donate_argnums=0)(train_state, batch)

    def compile(self, step: int, train_state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """The train step, ready to be called."""
        start = time.monotonic()
        train_step = make_train_step(self.config, self.train, self.mesh)
        compiled = train_step.lower(train_state, batch).compile()
        self.say(f"compiled the train step in {time.monotonic() - start:.1f} s")
        self.peak = peak_flops(self.mesh, self.config.compute_dtype)
        self.mark(step)
        return compiled

    def status(self, step: int) -> Status | None:
        """How the sitting ends now, or None if it goes on."""
        interrupted, over = self.wishes.hear()
        if interrupted:
            return "interrupted"
        if step >= self.train.steps:
            return "done"
        return "out of time" if over and step > self.info.step else None

    def due(self, step: int, every: int) -> bool:
        """Whether the batch that led to `step` updates passed a multiple of `every`; 0 is never."""
        return every > 0 and step // every > (step - self.train.updates_per_sequence) // every >= 0

    def seconds(self) -> float:
        return self.info.seconds + time.monotonic() - self.began

    def mark(self, step: int) -> None:
        """Measure the speed from here on."""
        self.marked = time.monotonic(), step

    def read(self, step: int, metrics: Metrics, wishes: jax.Array | None) -> None:
        """Wait for the metrics of the batch that led to `step` updates, and tell the world."""
        self.wishes.hear(wishes)
        values = {
            name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()
        }
        self.require_sound(step, values)
        then, before = self.marked
        tokens = (step - before) * self.train.batch_size * self.train.update_len
        speed = tokens / (time.monotonic() - then)
        flops = speed * costs.run_flops(self.config, self.train)
        record = {
            "step": step,
            "loss": (loss := values.pop("loss")),
            "bpb": loss / math.log(2.0) / self.bytes_per_token,
            "tokens_per_second": speed,
            "gflops": flops / 1e9,
            "mfu": flops / self.peak,
            "seconds": self.seconds(),
            **values,
        }
        if self.due(step, self.train.log_every):
            self.log.write(record)
            self.mark(step)
        self.on_record(record)

    def require_sound(self, step: int, values: dict[str, float]) -> None:
        """Raise `RunError` if what was measured after `step` updates says that the run is lost."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                problem = f"the {name} is {values[name]} at step {step}"
                raise self.failed(problem, "use a lower learning rate")
        usual, limit = self.log.usual_loss(), self.train.max_loss_spike
        if limit and usual is not None and values["loss"] > usual + limit:
            raise self.failed(
                f"the loss is {values['loss']:.4f} at step {step}, more than max_loss_spike "
                f"({limit:g}) above the {usual:.4f} of the updates before",
                "use a lower learning rate (or max_loss_spike 0 to let it be)",
            )

    def failed(self, problem: str, advice: str) -> RunError:
        """The error of a run that cannot go on, which names the step to go on from."""
        with contextlib.suppress(CheckpointError):  # the one before it is intact
            self.checkpoints.wait()
        latest = self.checkpoints.latest()
        if latest is None:
            return RunError(f"{problem}, and nothing was saved before: {advice} and start again")
        return RunError(
            f"{problem}, and step {latest} in {self.checkpoints.folder} is the last good "
            f"checkpoint: {advice} and resume from it"
        )

    def validate(self, step: int, train_state: TrainState) -> bool:
        """Score the validation data, unless that was done; False if it was interrupted."""
        if self.validation is None or not step or self.log.validation_loss(step) is not None:
            return True
        model = trained_model(train_state, self.config)
        full = self.config.attention == "full"  # which knows the distances it was trained on
        lengths = dict(chunk_len=self.train.sequence_len, context_len=self.train.sequence_len)
        try:
            result = evaluate(
                model,
                self.validation,
                max_tokens=self.train.evaluate_tokens or None,
                on_progress=self.wishes.check,
                **(lengths if full else {}),
            )
            if self.samples:
                self.samples.write(step, model, self.wishes.check)
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
        self.on_save(step)
        if wait:
            self.say(f"saved step {step} in {self.checkpoints.folder}")


def _batches(source: Source, train: TrainConfig, step: int, mesh: Mesh) -> Generator[Batch]:
    """This process's share of the batches from the one that follows `step` updates."""
    share, shares = process_share(mesh)
    batches = Batches(
        source.tokens,
        starts=source.starts,
        whole_documents=source.image_shape is not None,
        streaming=train.streaming,
        batch_size=train.batch_size,
        sequence_len=train.sequence_len,
        seed=train.seed,
        process_index=share,
        process_count=shares,
    )
    yield from batches.iterate(step // train.updates_per_sequence)


def _require_in_vocabulary(source: Source | None, vocab_size: int) -> None:
    """Raise `ValueError` naming the first token outside of the vocabulary."""
    tokens = np.zeros(0, np.uint8) if source is None else source.tokens
    if not len(tokens) or np.iinfo(tokens.dtype).max < vocab_size:
        return  # bytes need no look
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        check_tokens(tokens, vocab_size)
