"""Hashes of the beginnings of a text, by which states of known prompts are found. No JAX here."""

import bisect
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from transformer_vq.data.tokenizer import Tokens

APART = 1 << 16  # tokens after which the hash so far is kept: other lengths go on from there


class Hashed:
    """Tokens, and hashes of so many of the first of them, each made once: there may be millions."""

    def __init__(self, tokens: Tokens):
        self.tokens = np.asarray(tokens, np.int32)
        self._known: dict[int, bytes] = {}
        self._ends = [0]  # rising; the hash after so many tokens
        self._states: list[Any] = [hashlib.blake2b(digest_size=16)]
        self._last = 0, self._states[0]  # where the last one ended

    @classmethod
    def of(cls, tokens: "Tokens | Hashed") -> "Hashed":
        """The same, if it is that already."""
        return tokens if isinstance(tokens, Hashed) else cls(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self, length: int) -> bytes:
        """The hash of the first so many tokens."""
        if length not in self._known:
            self._known[length] = self._state(length).digest()
        return self._known[length]

    def digests(self, lengths: Iterable[int]) -> dict[int, bytes]:
        """The hash of each of these lengths, which rise."""
        return {length: self.digest(length) for length in lengths}

    def followed_by(self, tokens: Tokens) -> "Hashed":
        """These tokens and more."""
        more = np.asarray(tokens, np.int32)
        found = Hashed(np.concatenate([self.tokens, more]))
        self._state(len(self))
        found._known = dict(self._known)
        found._ends, found._states = [*self._ends], [*self._states]
        return found

    def _state(self, length: int) -> Any:
        """The hash after the first so many tokens, which may be gone on from a copy of."""
        at = bisect.bisect_right(self._ends, length) - 1
        kept = self._ends[at], self._states[at]
        near = self._last if kept[0] < self._last[0] <= length else kept
        state = near[1].copy()
        state.update(self.tokens[near[0] : length].tobytes())
        if length - kept[0] >= APART or (length == len(self) != kept[0]):
            self._ends.insert(at + 1, length)
            self._states.insert(at + 1, state)
        self._last = length, state
        return state
