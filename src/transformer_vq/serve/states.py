"""States that are kept: after known prompts, and under names. In memory, and in files."""

import contextlib
import os
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformer_vq.atomic import write_whole
from transformer_vq.data.tokenizer import Tokens
from transformer_vq.engine.scheduler import Snapshot
from transformer_vq.errors import UserError
from transformer_vq.serve.hashes import Hashed
from transformer_vq.serve.prompts import Key, PromptFiles
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
      prompts: files for states after known prompts, which memory has no room for.

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
        prompts: PromptFiles | None = None,
    ):
        self.row_bytes, self.most_bytes, self._folder = row_bytes, most_bytes, folder
        self.grid, self._pack, self._unpack = grid, pack, unpack
        self._prompts = prompts
        self._known: OrderedDict[tuple[str, bytes], Known] = OrderedDict()
        self._lengths: Counter[tuple[str, int]] = Counter()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._named: OrderedDict[tuple[str, str], _Named] = OrderedDict()
        self._lock = threading.RLock()
        if folder is not None:
            _remove_drafts(folder)

    @property
    def num_bytes(self) -> int:
        """Of all snapshots in memory."""
        return (len(self._known) + len(self._named)) * self.row_bytes

    # After known prompts.

    def find(self, owner: str, tokens: Tokens | Hashed, mode: CacheMode) -> Known | None:
        """The state of the longest known prefix of a prompt.

        With `exact`, only one that reading the prompt itself would give: it changes no bit.
        """
        if mode == "off":
            return None
        prompt = Hashed.of(tokens)
        with self._lock:
            lengths = sorted(n for o, n in self._lengths if o == owner and n <= len(prompt))
        digests = prompt.digests(lengths)  # a prompt may be long, and others ask, too
        with self._lock:
            for length in reversed(lengths):
                key = owner, digests[length]
                found = self._known.get(key)
                if found is None:
                    continue
                if self._serves(mode, found.exact, length, len(prompt)):
                    self._known.move_to_end(key)
                    return found
        return None

    def _serves(self, mode: CacheMode, exact: bool, length: int, whole: int) -> bool:
        """Whether a state after so many tokens of a prompt, which has so many, may be used."""
        on_grid = length % self.grid == 0 or length == whole
        return mode == "any" or (exact and on_grid)

    @property
    def in_files(self) -> bool:
        """Whether states after known prompts may be in files, which `fetch` reads."""
        return self._prompts is not None

    def fetch(self, owner: str, tokens: Tokens | Hashed, mode: CacheMode) -> None:
        """Have in memory what `find` would find if files counted."""
        if self._prompts is None or mode == "off":
            return
        prompt = Hashed.of(tokens)
        known = self.find(owner, prompt, mode)
        least = known.length if known else 0
        lengths = [n for n in self._prompts.lengths(owner) if least < n <= len(prompt)]
        digests = prompt.digests(lengths)
        for length in reversed(lengths):
            key = Key(owner, length, digests[length])
            exact = self._prompts.exact(key)
            if exact is None or not self._serves(mode, exact, length, len(prompt)):
                continue
            if snapshot := self._prompts.read(key):
                self.keep(owner, prompt, snapshot, exact=exact, length=length)
                return

    def close(self) -> None:
        """Write what is known of prompts to files, as far as there is room; it takes a while."""
        if self._prompts is not None:
            self._prompts.wait()
            with self._lock:
                room = self._prompts.most_bytes // self.row_bytes
                newest = list(self._known.items())[max(0, len(self._known) - room) :]
            for (owner, digest), known in newest:
                self._prompts.write(Key(owner, known.length, digest), known.snapshot, known.exact)

    def worth_keeping(self, owner: str, tokens: Tokens | Hashed, known: int) -> frozenset[int]:
        """After how many tokens of this prompt, of which some are known, to keep its state.

        At its end; at the last end of a chunk, from which a longer prompt goes on; and where
        prompts part: at the last end of a chunk that another prompt has had.
        """
        prompt = Hashed.of(tokens)
        ends = {len(prompt)}
        if known % self.grid == 0:
            grid = list(range(known + self.grid, len(prompt) + 1, self.grid))
            digests = prompt.digests(grid)
            with self._lock:
                ends |= set(grid[-1:])
                ends |= set([n for n in grid if owner.encode() + digests[n] in self._seen][-1:])
                for n in grid:
                    self._seen[owner.encode() + digests[n]] = None
                while len(self._seen) > MOST_SEEN:
                    self._seen.popitem(last=False)
        return frozenset(ends)

    def keep(
        self,
        owner: str,
        tokens: Tokens | Hashed,
        snapshot: Snapshot,
        *,
        exact: bool,
        length: int | None = None,
    ) -> None:
        """Remember the state after these tokens, or the first `length` of them."""
        prompt = Hashed.of(tokens)
        length = len(prompt) if length is None else length
        key = owner, prompt.digest(length)
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
                oldest = next(iter(self._known))
                if self._prompts is not None:
                    known = self._known[oldest]
                    key = Key(oldest[0], known.length, oldest[1])
                    self._prompts.put(key, known.snapshot, known.exact)
                self._forget(oldest)
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
            stamp = _stamp(write_whole(path, data or self._pack(snapshot), shared=True))
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
        stamp = _stamp(_found(path))
        with self._lock:
            named = self._named.get((owner, name))
            if named is not None and named.stamp == stamp:
                self._named.move_to_end((owner, name))
                return named.snapshot
            self._named.pop((owner, name), None)  # another process has replaced or deleted it
        if path is None or stamp is None:
            return None
        data = _content(path)
        if data is None:
            return None
        snapshot = self._unpack(data, f"the state {name}")
        with self._lock:
            if self._make_room():
                self._named[owner, name] = _Named(snapshot, stamp)
        return snapshot

    def data(self, owner: str, name: str) -> bytes | None:
        """The content of the file of a named state; None if there is none."""
        path = self._path(owner, name)
        if path is not None:
            return _content(path)
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


def _found(path: Path | None) -> os.stat_result | None:
    """What the system says of a file; None if there is none."""
    try:
        return os.stat(path) if path else None
    except OSError:
        return None


def _stamp(found: os.stat_result | None) -> tuple[int, int] | None:
    """What is another one when a file is replaced."""
    return (found.st_mtime_ns, found.st_ino) if found else None


def _content(path: Path) -> bytes | None:
    """What is in a file; None if there is none, or none any more."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _remove_drafts(folder: Path) -> None:
    """Remove what processes that were killed have not finished, an hour after."""
    for draft in folder.glob(f"*/.*{SUFFIX}.*.new"):
        with contextlib.suppress(OSError):  # another process removes it, too
            if time.time() - draft.stat().st_mtime > 3600:
                draft.unlink()
