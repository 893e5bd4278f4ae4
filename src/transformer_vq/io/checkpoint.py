"""Checkpoints on disk: any pytree of arrays, written in the background, atomic and verified.

A checkpoint is a folder named after its step. Orbax writes it under another name and renames it
when it is whole, so that a process killed at any moment leaves only complete ones. Next to
orbax's files lie

    metadata.json   what the caller gave, the metrics, and the dtype and shape of every array
    SHA256SUMS      a checksum of every file, so that damage is never read as weights
                    (by hand: `cd runs/NAME/checkpoints/100 && sha256sum -c SHA256SUMS`)

Arrays are stored under their path in the tree ("params/embed"), so that reading needs neither the
classes that were saved nor the arrays that are not wanted. Orbax is imported only to save, and to
read what is to be placed on certain devices: a third of a second, which sampling does without.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from transformer_vq.io import arrays, checksums
from transformer_vq.io.checksums import METADATA_FILE
from transformer_vq.io.leaves import (
    CheckpointError,
    as_like,
    check_match,
    data_spec,
    describe,
    named_leaves,
    placed,
    storable,
)

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run, in a folder on a local or shared disk.

    The last `keep` are kept, and the one with the lowest `best_metric`. With several processes,
    all of them make the same calls. Use it as a context manager: leaving it waits for the save in
    progress, which is lost if the program ends before. One program at a time may write.

        with Checkpoints("runs/book/checkpoints") as checkpoints:
            checkpoints.save(100, train_state, {"position": 51_200})
            train_state, metadata = checkpoints.restore(None, like=train_state)
    """

    def __init__(
        self, folder: str | os.PathLike, *, keep: int = 3, best_metric: str = "validation_loss"
    ):
        """Nothing is created before the first save.

        Raises `CheckpointError` if `keep` is not positive, or the path is not UTF-8.
        """
        if keep < 1:
            raise CheckpointError(f"keep is {keep}: at least 1 checkpoint must be kept")
        self.folder = Path(folder).absolute()  # orbax refuses relative paths
        _require_utf8(self.folder)
        self._keep = keep
        self._best_metric = best_metric
        self._saving: tuple[int, ocp.AsyncCheckpointer] | None = None  # in the background
        self._made: tuple[int, int] | None = None  # device and inode of the folder at a save

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(CheckpointError):  # what went wrong first is what to tell
            self.close()

    # Writing

    def save(
        self,
        step: int,
        tree: Any,
        metadata: dict[str, Any] | None = None,
        *,
        metrics: dict[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Write `tree` as the checkpoint of `step`, in the background unless `wait`.

        The values are those of now: `tree` may be donated or changed as soon as this returns.
        Leaves are jax arrays (also typed random keys), numpy arrays and Python numbers, kept bit
        for bit. `metadata` is what JSON can hold. `metrics` may hold the `best_metric`.
        An earlier save is waited for first.

        Raises `CheckpointError` if the folder has this step or a newer one, if a leaf or the
        metadata cannot be saved, or if writing fails (a full disk, say), now or in the earlier
        save; the checkpoints before it stay as they are.
        """
        import orbax.checkpoint as ocp

        from transformer_vq.io.handler import ASYNC, Handler, Save, keep_quiet

        self.wait()
        if self._has_gone():
            raise self._save_failed(step, FileNotFoundError(str(self.folder)))
        newest = self.latest()
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"step {step} cannot be saved in {self.folder}, which already has step {newest}: "
                f"go on from that one, or use another folder"
            )
        arrays = {name: storable(name, leaf) for name, leaf in named_leaves(tree).items()}
        sidecar = _to_json(
            {
                "step": step,
                "metrics": {name: float(value) for name, value in (metrics or {}).items()},
                "metadata": metadata or {},
                "arrays": {name: describe(array) for name, array in arrays.items()},
            }
        )
        # Orbax refuses arrays without elements; their description says all there is.
        stored = {name: array for name, array in arrays.items() if array.size}
        # A new one for every save: after an error, orbax would report it again at the next.
        checkpointer = ocp.AsyncCheckpointer(Handler(sidecar, self._has_gone), async_options=ASYNC)
        self._saving = step, checkpointer
        keep_quiet()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = _identity(self.folder)
            self._tidy()
            checkpointer.save(self.folder / str(step), args=Save(stored))
        except Exception as error:
            raise self._save_failed(step, error) from error
        if wait:
            self.wait()

    def wait(self, *, tidy: bool = True) -> None:
        """Block until the save in progress, if any, is complete.

        Then it is a checkpoint, and older ones may go, unless `tidy` is false. Raises
        `CheckpointError` if it failed; the checkpoints before it stay as they are.
        """
        if self._saving is None:
            return
        step, checkpointer = self._saving
        try:
            checkpointer.close()  # which waits
        except Exception as error:
            raise self._save_failed(step, error) from error
        self._saving = None
        if tidy:
            self._tidy()

    def withdraw(self, steps: Iterable[int]) -> None:
        """Put checkpoints aside, as folders named `STEP.diverged` that nothing here reads.

        Whatever `keep` says, none is deleted for them. A save in progress is waited for first.

        Raises `CheckpointError` if that save failed.
        """
        self.wait(tidy=False)
        for step in steps if jax.process_index() == 0 else ():
            aside = self.folder / f"{step}.diverged"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier attempt
            (self.folder / str(step)).rename(aside)

    def close(self) -> None:
        """Wait for the save in progress; leaving the context does the same.

        Raises `CheckpointError` if that save failed.
        """
        self.wait()

    # Reading

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, oldest first; empty without a folder."""
        if not self.folder.is_dir():
            return []
        numbers = [entry.name for entry in self.folder.iterdir() if entry.is_dir()]
        # A name as `030` is not one that a save gives.
        return sorted(int(n) for n in numbers if n.isdecimal() and str(int(n)) == n)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest `best_metric`, or None if none was saved with it.

        Raises `CheckpointError` if a checkpoint does not say what its metric was: it is damaged
        or cannot be read, and might be the best.
        """
        measured = [(self._metric(step), step) for step in self.steps()]
        metric, step = min(measured, default=(math.inf, None))
        return step if metric < math.inf else None

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The metadata saved with `step`, by default the newest.

        Raises `CheckpointError` if there is no such checkpoint or it is damaged.
        """
        return self._open(step)[1]["metadata"]

    def restore(self, step: int | None, like: Any) -> tuple[Any, dict[str, Any]]:
        """The tree and the metadata saved at `step`, or at the newest if None.

        `like` is a tree of the same structure, of arrays, `jax.ShapeDtypeStruct`s and numbers.
        Each leaf comes back as the leaf of `like` is: a numpy array, a number, or a jax array,
        placed by the sharding of that leaf if it has one, whatever devices saved it.

        Raises `CheckpointError` if the folder or the checkpoint does not exist, if it is damaged
        (naming the newest intact one before it, never falling back to it), or if `like` has other
        arrays, dtypes or shapes (naming the first).
        """
        return self._restore(step, like, subtree=False)

    def restore_subtree(self, step: int | None, like: Any) -> tuple[Any, dict[str, Any]]:
        """As `restore`, for a part of the tree: `like` leaves out what is not wanted.

        `restore_subtree(None, {"params": params})` reads the parameters of a training checkpoint,
        whatever its optimizer. Dictionaries stand for dataclasses of the same field names.

        Raises `CheckpointError` as `restore` does.
        """
        return self._restore(step, like, subtree=True)

    # Inside

    def _restore(self, step: int | None, like: Any, *, subtree: bool) -> tuple[Any, dict]:
        path, saved = self._open(step)
        leaves = named_leaves(like)
        specs = {name: data_spec(name, leaf) for name, leaf in leaves.items()}
        check_match(path, saved["arrays"], specs, subtree=subtree)
        wanted = {name: placed(leaves[name]) for name, spec in specs.items() if spec.size}
        jax.devices()  # where JAX has none, that is no damage of the checkpoint
        try:
            if any(wanted.values()):
                from transformer_vq.io.handler import read_placed

                values = read_placed(path, wanted)
            else:
                values = arrays.read(path, wanted)
        except Exception as error:
            self._require_there(path)
            raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
        restored = []
        for name, spec in specs.items():
            value = values[name] if spec.size else np.zeros(spec.shape, spec.dtype)
            restored.append(as_like(leaves[name], value))
        return jax.tree.unflatten(jax.tree.structure(like), restored), saved["metadata"]

    def _open(self, step: int | None) -> tuple[Path, dict[str, Any]]:
        """The checkpoint of `step` (None: the newest), verified, and its description.

        Every process verifies for itself: all come to one verdict without talking.
        """
        self.wait(tidy=False)
        steps = self.steps()
        if not self.folder.is_dir():
            raise CheckpointError(f"there is no folder {self.folder}: name that of a trained run")
        if not steps:
            raise CheckpointError(
                f"there is no complete checkpoint in {self.folder}: train until one is saved"
            )
        if step is None:
            step = steps[-1]
        if step not in steps:
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.folder}: "
                f"it has {', '.join(map(str, steps))}"
            )
        path = self.folder / str(step)
        try:
            damage = _damage(path)
        except CheckpointError:
            self._require_there(path)
            raise
        if damage:
            self._require_there(path)
            earlier = (s for s in reversed(steps) if s < step)
            intact = next((s for s in earlier if _is_intact(self.folder / str(s))), None)
            advice = (
                "and no earlier one is intact: delete it and train anew"
                if intact is None
                else f"but step {intact} is intact: delete {path} to go on from there"
            )
            raise CheckpointError(f"the checkpoint {path} is damaged ({damage}), {advice}")
        try:
            return path, json.loads((path / METADATA_FILE).read_bytes())
        except FileNotFoundError:
            self._require_there(path)
            raise

    def _require_there(self, path: Path) -> None:
        """Raise `CheckpointError` if a checkpoint has been deleted while it was looked at."""
        if not path.is_dir():
            has = ", ".join(map(str, self.steps())) or "none any more"
            raise CheckpointError(
                f"the checkpoint {path} has just been deleted, as training does that goes on: name "
                f"another one, of {has}, or try again"
            )

    def _metric(self, step: int) -> float:
        """The `best_metric` of `step`; infinite if it has none. Raises `CheckpointError`."""
        path = self.folder / str(step)
        if damage := _damage(path, [METADATA_FILE]):
            raise CheckpointError(
                f"the checkpoint {path} is damaged ({damage}), so which one is the best is not "
                f"known: name a step, or delete {path}"
            )
        metric = json.loads((path / METADATA_FILE).read_bytes())["metrics"].get(self._best_metric)
        return math.inf if metric is None or math.isnan(metric) else metric

    def _superfluous(self) -> set[int]:
        """The steps that are neither among the last nor the best. Damaged ones stay: who knows."""
        steps, metrics = self.steps(), {}
        for step in steps:
            with contextlib.suppress(CheckpointError):
                metrics[step] = self._metric(step)
        lowest = min(metrics.values(), default=math.inf)
        best = next((s for s in metrics if metrics[s] == lowest < math.inf), None)
        return metrics.keys() - {*steps[-self._keep :], best}

    def _has_gone(self) -> bool:
        """Whether the folder of earlier saves is not there any more, or is another one."""
        return self._made is not None and _identity(self.folder) != self._made

    def _save_failed(self, step: int, error: Exception) -> CheckpointError:
        """The error to raise; clears the remains away, which may be what fills the disk."""
        self._saving = None
        failed = f"step {step} could not be saved in {self.folder}"
        if self._has_gone():
            # What was being written may have made the folder again: it goes if nothing is in it.
            for remains in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(remains, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                self.folder.parent.rmdir()
            return CheckpointError(
                f"{failed}, which has been removed or moved: nothing more is written there"
            )
        self._tidy()
        latest = self.latest()
        remains = "nothing was saved before" if latest is None else f"step {latest} is intact"
        return CheckpointError(f"{failed} ({remains}): {_reason(error)}")

    def _tidy(self) -> None:
        """Delete what is not to be kept and what interrupted saves and deletions left."""
        if jax.process_index() != 0 or not self.folder.is_dir():
            return
        for step in self._superfluous():
            # Renamed first: deleting takes time, and half a checkpoint must not look like one.
            path = self.folder / str(step)
            path.rename(path.with_suffix(".deleted"))
        for entry in self.folder.iterdir():
            if re.fullmatch(r"\d+\.(deleted|orbax-checkpoint-tmp.*)", entry.name):
                shutil.rmtree(entry, ignore_errors=True)


def _damage(checkpoint: Path, names: Sequence[str] = ()) -> str | None:
    """What is wrong with a checkpoint (`checksums.find_damage`), also if files are missing.

    Raises `CheckpointError` if a file cannot be read that is there: who knows what is in it.
    """
    try:
        return checksums.find_damage(checkpoint, names)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return _reason(error)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be read ({_reason(error)}): see to that, or name "
            f"another step"
        ) from None


