"""States after known prompts, as files: the second tier, which outlives the server. No JAX."""

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformer_vq.atomic import write_whole
from transformer_vq.engine.scheduler import Snapshot
from transformer_vq.errors import UserError

LOOK_AGAIN = 2.0  # seconds after which files of other processes are looked for
MOST_WAITING = 4  # states that wait to be written; more are let go
_NAME = re.compile(r"([0-9a-f]+-\d+)-([0-9a-z]+)-(\d{1,15})-([0-9a-f]{32})-(exact|any)\.tvq")


class Key(NamedTuple):
    """Whose prompt it was, how many tokens, and their hash."""

    owner: str
    length: int
    digest: bytes


class PromptFiles:
    """Files of states, by prompt; those used least recently go.

    Several processes may share the folder. What cannot be written or read is as if it were not
    there: a prompt is then read.

    Args:
      folder: where they are; those of other models, too.
      kind: what tells the states of this server: a hash of the model, `-`, the size of chunks.
      most_bytes: of all files. Without room for one, there is none.
      pack, unpack: of `engine.snapshots.SnapshotFiles`.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        most_bytes: int,
        *,
        pack: Callable[[Snapshot], bytes],
        unpack: Callable[[bytes, str], Snapshot],
    ):
        self._folder, self._kind, self.most_bytes = folder, kind, most_bytes
        self._pack, self._unpack = pack, unpack
        self._lock = threading.Lock()
        self._keys: dict[Key, bool] = {}  # the files that there are: whether they are exact
        self._looked: float | None = None
        self._waiting: queue.Queue[tuple[Key, Snapshot, bool]] = queue.Queue(MOST_WAITING)
        threading.Thread(target=self._write_all, name="prompt files", daemon=True).start()

    def lengths(self, owner: str) -> list[int]:
        """The lengths of the prompts of which there are files, rising."""
        with self._lock:
            now = time.monotonic()
            if self._looked is None or now - self._looked >= LOOK_AGAIN:
                self._looked = now
                self._keys = dict(filter(None, (self._key(path.name) for path, _ in self._files())))
            return sorted({key.length for key in self._keys if key.owner == owner})

    def exact(self, key: Key) -> bool | None:
        """Whether the file for a prompt is of an exact state; None if there is no file."""
        with self._lock:
            return self._keys.get(key)

    def read(self, key: Key) -> Snapshot | None:
        """The state after a prompt; None if there is none (any more)."""
        exact = self.exact(key)
        if exact is None:
            return None
        path = self._path(key, exact)
        try:
            snapshot = self._unpack(path.read_bytes(), path.name)
            os.utime(path)  # it was used
        except (UserError, OSError) as error:
            with self._lock:
                self._keys.pop(key, None)
            if isinstance(error, UserError):  # damaged
                _remove(path)
            return None
        return snapshot

    def put(self, key: Key, snapshot: Snapshot, exact: bool) -> None:
        """Write a state, soon; it is let go if too many wait."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((key, snapshot, exact))

    def write(self, key: Key, snapshot: Snapshot, exact: bool) -> None:
        """Write a state, if there is none at least as good, and remove the oldest for it."""
        if (known := self.exact(key)) is not None and known >= exact:
            return
        data = self._pack(snapshot)
        if len(data) > self.most_bytes:
            return
        with contextlib.suppress(OSError):  # a full disk: then it is not kept
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            write_whole(self._path(key, exact), data, shared=True)
            with self._lock:
                self._keys[key] = exact

    def wait(self) -> None:
        """Until all that waits is written."""
        self._waiting.join()

    def _write_all(self) -> None:
        while True:
            waiting = self._waiting.get()
            try:
                self.write(*waiting)
            finally:
                self._waiting.task_done()

    def _make_room(self, size: int) -> None:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        total = sum(found.st_size for _, found in files)
        for path, found in files:
            if total + size <= self.most_bytes:
                return
            _remove(path)
            total -= found.st_size
            if key := self._key(path.name):
                with self._lock:
                    self._keys.pop(key[0], None)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """All files of states, whatever they are of."""
        files = []
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name):
                    with contextlib.suppress(OSError):  # another process has removed it
                        files.append((Path(entry.path), entry.stat()))
        return files

    def _key(self, name: str) -> tuple[Key, bool] | None:
        """What a file is of, and whether it is exact; None if it is no state of this server."""
        found = _NAME.fullmatch(name)
        if found is None or found[1] != self._kind:
            return None
        owner = "" if found[2] == "all" else found[2]
        return Key(owner, int(found[3]), bytes.fromhex(found[4])), found[5] == "exact"

    def _path(self, key: Key, exact: bool) -> Path:
        kind = "exact" if exact else "any"
        name = f"{self._kind}-{key.owner or 'all'}-{key.length}-{key.digest.hex()}-{kind}.tvq"
        return self._folder / name


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
