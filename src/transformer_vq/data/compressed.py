"""Files open for reading, decompressed as their names say, in bounded memory.

What is wrong with a file, or with its compression, is a `DataError` that names it.
"""

import io
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from transformer_vq.data.text import DataError
from transformer_vq.errors import to_install

_ZST_INPUT = 1 << 11  # bytes given to zstd at once: its blocks hold up to 32,768 times as many
_CHUNK = 1 << 20
_ARCHIVES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar")
_OTHERS = (".z", ".lz", ".lz4", ".lzo", ".br")  # compressed in ways that we do not read
# How files begin that hold something else than their bytes; the longest of the same first.
_BEGINNINGS = (
    (b"\xff\xfe\0\0", "text in UTF-32"),
    (b"\0\0\xfe\xff", "text in UTF-32"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
    (b"\x1f\x8b\x08", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\0", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x04\x22\x4d\x18", "an lz4 file"),
    (b"\x1f\x9d", "a file of compress"),
    (b"PAR1", "a parquet table"),
    (b"ARROW1", "an Arrow table"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"SQLite format 3\0", "a database of SQLite"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"\0\0\x01\0", "an icon"),
    (b"\0\0\x08\x01", "labels in IDX"),
    (b"RIFF", "a recording or a picture"),
    (b"%PDF-", "a PDF"),
    (b"{\\rtf", "a document in RTF"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old document of an office program"),
    (b"\x7fELF", "a program"),
)
_WITHIN = ((4, b"ftyp", "a HEIC picture or a film"), (257, b"ustar", "a tar archive"))
LOOKED_AT = 512  # bytes at the beginning of a file, to tell


class ReadError(DataError):
    """A file cannot be read: `reason`. `broken_off`: it is compressed, and ends too soon."""

    def __init__(self, path: Path, error: Exception, broken_off: bool = False):
        self.reason = _reason(error)
        self.broken_off = broken_off
        super().__init__(f"cannot read {path}: {self.reason}")


class MissingLibrary(DataError):
    """What is needed to read a file is not installed."""


def is_compressed(path: Path) -> bool:
    """Whether its name says that it is compressed, in a way that is read here."""
    return path.suffix.lower() in _OPENERS


def bare_name(path: Path) -> str:
    """The name in small letters, without what says how it is compressed; of a .zip, that inside."""
    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                return Path(_only_member(path, archive).filename).name.lower()
        except Exception:  # damaged: that shows when it is read
            pass
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if is_compressed(path) else name


def what_it_is(content: bytes) -> str:
    """What the first bytes of a file say that it is, with its article; nothing if nothing."""
    found = (name for start, name in _BEGINNINGS if content.startswith(start))
    within = (name for at, mark, name in _WITHIN if content.startswith(mark, at))
    return next(found, "") or next(within, "")


def open_binary(path: Path) -> BinaryIO:
    """A file open for reading, decompressed as its name says, in small or in capital letters.

    Raises `DataError` if it cannot be opened, and is never kept waiting by a pipe or a device.
    What is wrong inside shows when it is read: as `ReadError`, or as `OSError` of a plain file.
    """
    _require_file(path)
    opener = _OPENERS.get(path.suffix.lower())
    try:
        if opener is None:
            return path.open("rb")
        return cast(BinaryIO, io.BufferedReader(_Decompressed(path, opener(path)), _CHUNK))
    except DataError:
        raise
    except Exception as error:  # also of a library that does not know what it is given
        raise ReadError(path, error) from None


def read_bytes(
    path: Path,
    *,
    max_bytes: int | None = None,
    on_break: Callable[[DataError], None] | None = None,
) -> np.ndarray:
    """All that a file holds, uint8 `[N]`, read-only; a plain file is mapped and not read.

    Args:
      max_bytes: raises `DataError` for more. By default what is decompressed may take half of the
        memory that is free, and a plain file is of any size.
      on_break: takes the error of a compressed file that breaks off; what came before is returned.
    """
    size = _require_file(path).st_size
    way = "decompress it and give that file" if max_bytes is None else "give a smaller one"
    if not is_compressed(path):
        if max_bytes is not None and size > max_bytes:
            raise _too_large(path, max_bytes, way)
        try:  # an empty file cannot be mapped
            return np.asarray(np.memmap(path, np.uint8, mode="r")) if size else _array(b"")
        except (OSError, ValueError) as error:
            raise ReadError(path, error) from None
    content = bytearray()
    if not size:  # nothing, however it is compressed
        return _array(content)
    limit = free_memory() // 2 if max_bytes is None else max_bytes
    try:
        with open_binary(path) as file:
            while chunk := cast(Any, file).read1(_CHUNK):
                content += chunk
                if len(content) > limit:
                    raise _too_large(path, limit, way)
    except MemoryError:
        raise _too_large(path, len(content), way) from None
    except ReadError as error:
        if not (error.broken_off and on_break):
            raise
        on_break(error)
    return _array(content)


def load_bytes(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    on_break: Callable[[DataError], None] | None = None,
) -> np.ndarray:
    """`read_bytes` of any file that is not empty: bytes, uint8 `[N]`, read-only.

    A plain file is mapped, not read: it costs no memory and no time, and must not change
    underneath. Raises `DataError` if the file is missing, empty, unreadable or not a file.
    """
    data = read_bytes(Path(path), max_bytes=max_bytes, on_break=on_break)
    if not data.size:
        raise DataError(f"{path} is empty: give a file with data in it")
    return data


def free_memory() -> int:
    """Bytes that this process can still take, as far as the system says."""
    return max(min(_limits(), default=2**62), 0)


def _limits() -> Iterator[int]:
    with suppress(ImportError, OSError, ValueError):  # of the process (ulimit -v)
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if limit >= 0:
            yield limit - used
    with suppress(OSError, ValueError, KeyError):  # of the machine
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) << 10
    for limit, used in _CONTROL_GROUPS:  # of a container
        with suppress(OSError, ValueError):
            yield int(Path(limit).read_text()) - int(Path(used).read_text())
    with suppress(AttributeError, OSError, ValueError):  # of other systems
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def _array(content: bytes | bytearray) -> np.ndarray:
    data = np.frombuffer(content, np.uint8)
    data.flags.writeable = False
    return data


def _require_file(path: Path) -> os.stat_result:
    """Raises `DataError` for what is no file, or one of an archive that has to be unpacked."""
    try:
        info = path.stat()
    except FileNotFoundError:
        gone = f": it is a link to {path.readlink()}" if path.is_symlink() else ""
        raise DataError(f"there is no file {path}{gone}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ReadError(path, error) from None
    if stat.S_ISDIR(info.st_mode):
        raise DataError(f"{path} is a directory: give a file")
    if not stat.S_ISREG(info.st_mode):  # opening a pipe or a device could wait for ever
        raise DataError(f"{path} is not a regular file: copy its content to one")
    names = {path.suffix.lower(), Path(bare_name(path)).suffix}
    if names & set(_ARCHIVES):
        raise DataError(f"{path} is an archive: unpack it, and give the folder that it makes")
    if names & set(_OTHERS):
        raise DataError(
            f"{path} is compressed in a way that is not read here: decompress it, or compress it "
            f"as .gz, .bz2, .xz or .zst"
        )
    return info


def _too_large(path: Path, size: int, way: str) -> DataError:
    return DataError(f"{path} holds more than {size:,} bytes, too much for the memory: {way}")


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "the memory does not suffice"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(str(text).split())
    return text if len(text) < 200 else f"{text[:197]}..."


# What decompresses. Each opener gives something with `read1(size)` and `close`.


class _Decompressed(io.RawIOBase):
    """What a library makes of a compressed file. All that it raises becomes a `ReadError`."""

    def __init__(self, path: Path, file: Any) -> None:
        self.name, self._path, self._file = str(path), path, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._file.read1(len(buffer))  # what comes before a break is not lost
        except Exception as error:
            raise ReadError(self._path, error, isinstance(error, EOFError)) from None
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _ZstdFile:
    """The content of a `.zst`, all frames of it. Raises `EOFError` where a frame is cut short.

    The library's own reader takes such an end for that of the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            from zstandard import ZstdDecompressor
        except ImportError:
            raise MissingLibrary(
                f"{path} needs zstandard to be read: {to_install('text')}"
            ) from None
        self._new_frame = ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def read1(self, size: int) -> memoryview:
        while not self._content:
            self._compressed = self._compressed or self._file.read(_ZST_INPUT)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends within a frame")
                break
            self._frame = self._frame or self._new_frame()
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        head, self._content = self._content[:size], self._content[size:]
        return head

    def close(self) -> None:
        self._file.close()


class _ZipFile:
    """The one file in a `.zip`."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        try:
            self._file = self._archive.open(_only_member(path, self._archive))
        except BaseException:
            self._archive.close()
            raise
        self.read1 = cast(Any, self._file).read1

    def close(self) -> None:
        self._file.close()
        self._archive.close()


def _only_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Raises `DataError` unless an archive holds one file, not counting hidden ones."""

    def shown(name: str) -> bool:
        return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))

    members = [one for one in archive.infolist() if not one.is_dir() and shown(one.filename)]
    if len(members) != 1:
        raise DataError(
            f"{path} holds {len(members):,} files, and only a .zip of one is read: unpack it, and "
            f"give the folder"
        )
    if Path(members[0].filename).suffix.lower() in (*_OPENERS, *_ARCHIVES, *_OTHERS):
        raise DataError(f"{path} holds {members[0].filename}, which is packed too: unpack it")
    return members[0]


def _gzip(path: Path) -> Any:
    import gzip

    return gzip.open(path)


def _bz2(path: Path) -> Any:
    import bz2

    return bz2.open(path)


def _lzma(path: Path) -> Any:
    import lzma

    return lzma.open(path)


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": _gzip,
    ".gzip": _gzip,
    ".bz2": _bz2,
    ".xz": _lzma,
    ".lzma": _lzma,
    ".zst": _ZstdFile,
    ".zstd": _ZstdFile,
    ".zip": _ZipFile,
}
