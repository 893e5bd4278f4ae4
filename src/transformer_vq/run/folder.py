"""The folder of a run: what was trained on what, and the model that came of it.

runs/NAME/
  config.json     model, training and data of the run, for people and tools to read; and the
                  versions and devices of its latest session
  metrics.jsonl   a JSON object a line (`transformer_vq.run.log`)
  samples.jsonl   what the model wrote at each validation (`transformer_vq.run.samples`)
  weights.json    what rounding the weights costs (`transformer_vq.run.weights`)
  checkpoints/    one folder per step (`transformer_vq.io.checkpoint`), each with its RunInfo

Wherever one is read, an exported model (`transformer_vq.io.export`) will do, and so will
`hf:OWNER/NAME` (`transformer_vq.io.hub`).
"""

import collections
import dataclasses
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_vq.atomic import write_whole
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import OnError, Source, Tokenizer, as_source, run_tokenizer
from transformer_vq.errors import UserError, cut, shown
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.io.export import MODEL_FILE, is_export, load_model, read_config
from transformer_vq.io.hub import local_folder
from transformer_vq.io.leaves import x64
from transformer_vq.nn.layers import wide
from transformer_vq.nn.model import Model, init_model

# What decides which data an update sees: a run cannot go on with another value.
DATA_FIELDS = ("batch_size", "sequence_len", "update_len", "seed")
# What decides which arrays a checkpoint holds: neither.
STATE_FIELDS = ("optimizer", "ema_decay", "streaming")
MOST_DIGITS = 20  # of a step


class RunError(UserError):
    """A run cannot be started, resumed, read or go on; one sentence says why and what to do."""


@dataclass(frozen=True)
class DataSource:
    """What a run was trained on: where it was, and what identifies it wherever it is now."""

    path: str  # the first of the paths
    size: int  # tokens, all splits together
    fingerprint: str  # SHA-256 of them
    documents: int = 1
    more_paths: tuple[str, ...] = ()
    text_column: str = "text"  # these: how they were read
    image_size: int = 0
    on_error: OnError = "stop"
    image_shape: tuple[int, int, int] | None = None  # height, width, channels; None for text

    def __post_init__(self) -> None:
        object.__setattr__(self, "more_paths", tuple(self.more_paths))  # JSON knows lists only
        if self.image_shape is not None:
            object.__setattr__(self, "image_shape", tuple(self.image_shape))
        _require(str, self.path, self.fingerprint, self.text_column, *self.more_paths)
        _require(int, self.size, self.documents, self.image_size, *(self.image_shape or ()))

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.more_paths)

    @classmethod
    def of(cls, path: str | os.PathLike, tokens: np.ndarray | Source, **how: Any) -> "DataSource":
        """The source `tokens`, loaded from `path`, and how. Reads all of them, if it must."""
        source = as_source(tokens)
        return cls(
            str(path),
            len(source.tokens),
            source.fingerprint,
            documents=len(source.starts),
            image_shape=source.image_shape,
            **how,
        )


