"""Files as arrays of bytes, and their split into train, validation and test."""

import gzip
import hashlib
import stat
import zlib
from pathlib import Path

import numpy as np

# Where a split begins and ends, in hundredths of the data: the customary 90/5/5 of enwik8.
SPLITS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100), "all": (0, 100)}


class DataError(ValueError):
    """The data cannot be used; the message is one sentence that says why and what to do."""


def bundled_corpus() -> Path:
    """The corpus that ships with the package: Moby-Dick, 1.2 MB of UTF-8, CC0."""
    return Path(__file__).with_name("moby-dick.txt")


def load_bytes(path: str | Path) -> np.ndarray:
    """The bytes of any file, uint8 `[N]`, read-only; `.gz` is decompressed.

    A plain file is mapped, not read: it costs no memory and no time, and must not change
    underneath. Raises `DataError` if the file is missing, empty, unreadable or not a file.
    """
    path = Path(path)
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise DataError(f"{path} is a directory: give a file")
        if not stat.S_ISREG(info.st_mode):  # opening a pipe or a device could wait for ever
            raise DataError(f"{path} is not a regular file: copy its content to one")
        if path.suffix == ".gz":
            data = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
        elif info.st_size:
            data = np.asarray(np.memmap(path, np.uint8, mode="r"))
        else:
            data = np.zeros(0, np.uint8)  # an empty file cannot be mapped
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None
    if not data.size:
        raise DataError(f"{path} is empty: give a file with data in it")
    return data


def split(tokens: np.ndarray, name: str) -> np.ndarray:
    """The part of `tokens` `[N]` called train, validation, test or all: a view, by position.

    Raises `DataError` for another name.
    """
    if name not in SPLITS:
        raise DataError(f"unknown split {name!r}: the splits are {', '.join(SPLITS)}")
    start, stop = (len(tokens) * percent // 100 for percent in SPLITS[name])
    return tokens[start:stop]


def require_length(tokens: np.ndarray, sequence_len: int, name: str = "the data") -> None:
    """Raises `DataError` unless `tokens` holds one training sequence, its last target included.

    `name` says whose tokens they are, for the message: "the train split of book.txt".
    """
    size = len(tokens)
    if size > sequence_len:
        return
    shorter = f"--train.sequence-len {size - 1} or less, or " if size > 1 else ""
    raise DataError(
        f"{name} has {size:,} of the {sequence_len + 1:,} tokens that a sequence of "
        f"{sequence_len:,} needs: use {shorter}a larger file"
    )


def fingerprint(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes, in hex: for a plain file, what `sha256sum` prints."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
