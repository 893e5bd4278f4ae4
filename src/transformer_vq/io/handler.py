"""Orbax as checkpoints need it: it seals them with our two files, and keeps to itself."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from transformer_vq.io import checksums
from transformer_vq.io.checksums import METADATA_FILE

# By default orbax makes the folder of a save in a thread, and when that fails, the threads that
# wait for it keep the process alive for five minutes.
ASYNC = ocp.options.AsyncOptions(create_directories_asynchronously=False)


class Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler, which also writes `metadata` and the checksums."""

    def __init__(self, metadata: str, has_gone: Callable[[], bool]):
        """`has_gone`: whether the folder of all checkpoints is not the one of earlier saves."""
        super().__init__(use_compression=False)  # weights are noise: zstd would save 8 %
        self._metadata, self._has_gone = metadata, has_gone

    def finalize(self, directory: Any) -> None:
        """Runs in one process, when all have written, before the folder gets its name."""
        folder = Path(directory)
        if self._has_gone():  # what writes arrays makes the folders above them again
            raise FileNotFoundError(str(folder.parent))
        super().finalize(directory)
        (folder / METADATA_FILE).write_text(self._metadata, "utf-8")
        checksums.seal(folder)


# Orbax asks for argument types of its own for every class of handler.
@ocp.args.register_with_handler(Handler, for_save=True)
class Save(ocp.args.PyTreeSave):
    """What to save."""


@ocp.args.register_with_handler(Handler, for_restore=True)
class Restore(ocp.args.PyTreeRestore):
    """What to restore."""


def read_placed(path: Path, wanted: Mapping[str, jax.sharding.Sharding | None]) -> dict[str, Any]:
    """The wanted arrays of a checkpoint, by name: placed like this, or as numpy where None."""
    keep_quiet()
    how = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if place is None
        else ocp.ArrayRestoreArgs(sharding=place)
        for name, place in wanted.items()
    }
    # A partial restore reads what `item` names and skips the rest.
    args = ocp.args.PyTreeRestore(item=how, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=args)


def keep_quiet() -> None:
    """Keep from the terminal what orbax logs: what matters of it reaches the user as errors.

    When one of many writes fails, orbax closes its event loop on the others. Those complain later,
    of an error that is known by then: to asyncio's log, to `sys.unraisablehook`, and by a warning
    those that had not begun.
    """
    logging.getLogger("absl").addFilter(_not_of_orbax)  # adding it twice has no effect
    logging.getLogger("asyncio").addFilter(_not_of_a_save)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)
    never_begun = r"coroutine '(async_serialize_from_host|Store\.write)\b.*' was never awaited"
    warnings.filterwarnings("ignore", never_begun, RuntimeWarning)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return not _is_of_orbax(record.pathname)


def _is_of_orbax(path: str) -> bool:
    return f"{os.sep}orbax{os.sep}" in path


def _not_of_a_save(record: logging.LogRecord) -> bool:
    if ".orbax-checkpoint-tmp" in record.getMessage():
        return False
    error = record.exc_info[1] if record.exc_info else None  # which may name no file
    frames = traceback.walk_tb(error.__traceback__ if error else None)
    return not any(_is_of_orbax(frame.f_code.co_filename) for frame, _ in frames)


@dataclass(frozen=True)
class _Unraisable:
    """A hook for exceptions that nobody can catch, without those of a loop that orbax closed."""

    before: Callable[[Any], object]

    def __call__(self, unraisable: Any) -> None:
        late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not late:
            self.before(unraisable)
