"""Tokens on disk: written whole or not at all, and looked at before they are used.

A folder of the cache holds `tokens.bin`, `starts.npy` and `source.json`, which has the size and the
SHA-256 of the other two and of itself. What does not agree is made anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from transformer_vq.data.source import Span
from transformer_vq.data.text import DataError


class Kept(NamedTuple):
    """What is in a folder of the cache."""

    tokens: np.ndarray  # mapped
    starts: np.ndarray  # mapped
    values: dict[str, Any]  # of source.json
    damage: str = ""  # what was wrong with those kept before, if they had to be made anew


class TokenFile:
    """The tokens, starts and description of a source, on their way to disk; a context manager."""

    def __init__(self, folder: Path, vocab_size: int):
        self.folder, self.dtype = folder, np.dtype(np.min_scalar_type(vocab_size - 1))
        self.size = 0
        self.starts = array("q")
        self._file = (folder / "tokens.bin").open("wb")
        self._digest = hashlib.sha256()

    def write(self, tokens: Any) -> None:
        """Add tokens `[n]`."""
        content = np.ascontiguousarray(tokens, self.dtype)
        self._file.write(content.data)
        self._digest.update(content.data)
        self.size += content.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    def finish(
        self,
        spans: Mapping[str, Span],
        notes: Sequence[str],
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Write what is left: then, and only then, the folder is whole, and on the disk.

        Raises `DataError` if there are no tokens.
        """
        if not self.size:
            raise DataError(f"the data hold no tokens{': ' if notes else ''}{'; '.join(notes)}")
        _sync(self._file)
        starts = self.folder / "starts.npy"
        with starts.open("wb") as file:
            np.save(file, np.array(self.starts, np.int64))
            _sync(file)
        content = {
            "dtype": self.dtype.name,
            "size": self.size,
            "digest": self._digest.hexdigest(),
            "starts": _digest(starts),
            "spans": spans,
            "notes": list(notes),
            "image_shape": shape,
        }
        with (self.folder / "source.json").open("w", encoding="utf-8") as file:
            json.dump({**content, "check": _check(content)}, file)
            _sync(file)
        _sync_folder(self.folder)


def read_tokens(folder: Path) -> Kept:
    """What a finished `TokenFile` wrote. Reads it all, and raises `Damaged` if it has changed."""
    try:
        values = json.loads((folder / "source.json").read_bytes())
        check = values.pop("check")
        _require(check == _check(values), "source.json")
        tokens, starts = folder / "tokens.bin", folder / "starts.npy"
        size = values["size"] * np.dtype(values["dtype"]).itemsize
        _require(tokens.stat().st_size == size and _digest(tokens) == values["digest"], tokens.name)
        _require(_digest(starts) == values["starts"], starts.name)
        return Kept(
            np.asarray(np.memmap(tokens, values["dtype"], mode="r")),
            np.load(starts, mmap_mode="r"),
            values,
        )
    except OSError as error:
        name = Path(error.filename or folder).name
        raise Damaged(f"{name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged("source.json is not as it was written") from None


class Damaged(DataError):
    """What is kept is not as it was written."""


def kept_tokens(cache: Path, key: str, build: Callable[[Path], None]) -> Kept:
    """The tokens in the folder `key` of the cache, which `build` makes if they are not there whole.

    Of the processes that see one cache, one makes them and the others wait. Raises `DataError` if
    they cannot be written.
    """
    folder = cache / key
    try:
        return read_tokens(folder)
    except Damaged as error:
        damage = str(error) if folder.exists() else ""
    if not _can_write(cache):
        return scratch_tokens(build)._replace(damage=damage)
    try:
        with _alone(cache / f".{key}.lock") as alone:
            try:
                return read_tokens(folder)  # another process made them meanwhile
            except Damaged as error:
                damage = str(error) if folder.exists() else ""
            if alone:
                for left in cache.glob(f".making-{key}-*"):  # by a process that died
                    shutil.rmtree(left, ignore_errors=True)
            scratch = tempfile.mkdtemp(dir=cache, prefix=f".making-{key}-")
            try:
                build(Path(scratch))
                _replace(Path(scratch), folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return read_tokens(folder)._replace(damage=damage)
    except OSError as error:
        raise _not_kept(cache, error, "set TVQ_CACHE to another folder") from None


def scratch_tokens(build: Callable[[Path], None]) -> Kept:
    """The tokens that `build` makes, in a folder of their own that goes with this process."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            build(Path(scratch))
            return read_tokens(Path(scratch))  # they stay mapped when the folder goes
    except OSError as error:
        folder = Path(tempfile.gettempdir())
        raise _not_kept(folder, error, "set TMPDIR to another folder") from None


def _not_kept(folder: Path, error: OSError, way: str) -> DataError:
    return DataError(
        f"the tokens cannot be written to {folder} ({error.strerror or error}): make room there, "
        f"or {way}"
    )


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Wait until no other process that sees this file is in here: whether that can be known.

    So of the processes of a run, one on each disk makes the tokens. A process that dies lets the
    next one in. Where files cannot be locked, all go in: what they make is the same.
    """
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
            stack.callback(lock.unlink, missing_ok=True)  # who waits on it looks again anyway
            alone = True
        except (ImportError, OSError):  # Windows; some network disks
            alone = False
        yield alone


def _replace(scratch: Path, folder: Path) -> None:
    """Let a folder take the place of one that is damaged, if there is one."""
    for _ in range(2):
        try:
            os.rename(scratch, folder)
            _sync_folder(folder.parent)
            return
        except OSError:
            try:
                read_tokens(folder)  # another process was first: what it made is the same
                return
            except Damaged:
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    folder.unlink()
    os.rename(scratch, folder)


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise Damaged(f"{name} is not as it was written")


def _check(values: Mapping[str, Any]) -> str:
    """A digest of the description itself."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Let the names in a folder outlast a power cut, where a system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
