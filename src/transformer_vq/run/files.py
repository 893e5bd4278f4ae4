"""The files of a run, open for one session: what it goes on from, and what it adds to."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from transformer_vq.data import keep_tokenizer
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.run.folder import RunInfo, checkpoints_of, make_run_folder, open_run
from transformer_vq.run.inputs import Inputs
from transformer_vq.run.lock import one_writer
from transformer_vq.run.log import MetricsLog
from transformer_vq.run.samples import SampleLog, open_samples
from transformer_vq.sharding import require_same


@dataclass(frozen=True)
class RunFiles:
    """A run folder that nobody else writes to while it is open."""

    folder: Path
    info: RunInfo  # of the checkpoint that the session goes on from; or a new run, at step 0
    checkpoints: Checkpoints
    log: MetricsLog
    samples: SampleLog | None

    @property
    def notes(self) -> list[str]:
        """What people want to know of them: what was damaged, where the session begins."""
        notes = [self.log.notes, self.samples.notes if self.samples else ""]
        notes.append(f"resuming at step {self.info.step}" if self.info.step else "")
        return [note for note in notes if note]


@contextlib.contextmanager
def open_files(
    folder: Path,
    given: RunInfo,
    inputs: Inputs,
    *,
    resume: bool,
    decode: Callable[[Sequence[int]], str] | None,
    say: Callable[[str], None],
) -> Generator[RunFiles]:
    """The files of the run in `folder`, which is made if need be.

    All processes of a run must open them; the first one writes. `given`: the run as it is wanted;
    `resume`: go on from its newest checkpoint. `decode`: tokens to text, for samples. What people
    want to know at once goes to `say`.

    Raises `RunError` if the folder cannot be used, or its run is another one.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        make_run_folder(folder, resume=resume)
        stack.enter_context(one_writer(folder, say))
        info = open_run(folder, given, resume=resume)
        require_same(info.step, f"the checkpoints in {folder}")
        if first:
            _keep_vocabulary(folder, inputs, info.step)
        checkpoints = stack.enter_context(checkpoints_of(folder, info.train.keep_checkpoints))
        log = MetricsLog(folder / "metrics.jsonl", info.step, writes=first)
        stack.callback(log.close)
        samples = stack.enter_context(open_samples(folder, info, inputs.validation, decode))
        yield RunFiles(folder, info, checkpoints, log, samples)


def _keep_vocabulary(folder: Path, inputs: Inputs, step: int) -> None:
    if step:
        inputs.source.tokenizer.save(folder)
    else:
        keep_tokenizer(folder, inputs.source.tokenizer)  # and not what an earlier start left here
