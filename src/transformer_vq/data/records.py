"""Files to documents: the texts in a file, one at a time.

A file is a document; a line of a .jsonl and a row of a .parquet are documents too. Any of them may
be compressed. What is broken is named with its file and line.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from transformer_vq.data.compressed import (
    MissingLibrary,
    ReadError,
    is_compressed,
    open_binary,
    read_bytes,
)
from transformer_vq.data.files import kind_of
from transformer_vq.data.text import DataError, whole_characters
from transformer_vq.errors import to_install

_LONGEST_LINE = 1 << 28  # bytes of a line of .jsonl: reading it takes up to 20 times as many
_ROWS = 128  # of a table, read at once
_CHECKED = 1 << 24  # bytes looked at at once

Document = bytes | np.ndarray  # uint8 [N]
Found = tuple[str, Document | DataError]  # where it is from; for a broken one, the error


def read_documents(path: Path, text_column: str, *, as_text: bool) -> Iterator[Found]:
    """The documents of a file and where each is from; for a broken one, the error instead of it.

    `as_text`: a document that is not UTF-8 is broken. Raises `MissingLibrary` where one is needed.
    """
    kind = kind_of(path)
    try:
        if kind == "lines":
            documents = _lines(path, text_column)
        elif kind == "table":
            documents = _rows(path, text_column)
        else:
            documents = _whole(path, as_text)
        for where, document in documents:
            if as_text and not isinstance(document, DataError):
                bad = _not_text(document)
                if bad is not None:
                    document = DataError(
                        f"{where} is not UTF-8 at byte {bad:,}, and this tokenizer reads text: "
                        f"convert it, or train on bytes"
                    )
            yield where, document
    except MissingLibrary:
        raise
    except DataError as error:  # it cannot even be opened
        yield str(path), error


def _whole(path: Path, as_text: bool) -> Iterator[Found]:
    breaks: list[DataError] = []
    document = read_bytes(path, on_break=breaks.append)
    if breaks and as_text:  # it breaks off within a character
        tail = document[-4:].tobytes()
        document = document[: len(document) - len(tail) + whole_characters(tail)]
    if len(document) or not breaks:
        yield str(path), document
    for error in breaks:
        yield str(path), error


def _lines(path: Path, column: str) -> Iterator[Found]:
    number = 0
    with open_binary(path) as file:
        try:
            while line := file.readline(_LONGEST_LINE):
                number += 1
                where = f"{path}, line {number:,}"
                if len(line) == _LONGEST_LINE:
                    yield where, DataError(f"{where} is longer than {_LONGEST_LINE:,} bytes")
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_CHECKED)
                elif line.strip():
                    yield where, _text_of(where, line, column)
        except (ReadError, OSError, MemoryError) as error:
            reason = ReadError(path, error) if not isinstance(error, ReadError) else error
            yield (
                str(path),
                DataError(f"cannot read {path} after line {number:,}: {reason.reason}"),
            )


def _text_of(where: str, line: bytes, column: str) -> bytes | DataError:
    try:
        record = _parsed(line.decode("utf-8-sig"))
    except RecursionError:
        return DataError(f"{where} is not JSON that can be read: it is nested too deeply")
    except ValueError as error:  # not JSON, or not UTF-8
        reason = getattr(error, "msg", None) or str(error)
        return DataError(f"{where} is not JSON: {reason}")
    if not isinstance(record, dict):
        return DataError(f"{where} is a JSON {type(record).__name__}, not an object")
    if column not in record:
        return DataError(
            f"{where} has no {column!r}: it has {_list(record)} (choose with --text-column)"
        )
    return _encoded(where, record[column], column)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python makes no integer of more than 4,300 digits: JSON may have some
        return json.loads(line, parse_int=float)


def _encoded(where: str, text: object, column: str) -> bytes | DataError:
    if not isinstance(text, str):
        return DataError(f"{where} has {column!r} {_short(text)}, which is no text")
    try:
        return text.encode()
    except UnicodeEncodeError:
        return DataError(f"{where} holds half a surrogate pair, which is no text")


def _rows(path: Path, column: str) -> Iterator[Found]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingLibrary(f"{path} needs pyarrow to be read: {to_install('parquet')}") from None
    if is_compressed(path):
        source: Any = pyarrow.py_buffer(read_bytes(path))
    else:
        open_binary(path).close()  # it is a file
        source = path
    number = 0
    try:
        with parquet.ParquetFile(source) as file:
            columns = file.schema_arrow.names
            if column not in columns:
                yield (
                    str(path),
                    DataError(
                        f"{path} has no column {column!r}: it has {_list(columns)} (choose with "
                        f"--text-column)"
                    ),
                )
                return
            for batch in file.iter_batches(_ROWS, columns=[column]):
                cells, is_text = _cells(batch.column(column))
                for cell in cells:
                    number += 1
                    where = f"{path}, row {number:,}"
                    if isinstance(cell, bytes):
                        yield where, _utf8(where, cell) if is_text else cell
                    else:
                        yield where, _encoded(where, cell, column)
    except Exception as error:  # a damaged file makes this library raise what it will
        reason = ReadError(path, error).reason
        yield str(path), DataError(f"cannot read {path} after row {number:,}: {reason}")


def _cells(array: Any) -> tuple[list[Any], bool]:
    """What a column holds, and whether that is text; of text the bytes, which may be no UTF-8."""
    import pyarrow

    kinds = pyarrow.types
    if kinds.is_dictionary(array.type):
        array = array.dictionary_decode()
    is_text = kinds.is_string(array.type) or kinds.is_large_string(array.type)
    return (array.cast(pyarrow.large_binary()) if is_text else array).to_pylist(), is_text


def _utf8(where: str, text: bytes) -> bytes | DataError:
    bad = _not_text(text)
    return text if bad is None else DataError(f"{where} has text that is no UTF-8 at byte {bad:,}")


def _not_text(document: Document) -> int | None:
    """Where the first byte is that is not UTF-8; None if all is."""
    start, carry = 0, b""
    while start < len(document):
        piece = carry + bytes(document[start : start + _CHECKED])
        begin = start - len(carry)
        start += _CHECKED
        try:
            piece.decode()
            carry = b""
        except UnicodeDecodeError as error:
            cut = error.reason == "unexpected end of data" and start < len(document)
            if not cut:
                return begin + error.start
            carry = piece[error.start :]
    return None


def _list(names: Iterable[str]) -> str:
    """Some names and how many more there are, in bounded length."""
    names = list(names)
    more = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
    return (", ".join(_short(name) for name in names[:8]) or "nothing") + more


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:37]}..."
