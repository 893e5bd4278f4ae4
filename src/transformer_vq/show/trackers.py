"""TensorBoard and Weights & Biases: the records of metrics.jsonl where people like to look at them.

Both are optional packages. A tracker is an observer of a run. It is made before the run starts, so
that a missing package is told at once, and begins (`start`) with all records of earlier sessions.
"""

import importlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from transformer_vq.errors import UserError, to_install
from transformer_vq.run.log import Record
from transformer_vq.run.observer import Observer


class TrackerError(UserError):
    """A tracker cannot be used; one sentence says why and what to do."""


class TensorBoard(Observer):
    """Event files in `tensorboard/` of the run folder, for `tensorboard --logdir`.

    They are written anew from metrics.jsonl whenever a run is resumed, so no step is there twice,
    and a run that gets them late shows its whole past.
    """

    def __init__(self) -> None:
        """Raises `TrackerError` if the package is missing."""
        self._package = _import("tensorboardX", "tensorboard")

    def start(self, folder: Path, records: Sequence[Record]) -> None:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = self._package.SummaryWriter(str(folder / "tensorboard"))
        for record in records:
            self.record(record, logged=True)

    def record(self, record: Record, logged: bool) -> None:
        if not logged:
            return
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB(Observer):
    """A run of Weights & Biases, in a project; resuming continues it under the same id.

    W&B takes steps in order only: those that it had before an interruption stay as they were.
    `WANDB_MODE=offline` keeps everything in `wandb/` of the run folder.
    """

    def __init__(self, project: str) -> None:
        """Raises `TrackerError` if the package is missing."""
        self._package, self._project = _import("wandb", "wandb"), project

    def start(self, folder: Path, records: Sequence[Record]) -> None:
        id_file = folder / "wandb" / "run_id"
        id_file.parent.mkdir(exist_ok=True)
        known = id_file.exists()
        if not known:
            id_file.write_text(secrets.token_hex(4), "utf-8")
        self._run = self._package.init(
            project=self._project,
            name=folder.name,
            id=id_file.read_text("utf-8"),
            resume="allow",
            dir=str(folder),
            config=json.loads((folder / "config.json").read_bytes()),
        )
        for record in () if known else records:  # what came before it was turned on
            self.record(record, logged=True)

    def record(self, record: Record, logged: bool) -> None:
        if logged and record["step"] >= self._run.step:
            self._run.log(dict(scalars(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record, grouped by name: `train/loss`, `codebook_used/unit_03`."""
    group = "validation" if "validation_loss" in record else "train"
    for name, value in record.items():
        name = name.removeprefix("validation_")
        if isinstance(value, list):
            name = name.removesuffix("_by_unit")
            yield from ((f"{name}/unit_{i:02}", number) for i, number in enumerate(value))
        elif name != "step" and isinstance(value, int | float):
            yield f"{group}/{name}", value


def _import(name: str, extra: str) -> ModuleType | Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TrackerError(
            f"{name} is not installed: {to_install(extra)}, or go without it"
        ) from None
