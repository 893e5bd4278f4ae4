"""States that are kept: after known prompts, and under names. In memory, and in files."""

import hashlib
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from transformer_vq.atomic import write_whole
from transformer_vq.engine.scheduler import Snapshot
from transformer_vq.errors import UserError
from transformer_vq.serve.protocol import NAME

CacheMode = Literal["exact", "any", "off"]
MOST_SEEN = 8192  # prefixes that are remembered without a state
SUFFIX = ".tvq"


class StoreFull(UserError):
    """There is no room for another named state."""


@dataclass(frozen=True)
class Known:
    """The state after the first tokens of a prompt."""

    snapshot: Snapshot
    length: int
    exact: bool  # read in the chunks in which every prompt is read


@dataclass(frozen=True)
class _Named:
    snapshot: Snapshot
    stamp: tuple[int, int] | None  # of its file


class StateStore:
    """Snapshots by what was read, and by name; apart by owner.

    Args:
      row_bytes: of one snapshot.
      most_bytes: of all snapshots in memory. What was used least recently goes, prompts first; a
        named state goes only if it has a file.
      folder: where named states are files, which other processes may read and write too.
      grid: chunks of prompts end at multiples of this.
      pack, unpack: of `engine.snapshots.SnapshotFiles`.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        row_bytes: int,
        most_bytes: int,
        folder: Path | None,
        *,
        grid: int,
        pack: Callable[[Snapshot], bytes],
        unpack: Callable[[bytes, str], Snapshot],
    ):
        self.row_bytes, self.most_bytes, self._folder = row_bytes, most_bytes, folder
        self.grid, self._pack, self._unpack = grid, pack, unpack
        self._known: OrderedDict[tuple[str, bytes], Known] = OrderedDict()
        self._lengths: Counter[tuple[str, int]] = Counter()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._named: OrderedDict[tuple[str, str], _Named] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """Of all snapshots in memory."""
        return (len(self._known) + len(self._named)) * self.row_bytes

    # After known prompts.

    def find(self, owner: str, tokens: Sequence[int], mode: CacheMode) -> Known | None:
        """The state of the longest known prefix of a prompt.

        With `exact`, only one that reading the prompt itself would give: it changes no bit.
        """
        if mode == "off":
            return None
        with self._lock:
            lengths = sorted(n for o, n in self._lengths if o == owner and n <= len(tokens))
            digests = _digests(tokens, lengths)
            for length in reversed(lengths):
                key = owner, digests[length]
                found = self._known.get(key)
                if found is None:
                    continue
                on_grid = length % self.grid == 0 or length == len(tokens)
                if mode == "any" or (found.exact and on_grid):
                    self._known.move_to_end(key)
                    return found
        return None

    def worth_keeping(self, owner: str, tokens: Sequence[int], known: int) -> frozenset[int]:
        """After how many tokens of this prompt, of which some are known, to keep its state.

        At its end; at the last end of a chunk, from which a longer prompt goes on; and where
        prompts part: at the last end of a chunk that another prompt has had.
        """
        ends = {len(tokens)}
        if known % self.grid == 0:
            grid = list(range(known + self.grid, len(tokens) + 1, self.grid))
            digests = _digests(tokens, grid)
            with self._lock:
                ends |= set(grid[-1:])
                ends |= set([n for n in grid if owner.encode() + digests[n] in self._seen][-1:])
                for n in grid:
                    self._seen[owner.encode() + digests[n]] = None
                while len(self._seen) > MOST_SEEN:
                    self._seen.popitem(last=False)
        return frozenset(ends)

    def keep(self, owner: str, tokens: Sequence[int], snapshot: Snapshot, *, exact: bool) -> None:
        """Remember the state after these tokens."""
        length = len(tokens)
        key = owner, _digests(tokens, [length])[length]
        with self._lock:
            old = self._known.get(key)
            if old and (old.exact or not exact):
                self._known.move_to_end(key)
                return
            if old:
                self._forget(key)
            if self._make_room():
                self._known[key] = Known(snapshot, length, exact)
                self._lengths[owner, length] += 1

    def _forget(self, key: tuple[str, bytes]) -> None:
        known = self._known.pop(key)
        at = key[0], known.length
        self._lengths[at] -= 1
        if not self._lengths[at]:
            del self._lengths[at]

    def _make_room(self) -> bool:
        """Let go of what was used least recently until one more fits; whether it does."""
        while self.num_bytes + self.row_bytes > self.most_bytes:
            if self._known:
                self._forget(next(iter(self._known)))
                continue
            in_files = [key for key, named in self._named.items() if named.stamp]
            if not in_files:
                return False
            del self._named[in_files[0]]
        return True

    # Under names.

    def save(self, owner: str, name: str, snapshot: Snapshot, data: bytes | None = None) -> None:
        """Keep a state under a name, in place of an older one. Raises `StoreFull`, `OSError`.

        `data`: its file, where that is there already.
        """
        stamp, path = None, self._path(owner, name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data or self._pack(snapshot))
            stamp = _stamp(path)
        with self._lock:
            self._named.pop((owner, name), None)
            if self._make_room():
                self._named[owner, name] = _Named(snapshot, stamp)
            elif stamp is None:
                raise StoreFull(
                    f"the named states take {self.num_bytes:,} of {self.most_bytes:,} bytes of "
                    f"memory: delete some, or start the server with --state-dir or a larger "
                    f"--state-cache"
                )

    def put(self, owner: str, name: str, data: bytes) -> Snapshot:
        """Keep a state that comes as a file. Raises `StateError` for what is none of the model."""
        snapshot = self._unpack(data, "the file")
        self.save(owner, name, snapshot, data)
        return snapshot

    def load(self, owner: str, name: str) -> Snapshot | None:
        """A named state; None if there is none. Raises `StateError` for a file that is none."""
        path = self._path(owner, name)
        stamp = _stamp(path) if path else None
        with self._lock:
            named = self._named.get((owner, name))
            if named is not None and named.stamp == stamp:
                self._named.move_to_end((owner, name))
                return named.snapshot
            self._named.pop((owner, name), None)  # another process has replaced or deleted it
        if path is None or stamp is None:
            return None
        snapshot = self._unpack(path.read_bytes(), f"the state {name}")
        with self._lock:
            if self._make_room():
                self._named[owner, name] = _Named(snapshot, stamp)
        return snapshot

    def data(self, owner: str, name: str) -> bytes | None:
        """The content of the file of a named state; None if there is none."""
        path = self._path(owner, name)
        if path is not None:
            return path.read_bytes() if path.is_file() else None
        snapshot = self.load(owner, name)
        return None if snapshot is None else self._pack(snapshot)

    def delete(self, owner: str, name: str) -> bool:
        """Whether there was such a state."""
        with self._lock:
            there = self._named.pop((owner, name), None) is not None
        path = self._path(owner, name)
        if path is not None and path.is_file():
            path.unlink(missing_ok=True)
            there = True
        return there

    def names(self, owner: str) -> list[str]:
        """The names of an owner's states."""
        with self._lock:
            found = {name for o, name in self._named if o == owner}
        if self._folder is not None:
            folder = self._folder / (owner or "all")
            found = {path.stem for path in folder.glob(f"*{SUFFIX}") if path.is_file()}
        return sorted(name for name in found if re.fullmatch(NAME, name))

    def _path(self, owner: str, name: str) -> Path | None:
        """The file of a state. Names have been checked: they are no paths."""
        if self._folder is None:
            return None
        if not re.fullmatch(NAME, name):
            raise UserError(f"the name of a state is {name!r}: use letters, digits, _ and -")
        return self._folder / (owner or "all") / f"{name}{SUFFIX}"


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _digests(tokens: Sequence[int], lengths: Sequence[int]) -> dict[int, bytes]:
    """Hashes of the first so many tokens, for lengths that rise."""
    array = np.asarray(tokens, np.int32)
    running, done, found = hashlib.blake2b(digest_size=16), 0, {}
    for length in lengths:
        running.update(array[done:length].tobytes())
        done = length
        found[length] = running.copy().digest()
    return found
