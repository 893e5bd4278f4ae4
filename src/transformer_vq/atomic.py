"""Files and folders that are whole at any moment: the old content or the new, never a part."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, content: bytes, *, shared: bool = False) -> os.stat_result | None:
    """Replace the content of a file at once; a device or a pipe is written to as it is.

    `shared`: others may do so at the same moment; the last one wins. What the system says of the
    new file, by which it can be told from what others write; None for a device.

    Raises `OSError` naming the file; then it is as it was, and so after Ctrl-C.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return None
    mark = f"{secrets.token_hex(8)}." if shared else ""
    draft = path.with_name(f".{path.name}.{mark}new")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the new content is on the disk before the new name is
            found = os.fstat(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:  # Ctrl-C
        draft.unlink(missing_ok=True)
        raise
    return found


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder to put files in, which gets the name `path` when all of them are on the disk.

    What has that name may be an empty folder; with `replace` it is any folder, and goes. If
    anything fails, it stays as it was, and nothing is left of the new one. (A process that is
    killed may leave `.PID.partial` beside it; in the instant in which a folder is replaced, the old
    one as `.PID.replaced`.) Raises `OSError`.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.partial")
    old = path.with_name(f".{os.getpid()}.replaced")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that had our number
    draft.mkdir()
    try:
        yield draft
        for file in (*draft.iterdir(), draft):
            _sync(file)
        if not replace:
            draft.rename(path)
        else:
            path.rename(old)
            try:
                draft.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        _sync(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
