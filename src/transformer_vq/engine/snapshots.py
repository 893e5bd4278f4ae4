"""Snapshots as the content of state files, which `load_state` reads too."""

import functools
import json

import numpy as np

from transformer_vq.engine.scheduler import Snapshot
from transformer_vq.io.state import StateError, model_hash, pack_state, unpack_state
from transformer_vq.nn.model import Model


class SnapshotFiles:
    """To bytes and back, for one model. From any thread."""

    def __init__(self, model: Model):
        self._model = model

    @functools.cached_property
    def digest(self) -> str:
        """What tells the model from all others."""
        return model_hash(self._model)

    def pack(self, snapshot: Snapshot) -> bytes:
        """The content of a state file; what penalties count is in its notes."""
        counts = {int(t): int(snapshot.counts[t]) for t in np.flatnonzero(snapshot.counts)}
        notes = {
            "seen": json.dumps(np.flatnonzero(snapshot.seen).tolist()),
            "counts": json.dumps(counts),
        }
        return pack_state(snapshot.state, self._model, digest=self.digest, notes=notes)

    def unpack(self, data: bytes, name: str) -> Snapshot:
        """The inverse. A file of another command has nothing that penalties count.

        Raises `StateError` as `load_state` does, or if it holds several sequences.
        """
        state, notes = unpack_state(data, self._model, digest=self.digest, name=name)
        if len(state.position) != 1:
            raise StateError(f"{name} holds {len(state.position)} sequences: one is needed")
        vocab_size = self._model.config.vocab_size
        seen, counts = np.zeros(vocab_size, bool), np.zeros(vocab_size, np.int32)
        try:
            seen[json.loads(notes.get("seen", "[]"))] = True
            for token, count in json.loads(notes.get("counts", "{}")).items():
                counts[int(token)] = count
        except (ValueError, IndexError, TypeError, AttributeError, OverflowError):
            raise StateError(f"{name} is damaged: make it again") from None
        return Snapshot(state, seen, counts)
