"""Files to documents: what a path holds, and the texts in it, one at a time.

A file is a document; a line of a .jsonl and a row of a .parquet are documents too. Any of them may
be compressed (.gz, .zst). What is broken is named with its file and line.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transformer_vq.data.text import DataError, load_bytes, open_binary, read_errors

SPLIT_FOLDERS = ("train", "validation", "test")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_LINES = (".jsonl", ".ndjson")
_TABLES = (".parquet",)
_IMAGE_ARRAYS = re.compile(r"idx[34]-ubyte(\.gz|\.zst)?$|\.npz$")
# Arrays of pictures say in their names what they are for: train-images-idx3-ubyte, val_data.npz.
_ARRAY_SPLITS = (("train", "train"), ("val", "validation"), ("test", "test"), ("t10k", "test"))
_NEWLINE_SEARCH = 1 << 24  # bytes checked at once

Document = bytes | np.ndarray  # uint8 [N]


@dataclass(frozen=True)
class Files:
    """The files that some paths name, in the order in which they are read."""

    splits: dict[str, tuple[Path, ...]]  # by train, validation, test; "" if they are yet to be cut
    images: bool
    left_out: tuple[Path, ...]  # what is neither a text among texts nor a picture among pictures

    @property
    def all(self) -> list[Path]:
        return [path for paths in self.splits.values() for path in paths]


def find_files(paths: Sequence[str | Path]) -> Files:
    """What is in files and folders; folders with all that is below them, in sorted order.

    The folders train, validation and test in a folder are its splits, as PG-19 has them; and so
    are arrays of pictures with such names. Hidden files are not looked at. A folder holds pictures
    if it has an array of them, or if most of its files are pictures.

    Raises `DataError` for a path that is not there, a folder without files, and for splits that
    only a part of the data has.
    """
    found: list[tuple[str, Path]] = []
    left_out: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(("", path))
            continue
        below = [file for file in sorted(path.rglob("*")) if _is_shown(file, path)]
        if not below:
            raise DataError(f"{path} is a directory without files: give one that has some")
        if (path / "train").is_dir() and any((path / n).is_dir() for n in SPLIT_FOLDERS[1:]):
            parts = [(file.relative_to(path).parts[0], file) for file in below]
            found += [part for part in parts if part[0] in SPLIT_FOLDERS]
            left_out += [file for name, file in parts if name not in SPLIT_FOLDERS]
        else:
            found += [("", file) for file in below]
    arrays = any(is_image_array(file) for _, file in found)
    images = arrays or 2 * sum(is_picture(file) for _, file in found) > len(found)
    left_out += [file for _, file in found if is_image(file) != images]
    found = [(name, file) for name, file in found if is_image(file) == images]
    if arrays:
        found = _named_splits(found)
    splits = {
        name: tuple(file for given, file in found if given == name)
        for name in ("", *SPLIT_FOLDERS)
        if any(given == name for given, _ in found)
    }
    if "" in splits and len(splits) > 1:
        raise DataError(
            f"{splits[''][0]} belongs to no split, and other data has its own splits: train on "
            f"one or the other"
        )
    return Files(splits, images, tuple(left_out))


def is_picture(path: Path) -> bool:
    """Whether its name is that of a PNG, a JPEG or the like."""
    return path.suffix.lower() in PICTURES


def is_image_array(path: Path) -> bool:
    """Whether its name is that of many pictures in one file: IDX or npz."""
    return bool(_IMAGE_ARRAYS.search(path.name.lower()))


def is_image(path: Path) -> bool:
    """Whether its name is that of one picture or of many."""
    return is_picture(path) or is_image_array(path)


def is_text_file(path: Path) -> bool:
    """Whether all of it is one document."""
    return not (is_image(path) or _bare(path).endswith((*_LINES, *_TABLES)))


def read_documents(
    path: Path, text_column: str, *, as_text: bool
) -> Iterator[tuple[str, Document | DataError]]:
    """The documents of a file and where each is from; for a broken one, the error instead of it.

    `as_text`: a document that is not UTF-8 is broken. Missing files raise `DataError`.
    """
    name = _bare(path)
    if name.endswith(_LINES):
        documents = _lines(path, text_column)
    elif name.endswith(_TABLES):
        documents = _rows(path, text_column)
    else:
        documents = _whole(path)
    for where, document in documents:
        if as_text and not isinstance(document, DataError):
            bad = _not_text(document)
            if bad is not None:
                document = DataError(
                    f"{where} is not UTF-8 at byte {bad:,}, and this tokenizer reads text: "
                    f"convert it, or train on bytes"
                )
        yield where, document


def _whole(path: Path) -> Iterator[tuple[str, Document | DataError]]:
    if not path.exists():
        raise DataError(f"there is no file {path}")
    if path.is_file() and not path.stat().st_size:
        yield str(path), b""
        return
    try:
        yield str(path), load_bytes(path)
    except DataError as error:
        yield str(path), error


def _lines(path: Path, column: str) -> Iterator[tuple[str, Document | DataError]]:
    number = 0
    with open_binary(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number:,}"
                    yield where, _text_of(where, line, column)
        except read_errors() as error:
            yield str(path), DataError(f"cannot read {path} after line {number:,}: {error}")


def _text_of(where: str, line: bytes, column: str) -> bytes | DataError:
    try:
        record = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        reason = getattr(error, "msg", None) or str(error)
        return DataError(f"{where} is not JSON: {reason}")
    if not isinstance(record, dict):
        return DataError(f"{where} is a JSON {type(record).__name__}, not an object")
    if column not in record:
        keys = ", ".join(map(repr, record)) or "nothing"
        return DataError(f"{where} has no {column!r}: it has {keys} (choose with --text-column)")
    return _encoded(where, record[column], column)


def _encoded(where: str, text: object, column: str) -> bytes | DataError:
    if not isinstance(text, str):
        return DataError(f"{where} has {column!r} {_short(text)}, which is no text")
    try:
        return text.encode()
    except UnicodeEncodeError:
        return DataError(f"{where} holds half a surrogate pair, which is no text")


def _rows(path: Path, column: str) -> Iterator[tuple[str, Document | DataError]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path} needs pyarrow to be read: pip install 'transformer-vq[parquet]'"
        ) from None
    if not path.exists():
        raise DataError(f"there is no file {path}")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if column not in columns:
                has = ", ".join(map(repr, columns))
                error = f"{path} has no column {column!r}: it has {has} (choose with --text-column)"
                yield str(path), DataError(error)
                return
            for batch in file.iter_batches(1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    where = f"{path}, row {number:,}"
                    if isinstance(text, bytes):  # a binary column
                        yield where, text
                    else:
                        yield where, _encoded(where, text, column)
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        yield str(path), DataError(f"cannot read {path} after row {number:,}: {reason}")


def _not_text(document: Document) -> int | None:
    """Where the first byte is that is not UTF-8; None if all is."""
    start, carry = 0, b""
    while start < len(document):
        piece = carry + bytes(document[start : start + _NEWLINE_SEARCH])
        begin = start - len(carry)
        start += _NEWLINE_SEARCH
        try:
            piece.decode()
            carry = b""
        except UnicodeDecodeError as error:
            cut = error.reason == "unexpected end of data" and start < len(document)
            if not cut:
                return begin + error.start
            carry = piece[error.start :]
    return None


def _named_splits(found: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Splits from the names of arrays, if they name train and something else."""

    def named(given: str, path: Path) -> str:
        matches = (split for start, split in _ARRAY_SPLITS if path.name.lower().startswith(start))
        return given or next(matches, "")

    names = [(named(given, path), path) for given, path in found]
    splits = {name for name, _ in names}
    return names if "train" in splits and len(splits) > 1 and "" not in splits else found


def _is_shown(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and not file.is_dir()


def _bare(path: Path) -> str:
    """The name without what says how it is compressed."""
    name = os.fspath(path.name).lower()
    return re.sub(r"\.(gz|zst)$", "", name)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:37]}..."
