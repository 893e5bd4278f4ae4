"""Files as arrays of bytes, and their split into train, validation and test."""

import gzip
import hashlib
import io
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from transformer_vq.errors import UserError

# Where a split begins and ends, in hundredths of the data: the customary 90/5/5 of enwik8.
SPLITS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100), "all": (0, 100)}


class DataError(UserError):
    """The data cannot be used; the message is one sentence that says why and what to do."""


def bundled_corpus() -> Path:
    """The corpus that ships with the package: Moby-Dick, 1.2 MB of UTF-8, CC0."""
    return Path(__file__).with_name("moby-dick.txt")


def load_bytes(path: str | Path) -> np.ndarray:
    """The bytes of any file, uint8 `[N]`, read-only; `.gz` and `.zst` are decompressed.

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
        elif path.suffix == ".zst":
            with open_binary(path) as file:
                data = np.frombuffer(file.read(), np.uint8)
        elif info.st_size:
            data = np.asarray(np.memmap(path, np.uint8, mode="r"))
        else:
            data = np.zeros(0, np.uint8)  # an empty file cannot be mapped
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except read_errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None
    if not data.size:
        raise DataError(f"{path} is empty: give a file with data in it")
    return data


def open_binary(path: Path) -> BinaryIO:
    """A file open for reading, decompressed as its name says (`.gz`, `.zst`).

    Raises `DataError` if it cannot be opened. What is wrong inside shows when it is read, as one of
    `read_errors()`.
    """
    try:
        if path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(path))
        if path.suffix == ".zst":
            return cast(BinaryIO, io.BufferedReader(_ZstdFile(path), 1 << 20))
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def text_pieces(file: BinaryIO, size: int = 1 << 20) -> Iterator[bytes]:
    """What a file holds, in pieces that end with a line, or at least not within a character.

    Raises `DataError` for what cannot be read.
    """
    waiting = b""
    while True:
        try:
            block = file.read(size - len(waiting))
        except read_errors() as error:
            name = getattr(file, "name", "the file")
            raise DataError(f"cannot read {name}: {error}") from None
        waiting += block
        if len(waiting) < size:  # all of it
            break
        end = waiting.rfind(b"\n") + 1 or _whole_characters(waiting)
        yield waiting[:end]
        waiting = waiting[end:]
    if waiting:
        yield waiting


def _whole_characters(content: bytes) -> int:
    """The end of the content, or where the last UTF-8 character begins if it is not whole."""
    for back in range(1, min(4, len(content))):
        byte = content[-back]
        if byte & 0xC0 != 0x80:
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0) if byte >= 0xC0 else 1
            return len(content) - (back if length > back else 0)
    return len(content)


def read_errors() -> tuple[type[Exception], ...]:
    """What reading a file raises when it is damaged."""
    try:
        from zstandard import ZstdError
    except ImportError:
        return OSError, EOFError, zlib.error
    return OSError, EOFError, zlib.error, ZstdError


class _ZstdFile(io.RawIOBase):
    """The content of a `.zst`, all frames of it. Raises `EOFError` where a frame is cut short.

    The library's own reader takes such an end for that of the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            from zstandard import ZstdDecompressor
        except ImportError:
            raise DataError(
                f"{path} needs zstandard to be read: pip install 'transformer-vq[text]'"
            ) from None
        self._new_frame = ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._compressed = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._compressed = self._compressed or self._file.read(1 << 20)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends within a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._content = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


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
