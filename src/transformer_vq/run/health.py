"""Whether the model of a run is sound, and which checkpoint to go on from if it is not."""

import contextlib
import dataclasses
import errno
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import Source
from transformer_vq.io.checkpoint import CheckpointError
from transformer_vq.nn.model import Model
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.train import TrainState, train_state_shapes
from transformer_vq.run.files import RunFiles
from transformer_vq.run.folder import RunError
from transformer_vq.sharding import replicated

LOOK_SEQUENCES = 4  # of the training text, to see whether a model is a good one
UNTRAINED = 3.0  # nats that a new model may lose beyond guessing
LOWER = "use a lower learning rate"


@dataclass(frozen=True)
class Health:
    """Looks at what was measured and at weights. All processes of a run must ask alike.

    What it raises is the `RunError` of a run that cannot go on: it names the last good checkpoint.
    """

    files: RunFiles
    source: Source  # the training text
    mesh: Mesh

    @property
    def config(self) -> ModelConfig:
        return self.files.info.config

    @property
    def train(self) -> TrainConfig:
        return self.files.info.train

    @contextlib.contextmanager
    def stops_on_full_disk(self) -> Generator[None]:
        """Meanwhile, a disk that is full, or a file as large as it may be, raises `RunError`."""
        try:
            yield
        except OSError as error:
            folder, advice = self.files.folder, "free some space"
            if error.errno == errno.ENOSPC:
                problem = f"the disk of {folder} is full"
            elif error.errno == errno.EDQUOT:
                problem = f"the quota of the disk of {folder} is used up"
            elif error.errno == errno.EFBIG:
                problem = f"a file in {folder} may not be larger here"
                advice = "raise the limit (ulimit -f)"
            else:
                raise
            raise self.stopped(problem, advice) from None

    def require_finite(self, step: int, state: TrainState) -> None:
        """Raise `RunError` if a number is not finite that the run would go on with."""
        finite = jax.jit(_all_finite, out_shardings=replicated(self.mesh))
        if not finite(dataclasses.replace(state, stream=None)):
            raise self.diverged(f"the weights are not finite after step {step}")

    def require_sound(self, step: int, values: dict[str, Any]) -> None:
        """Raise `RunError` if what a batch measured says that the run is lost."""
        usual, limit = self.files.log.usual_loss(), self.train.max_loss_spike
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise self.diverged(f"the {name} is {values[name]} at step {step}")
        if limit and usual is not None and values["loss"] > usual + limit:
            raise self.diverged(
                f"the loss is {values['loss']:.4f} at step {step}, more than max_loss_spike "
                f"({limit:g}) above the {usual:.4f} of the updates before",
                f"{LOWER} (or max_loss_spike 0 to let it be)",
            )

    def require_learnt(self, step: int, state: TrainState, loss: float | None = None) -> None:
        """Raise `RunError` if the model after `step` updates is lost. `loss`: on another text.

        A high one alone may come of learning the training text by heart; then that is still known.
        """
        if loss is not None and self.is_known(loss):
            return
        # The weights as they are, and not their average.
        known = self.look(Model(state.params, state.codebook, self.config))
        if not self.is_known(known) or not math.isfinite(known if loss is None else loss):
            other = "" if loss is None else f"{loss:.4f}, and "
            raise self.diverged(
                f"the model is lost at step {step}: its loss is {other}{known:.4f} on text that it "
                f"was trained on"
            )

    def is_known(self, loss: float) -> bool:
        """Whether a text with this loss is one that a sound model knows something of."""
        usual, limit = self.files.log.usual_loss(), self.train.max_loss_spike
        if usual is None:  # then no more than a model that has learnt nothing
            usual, limit = (
                math.log(self.config.vocab_size),
                limit and max(limit, UNTRAINED),
            )
        return math.isfinite(loss) and (not limit or loss <= usual + limit)

    def look(self, model: Model) -> float:
        """The loss of a model on the first sequences of the training text."""
        length = self.train.sequence_len
        most = LOOK_SEQUENCES * length
        # Whole documents begin anew by themselves.
        context_len = None if self.source.whole_documents else length
        return evaluate(
            model, self.source, chunk_len=length, context_len=context_len, max_tokens=most
        ).loss

    def diverged(self, problem: str, advice: str = LOWER) -> RunError:
        """The error of a run whose model is lost: it names the checkpoint to go on from.

        A checkpoint may have been saved of a model that was lost already, which the batch after
        it shows. So the checkpoints are looked at, the newest first, and lost ones put aside.
        """
        with contextlib.suppress(CheckpointError):  # the one before it is intact
            self.files.checkpoints.wait(tidy=False)
        good, lost = None, []
        for step in reversed(self.files.checkpoints.steps()):
            with contextlib.suppress(CheckpointError):  # a damaged one is neither good nor lost
                if self.is_good(step):
                    good = step
                    break
                lost.append(step)
        self.files.checkpoints.withdraw(lost)
        if good is None:
            nothing = "no checkpoint is good" if lost else "nothing was saved before"
            return RunError(f"{problem}, and {nothing}: {advice} and start again")
        return RunError(f"{problem}, and {self.named(good)}: {advice} and resume from it")

    def is_good(self, step: int) -> bool:
        """Whether the model saved at `step` knows the training text. Raises `CheckpointError`."""
        placed = train_state_shapes(self.config, self.train, self.mesh)
        parts = {"params": placed.params, "codebook": placed.codebook}
        saved, _ = self.files.checkpoints.restore_subtree(step, parts)
        return self.is_known(self.look(Model(saved["params"], saved["codebook"], self.config)))

    def stopped(self, problem: str, advice: str) -> RunError:
        """The error of a run that cannot go on for want of something else than a good model."""
        with contextlib.suppress(CheckpointError):
            self.files.checkpoints.wait()
        latest = self.files.checkpoints.latest()
        if latest is None:
            return RunError(f"{problem}, and nothing was saved before: {advice} and start again")
        return RunError(f"{problem}, and {self.named(latest)}: {advice} and resume from it")

    def named(self, step: int) -> str:
        return f"step {step} in {self.files.checkpoints.folder} is the last good checkpoint"


def _all_finite(state: TrainState) -> jax.Array:
    """Whether all numbers are finite that a run would go on with."""
    numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