def _is_intact(checkpoint: Path) -> bool:
    try:
        return not _damage(checkpoint)
    except CheckpointError:
        return False


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder; None if there is none."""
    try:
        stat = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_dev, stat.st_ino


def _require_utf8(folder: Path) -> None:
    """Raise `CheckpointError` for a path that the library which writes arrays cannot take."""
    try:
        os.fsencode(folder).decode("utf-8")
    except UnicodeDecodeError:
        shown = os.fsencode(folder).decode("utf-8", errors="backslashreplace")
        raise CheckpointError(
            f"the name of the folder {shown} is not UTF-8, and arrays cannot be kept below it: "
            f"rename it"
        ) from None


def _to_json(content: dict[str, Any]) -> str:
    try:
        return json.dumps(content, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata is not JSON: {_reason(error)}") from error


# What the system says, and what to do about it.
_FULL = {
    errno.ENOSPC: "the disk is full, so free some space and resume",
    errno.EDQUOT: "the quota of this disk is used up, so free some space and resume",
    errno.EFBIG: "a file may not be as large here, so raise the limit (ulimit -f) and resume",
}


def _reason(error: Exception) -> str:
    """The reason of an error, which may be a page long, in a line."""
    text = str(error).strip() or type(error).__name__
    of_library = re.search(r"\[os_error_code='(\d+)'", text)
    code = int(of_library[1]) if of_library else getattr(error, "errno", None)
    for number, advice in _FULL.items():
        if code == number or os.strerror(number) in text:
            return advice
    if of_library:  # the library names the file first, and what the system says last
        return os.strerror(int(of_library[1]))
    return textwrap.shorten(text.splitlines()[0], 300)
