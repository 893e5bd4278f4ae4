"""A run folder has one writer at a time."""

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import jax

from transformer_vq.run.folder import RunError
from transformer_vq.sharding import all_processes

LOCK_FILE = ".lock"  # it says who writes, and is removed when that one ends
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# By the folder's device and inode: the thread of this process that writes there.
_held: dict[tuple[int, int], int] = {}


@contextlib.contextmanager
def one_writer(folder: Path, say: Callable[[str], None] = print) -> Generator[None]:
    """Be the one program that writes in a run folder, which must exist, while this is open.

    A process that dies leaves the folder free. Of several processes of one run (`jax.distributed`)
    the first one holds it for all. A thread that holds it may open this again. Where the file
    system knows no locks, `say` gets a sentence and nothing is held.

    Raises `RunError` naming who writes there, in all processes; nothing of theirs is touched.
    """
    refusal = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(_hold(folder, say))
            except RunError as error:
                refusal = error
        if not all_processes(refusal is None):
            raise refusal or RunError(f"the first process was refused the run folder {folder}")
        yield


@contextlib.contextmanager
def _hold(folder: Path, say: Callable[[str], None]) -> Generator[None]:
    stat, me = folder.stat(), threading.get_ident()
    key = stat.st_dev, stat.st_ino
    if _held.get(key) == me:
        yield
        return
    with contextlib.ExitStack() as stack:
        _lock(folder, stack, say)
        _held[key] = me
        stack.callback(_held.pop, key)
        yield


def _lock(folder: Path, stack: contextlib.ExitStack, say: Callable[[str], None]) -> None:
    """Lock the folder until `stack` closes. Raises `RunError`."""
    try:
        import fcntl
    except ImportError:  # Windows
        _warn(folder, say)
        return
    path = folder / LOCK_FILE
    while True:
        try:
            file = stack.enter_context(path.open("a+b", buffering=0))
        except OSError as error:
            raise RunError(f"cannot write in the run folder {folder}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                _warn(folder, say)
                return
            raise RunError(
                f"{folder} is being written by {_holder(path)}: wait until that has ended, stop "
                f"it, or use another folder"
            ) from None
        if _is(path, file.fileno()):
            break  # and not a file that the last holder has just removed
    stack.callback(path.unlink, missing_ok=True)  # before it is closed, so while it is held
    with contextlib.suppress(OSError):  # a full disk: then it does not say who
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())


def _is(path: Path, descriptor: int) -> bool:
    """Whether the path is that of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_bytes())
        return f"process {int(who['pid'])} on {who['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _warn(folder: Path, say: Callable[[str], None]) -> None:
    say(f"the file system of {folder} has no locks: take care that nothing else trains there")
