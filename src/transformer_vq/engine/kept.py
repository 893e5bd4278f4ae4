"""Files of compiled programs: whole, and looked at before any of it is run.

One bit of a program may give other numbers, or a crash. JAX writes the entries of its cache without
a checksum and not at once, unpacks most of the damaged ones without a complaint (638 of 1,000 with
one bit flipped), and replaces none.
"""

import contextlib
import hashlib
from pathlib import Path

import jax

from transformer_vq.atomic import write_whole


def read_kept(path: Path) -> bytes | None:
    """What `write_kept` wrote under this name; None: nothing, or it is damaged."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return content if digest == _digest(path, content) else None


def write_kept(path: Path, content: bytes) -> None:
    """Write a file for `read_kept`, if that can be: else the next process makes it again."""
    with contextlib.suppress(OSError):
        write_whole(path, _digest(path, content) + b"\n" + content, shared=True)


def _digest(path: Path, content: bytes) -> bytes:
    """Of the name too, so that a file under the name of another one is none."""
    return hashlib.sha256(path.name.encode() + b"\n" + content).hexdigest().encode()


class Entries:
    """JAX's cache of compiled programs in a folder, by the interface that JAX asks for."""

    def __init__(self, path: str):
        self._path = Path(path)

    def get(self, key: str) -> bytes | None:
        return read_kept(self._path / f"{key}-kept")

    def put(self, key: str, value: bytes) -> None:
        write_kept(self._path / f"{key}-kept", value)


def keep_entries_whole() -> None:
    """Let JAX's cache be one of `Entries`, unless it is told to be one of another kind.

    It has no public place for that (looked for in JAX 0.10 to 0.12): a JAX without this one keeps
    its own.
    """
    try:
        from jax._src import compilation_cache
    except ImportError:
        return
    limit, compares = (
        jax.config.values.get(f"jax_compilation_cache_{name}")
        for name in ("max_size", "check_contents")
    )
    if limit == -1 and not compares and hasattr(compilation_cache, "get_file_cache"):
        compilation_cache.get_file_cache = lambda path: (Entries(path), path)
