"""Bytes in chunks, and their split into train, validation and test."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from transformer_vq.errors import UserError

# Where a split begins and ends, in hundredths of the data: the customary 90/5/5 of enwik8.
SPLITS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100), "all": (0, 100)}


class DataError(UserError):
    """The data cannot be used; the message is one sentence that says why and what to do."""


def bundled_corpus() -> Path:
    """The corpus that ships with the package: Moby-Dick, 1.2 MB of UTF-8, CC0."""
    return Path(__file__).with_name("moby-dick.txt")


def text_pieces(file: BinaryIO, size: int = 1 << 20) -> Iterator[bytes]:
    """What a file holds, in pieces that end with a line, or at least not within a character.

    Raises `DataError` for what cannot be read.
    """
    waiting = b""
    while True:
        try:
            block = file.read(size - len(waiting))
        except OSError as error:  # of a compressed file it is a `DataError` already
            name = getattr(file, "name", "the file")
            raise DataError(f"cannot read {name}: {error.strerror or error}") from None
        waiting += block
        if len(waiting) < size:  # all of it
            break
        end = waiting.rfind(b"\n") + 1 or whole_characters(waiting) or len(waiting)
        yield waiting[:end]
        waiting = waiting[end:]
    if waiting:
        yield waiting


def whole_characters(content: bytes) -> int:
    """The end of the content, or where the last UTF-8 character begins if it is not whole."""
    for back in range(1, min(3, len(content)) + 1):
        byte = content[-back]
        if byte & 0xC0 != 0x80:
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0) if byte >= 0xC0 else 1
            return len(content) - (back if length > back else 0)
    return len(content)


def split(tokens: np.ndarray, name: str) -> np.ndarray:
    """The part of `tokens` `[N]` called train, validation, test or all: a view, by position.

    Raises `DataError` for another name.
    """
    if name not in SPLITS:
        raise DataError(f"unknown split {name!r}: the splits are {', '.join(SPLITS)}")
    start, stop = (len(tokens) * percent // 100 for percent in SPLITS[name])
    return tokens[start:stop]


def require_length(tokens: np.ndarray, sequence_len: int, name: str = "the data") -> None:
    """Raises `DataError` unless `tokens` holds something to predict, and something before it.

    Fewer than a sequence are padded. `name` says whose tokens they are, for the message: "the train
    split of book.txt".
    """
    if len(tokens) < 2:
        raise DataError(
            f"{name} has {len(tokens)} of the {sequence_len + 1:,} tokens that a sequence of "
            f"{sequence_len:,} needs, and two are the least: use a larger file"
        )


def fingerprint(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes, in hex: for a plain file, what `sha256sum` prints."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