@dataclass(frozen=True)
class RunInfo:
    """What defines a run, and how far it is."""

    config: ModelConfig
    train: TrainConfig
    data: DataSource
    tokenizer: str = "bytes"
    step: int = 0  # updates done
    seconds: float = 0.0  # of training that they took, all sessions together

    def __post_init__(self) -> None:
        _require(str, self.tokenizer)
        _require(int, self.step)

    @property
    def context_limit(self) -> int | None:
        """How many tokens the model can make sense of at once; None: any number.

        Full attention knows the distances that it was trained on.
        """
        return self.train.sequence_len if self.config.attention == "full" else None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunInfo":
        """The inverse of `to_dict`. Raises `RunError` for fields that it does not know."""
        try:
            return cls(
                **{
                    **values,
                    "config": ModelConfig.from_dict(values["config"]),
                    "train": TrainConfig(**values["train"]),
                    "data": DataSource(**values["data"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"the run is of another version of this program: {error}") from None


def _require(kind: type, *values: Any) -> None:
    """Raise `RunError` for the first value of another type: a file was damaged or edited."""
    for value in values:
        if not isinstance(value, kind):
            raise RunError(f"it has {value!r} in place of a value of type {kind.__name__}")


def checkpoints_of(folder: str | os.PathLike, keep: int = 3) -> Checkpoints:
    """The checkpoints of the run in `folder`, which need not exist yet."""
    return Checkpoints(Path(folder) / "checkpoints", keep=keep)


def find_step(folder: str | os.PathLike, checkpoint: str) -> int | None:
    """The step that `latest` (as None), `best` or a number names in the run in `folder`.

    Of an exported model, `latest` and `best` are what it holds. Raises `RunError` for another name,
    or `best` where no checkpoint has a validation loss.
    """
    if checkpoint == "latest":
        return None
    if checkpoint == "best" and is_export(Path(folder)):
        return None
    if checkpoint == "best":
        best = checkpoints_of(folder).best()
        if best is None and checkpoints_of(folder).latest() is not None:
            raise RunError(
                f"no checkpoint in {folder} has a validation loss: use latest, and let validations "
                f"and checkpoints fall on the same steps in the next run (--train.evaluate-every, "
                f"--train.checkpoint-every)"
            )
        return best
    if not (checkpoint.isascii() and checkpoint.isdecimal() and len(checkpoint) < MOST_DIGITS):
        raise RunError(f"the checkpoint is {shown(checkpoint)}: it must be latest, best or a step")
    return int(checkpoint)


def load_info(folder: str | os.PathLike, step: int | None = None) -> RunInfo:
    """What the checkpoint of `step` (by default the newest) says of the run in `folder`.

    Raises `RunError` if there is no such folder or it has no checkpoint, `CheckpointError` if the
    checkpoint is damaged; of an exported model `ExportError`, and `HubError` of one on the Hub.
    """
    folder = local_folder(folder)
    if not os.path.isdir(folder):  # whatever the reason
        raise RunError(f"there is no run folder {cut(str(folder), 300)}: name one that was trained")
    if is_export(folder):
        return _exported_info(folder, step)
    checkpoints = checkpoints_of(folder)
    if checkpoints.latest() is None:
        raise RunError(f"{folder} has no checkpoint: train until one is saved")
    return RunInfo.from_dict(checkpoints.metadata(step))


def _exported_info(folder: Path, step: int | None) -> RunInfo:
    """What an exported model says. Raises `RunError` for a step that it does not hold."""
    content = read_config(folder)
    names = {"config": "model", "train": "training"}
    fields = (field.name for field in dataclasses.fields(RunInfo))
    known = ((name, names.get(name, name)) for name in fields)
    info = RunInfo.from_dict({name: content[said] for name, said in known if said in content})
    if step not in (None, info.step):
        raise RunError(
            f"{folder} holds an exported model of step {info.step}, and not of step {step}: leave "
            f"out the step"
        )
    return info


def load_run(
    folder: str | os.PathLike, step: int | None = None, *, average: bool = True
) -> tuple[Model, RunInfo]:
    """The model of the run in `folder` at `step` (by default the newest checkpoint), and its info.

    A run with `ema_decay` gives the average of its weights, or those of `step` alone if not
    `average`. Raises `RunError`, `CheckpointError`, `ExportError` and `HubError` as `load_info`
    does.
    """
    folder = local_folder(folder)
    info = load_info(folder, step)
    if is_export(folder):
        return load_model(folder, info.config), info
    like = jax.eval_shape(lambda: init_model(info.config, jax.random.key(0)))
    parts = {"params": like.params, "codebook": like.codebook}
    if average and info.train.ema_decay:
        wide_parts = jax.tree.map(lambda x: jax.eval_shape(wide, x), parts)
        saved, _ = checkpoints_of(folder).restore_subtree(info.step, {"average": wide_parts})
        parts = jax.tree.map(lambda x: x.astype(info.config.param_dtype), saved["average"])
    else:
        parts, _ = checkpoints_of(folder).restore_subtree(info.step, parts)
    return Model(parts["params"], parts["codebook"], info.config), info


def load(folder: str | os.PathLike, checkpoint: str | int = "latest") -> tuple[Model, Tokenizer]:
    """A trained model and its vocabulary: what `generate`, `stream` and `score` need.

    Args:
      folder: of a run, or of an exported model; or `hf:OWNER/NAME`, one on the Hugging Face Hub.
      checkpoint: of a run: latest, best (by validation loss), or a step.

    Raises a `UserError` as `find_step` and `load_info` do, and `DataError` if the vocabulary of the
    run is lost, or is another one.
    """
    folder = local_folder(folder)
    name = shown(checkpoint) if isinstance(checkpoint, int) else str(checkpoint)
    model, info = load_run(folder, find_step(folder, name))
    return model, run_tokenizer(folder, info.tokenizer)


def refuse_export(folder: Path) -> None:
    """Raise `RunError` for the folder of an exported model, where no run can be."""
    if is_export(folder) and os.path.exists(folder / MODEL_FILE):
        raise RunError(
            f"{folder} holds an exported model, which cannot be trained on: use another folder"
        )


def make_run_folder(folder: Path, *, resume: bool) -> None:
    """Make the folder of a run, if need be; to `resume` one, it must exist. Raises `RunError`."""
    checkpoints_of(folder)  # refuses a name that cannot be one
    refuse_export(folder)
    if resume and not folder.is_dir():
        raise RunError(f"there is no run folder {folder} to resume: start without resuming")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make the run folder {cut(str(folder), 300)}: {error.strerror}"
        ) from None


def open_run(folder: Path, info: RunInfo, *, resume: bool) -> RunInfo:
    """Make `folder` ready for training: the info to go on from, of which `step` may be 0.

    Raises `RunError`: for a folder that holds checkpoints, unless `resume`; with `resume` if it
    does not exist, or its run has another model, other data or another order of them, or began
    with another JAX_ENABLE_X64 (by which the same seeds draw other numbers).
    """
    make_run_folder(folder, resume=resume)
    latest = checkpoints_of(folder).latest()
    if latest is not None and not resume:
        raise RunError(
            f"{folder} already holds a run, at step {latest}: resume it or use another folder"
        )
    if latest is not None:
        saved = load_info(folder)
        _require_same(folder, saved, info)
        if (before := read_environment(folder).get("x64", x64())) != x64():
            raise RunError(
                f"JAX_ENABLE_X64 is {x64()}, and it was {before} when the run in {folder} was "
                f"trained: resume it with the same, or start another in a new folder"
            )
        info = dataclasses.replace(info, step=saved.step, seconds=saved.seconds)
    if jax.process_index() == 0:
        content = info.to_dict()
        del content["step"], content["seconds"]  # checkpoints know
        content["environment"] = environment()
        _write_json(folder / "config.json", content)
    return info


def environment() -> dict[str, str]:
    """What this process runs on: versions by name, and the devices."""
    packages = ("transformer-vq", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain")
    devices = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "devices": ", ".join(f"{count} × {kind}" for kind, count in devices.items()),
        "processes": str(jax.process_count()),
        "x64": x64(),
    }


def read_environment(folder: Path) -> dict[str, Any]:
    """The versions and devices in config.json; none if that file is damaged or missing."""
    try:
        return dict(json.loads((folder / "config.json").read_bytes())["environment"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _require_same(folder: Path, saved: RunInfo, given: RunInfo) -> None:
    """Raise `RunError` naming the first thing that a run cannot change as it goes on."""

    def require(name: str, old: Any, new: Any) -> None:
        if old != new:
            raise RunError(
                f"the run in {folder} has {name} {old}, not {new}: "
                f"resume it with the same, or start another in a new folder"
            )

    for field in dataclasses.fields(ModelConfig):
        require(field.name, getattr(saved.config, field.name), getattr(given.config, field.name))
    for name in (*DATA_FIELDS, *STATE_FIELDS):
        require(name, getattr(saved.train, name), getattr(given.train, name))
    require("tokenizer", saved.tokenizer, given.tokenizer)
    if saved.data.fingerprint != given.data.fingerprint:
        raise RunError(
            f"the run in {folder} was trained on other data ({saved.data.path}, "
            f"{saved.data.size:,} tokens) than {given.data.path}, {given.data.size:,} tokens: "
            f"resume it with the same, or start another in a new folder"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is whole at any moment. Raises `RunError` if that cannot be."""
    try:
        write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None
