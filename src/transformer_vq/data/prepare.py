"""From paths to a `Source`: read, cut into splits, made tokens, and kept for the next time.

A plain file of bytes is mapped as it is. Everything else is written once, as one flat array, into a
folder of the cache, whose name follows from the files (path, size, time of change) and from how
they are read. The splits are cut in the original data, before there are tokens: so the test split
is the same text whatever the vocabulary.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from transformer_vq.data.cache import Kept, TokenFile, kept_tokens, scratch_tokens
from transformer_vq.data.compressed import LOOKED_AT, load_bytes, what_it_is
from transformer_vq.data.files import SPLIT_FOLDERS, Files, find_files, kind_of
from transformer_vq.data.images import LARGEST_SIDE, Look, common_shape, look_at, read_images
from transformer_vq.data.records import read_documents
from transformer_vq.data.source import Source, Span
from transformer_vq.data.tasks import Task, is_task
from transformer_vq.data.text import SPLITS, DataError
from transformer_vq.data.tokenizer import ByteTokenizer, Tokenizer
from transformer_vq.errors import UserError, as_path, is_listed, require_kind, shown

OnError = Literal["stop", "skip"]
ON_ERROR = get_args(OnError)

_VERSION = 3  # of what is in the cache, and of how files are read
_PIECE = 1 << 20  # bytes of a document that are made tokens at once
_BATCH = 64  # pieces at once
_IMAGE_BYTES = 1 << 24  # of pictures that are written at once


def open_source(
    paths: str | Path | Sequence[str | Path],
    *,
    tokenizer: Tokenizer | None = None,
    text_column: str = "text",
    image_size: int = 0,
    channels: Literal[0, 1, 3] = 0,
    on_error: OnError = "stop",
    cache: str | Path | None = None,
) -> Source:
    """The data in files and folders (see `find_files`), ready to be trained on or scored.

    Args:
      paths: one or many.
      tokenizer: makes tokens of text; bytes by default.
      text_column: where a line of .jsonl or a row of .parquet has its text.
      image_size: side of the square that each picture is made into; 0: as they are, all equal.
      channels: 1 makes pictures grey, 3 gives them colours; 0: as they are, all equal.
      on_error: stop at a document that cannot be read, or skip it; `Source.notes` counts these.
      cache: folder that keeps what took time to make. Without, it is made in a temporary one.

    Raises `DataError`, naming file and line, for what cannot be read; for no data at all too; and
    `UserError` for an argument that is none.

    A task (`recall:pairs=6`, see `Task`) stands alone in place of a path.
    """
    paths = _as_paths(paths)
    cache = None if cache is None else as_path("cache", cache)
    _check_how(tokenizer, text_column, image_size, channels, on_error)
    tasks = [path for path in paths if is_task(path)]
    if tasks:
        return _task_source(tasks, paths, image_size, tokenizer)
    tokenizer = tokenizer or ByteTokenizer()
    files = find_files(paths)
    label = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if image_size and not files.images:
        raise DataError(f"{label} holds text, and --image-size is for pictures: leave it out")
    if files.images and not isinstance(tokenizer, ByteTokenizer):
        raise DataError(f"{label} holds pictures, which are bytes: train without a vocabulary")
    only = files.all[0] if len(files.all) == 1 and "" in files.splits else None
    if only and isinstance(tokenizer, ByteTokenizer) and kind_of(only) == "text":
        return _one_file(only, label, files, on_error)

    def build(folder: Path) -> None:
        if files.images:
            _build_images(files, folder, image_size, channels, on_error)
            return
        _build_text(files, folder, tokenizer, text_column, on_error)

    if cache is None:
        return _source(scratch_tokens(build), tokenizer, label)
    key = _key(files, [tokenizer.name, text_column, image_size, channels, on_error])
    return _source(kept_tokens(cache, key, build), tokenizer, label)


def _as_paths(given: Any) -> list[str | Path]:
    """One path or many, as a list. Raises `DataError` or `UserError` for what is none."""
    if isinstance(given, str | Path):
        given = [given]
    if not is_listed(given) or isinstance(given, bytes):
        raise DataError(f"the paths are {shown(given)}: give a path, or a list of them")
    paths = list(given)
    if not paths:
        raise DataError("there is no path: give a file or a folder at least")
    for path in paths:
        if not isinstance(path, str | Path):
            as_path("a path of the data", path)
    return [path if isinstance(path, str) else Path(path) for path in paths]


def _check_how(
    tokenizer: Any, text_column: Any, image_size: Any, channels: Any, on_error: Any
) -> None:
    """Raise `UserError` for an option of `open_source` that is none."""
    if not (tokenizer is None or hasattr(tokenizer, "encode_batch")):
        raise UserError(
            f"tokenizer is {shown(tokenizer)}: it must be a vocabulary (load_tokenizer reads one)"
        )
    require_kind("text_column", text_column, str)
    if isinstance(image_size, bool) or not isinstance(image_size, int):
        raise UserError(f"image_size is {shown(image_size)}: it must be a whole number")
    if not 0 <= image_size <= LARGEST_SIDE:
        raise DataError(
            f"the image size is {image_size}: it must be from 1 to {LARGEST_SIDE:,}, or 0 for as "
            f"it is"
        )
    for name, value, values in (
        ("channels", channels, (0, 1, 3)),
        ("on_error", on_error, ON_ERROR),
    ):
        if isinstance(value, bool) or value not in values:
            limit = ", ".join(map(str, values))
            raise UserError(f"{name} is {shown(value)}: it must be one of {limit}")


def _task_source(
    tasks: Sequence[str | Path],
    paths: Sequence[str | Path],
    image_size: int,
    tokenizer: Tokenizer | None,
) -> Source:
    """Episodes of the one task. Raises `DataError` for what does not go with it."""
    if len(paths) > 1:
        raise DataError(f"{tasks[0]} is a task, and stands alone: leave out the other data")
    if image_size:
        raise DataError(f"{tasks[0]} is a task, and --image-size is for pictures: leave it out")
    if tokenizer is not None and not isinstance(tokenizer, ByteTokenizer):
        raise DataError(f"{tasks[0]} is a task, of bytes: train without a vocabulary")
    return Task.named(str(tasks[0])).source()


def _one_file(path: Path, label: str, files: Files, on_error: OnError) -> Source:
    """A file whose bytes are the tokens: no need to keep them."""
    broken, odd = Broken(on_error), Odd()
    content = load_bytes(path, on_break=broken.add)
    odd.look(path, content)
    return replace(Source.of(content, label), notes=(*broken.notes(), *files.notes(), *odd.notes()))


def _key(files: Files, how: list[Any]) -> str:
    """Changes with the files and with how they are read."""
    stats = [(path, path.stat()) for path in files.all if path.exists()]
    which = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    splits = {name: len(paths) for name, paths in files.splits.items()}
    content = json.dumps([_VERSION, how, splits, which, files.notes()])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _source(kept: Kept, tokenizer: Tokenizer, label: str) -> Source:
    values, notes = kept.values, kept.values["notes"]
    if kept.damage:
        notes = [f"the tokens that were kept are damaged ({kept.damage}): made anew", *notes]
    return Source(
        tokens=kept.tokens,
        starts=kept.starts,
        num_bytes=sum(span[2] for span in values["spans"].values()),
        tokenizer=tokenizer,
        path=label,
        spans={name: Span(*span) for name, span in values["spans"].items()},
        image_shape=tuple(values["image_shape"]) if values["image_shape"] else None,
        notes=tuple(notes),
        digest=values["digest"],
    )


class Broken:
    """What cannot be read: stop at the first, or count them and go on."""

    def __init__(self, on_error: OnError):
        self.on_error, self.count, self.first = on_error, 0, ""

    def add(self, error: DataError) -> None:
        if self.on_error == "stop":
            raise DataError(f"{error} (or leave out what is broken with --on-error skip)")
        self.count += 1
        self.first = self.first or str(error)

    def notes(self) -> list[str]:
        if not self.count:
            return []
        what = "broken record" if self.count == 1 else "broken records, the first"
        return [f"skipped {self.count:,} {what}: {self.first}"]


class Odd:
    """What is read otherwise than one may expect: counted by kind, with the first of each."""

    def __init__(self) -> None:
        self._found: dict[str, list[Path]] = {}

    def add(self, what: str, path: Path) -> None:
        """`what` is a sentence that ends with the path: "made grey:"."""
        self._found.setdefault(what, []).append(path)

    def look(self, path: Path, content: bytes | np.ndarray) -> None:
        """Whether a file of text is what it seems to be."""
        what = what_it_is(bytes(content[:LOOKED_AT]))
        if what:
            self.add(f"read the bytes of what looks like {what}, not what is in it:", path)

    def notes(self) -> list[str]:
        return [
            f"{what} {paths[0]}" + (f" and {len(paths) - 1:,} more" if paths[1:] else "")
            for what, paths in self._found.items()
        ]


def cut(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Where the splits begin and end, by position, in data of these sizes, one after another.

    `sizes`: of each given split; of all data under "" where none is given, which is cut 90/5/5. If
    there is a test split and none for validation, that is the end of the training data, 5 of 95.
    """
    if "" in sizes:
        total = sizes[""]
        return {
            name: (total * low // 100, total * high // 100)
            for name, (low, high) in SPLITS.items()
            if name in SPLIT_FOLDERS
        }
    ends = np.cumsum([0, *sizes.values()]).tolist()
    bounds = dict(zip(sizes, pairwise(ends), strict=True))
    if "train" in bounds and "test" in bounds and "validation" not in bounds:
        end = bounds["train"][1]
        middle = end * 90 // 95
        bounds = {"train": (0, middle), "validation": (middle, end), "test": bounds["test"]}
    return bounds


# Pictures.


def _build_images(
    files: Files, folder: Path, image_size: int, channels: int, on_error: OnError
) -> None:
    """Every picture is a document: a start token, then its bytes. Splits are cut between them."""
    broken, odd = Broken(on_error), Odd()
    looks: dict[Path, Look] = {}
    for path in files.all:
        try:
            looks[path] = look_at(path)
        except DataError as error:
            broken.add(error)
    if not looks:
        raise DataError(f"there is no picture that can be read: {broken.first}")
    shape = common_shape(list(looks), [look.shape for look in looks.values()], image_size, channels)
    size, counts = math.prod(shape), dict.fromkeys(files.splits, 0)
    with TokenFile(folder, 256) as file:
        for name, paths in files.splits.items():
            for path in filter(looks.get, paths):
                try:
                    rows = read_images(path, shape, image_size).reshape(-1, size)
                except DataError as error:
                    broken.add(error)
                    continue
                for some in np.array_split(rows, -(-rows.nbytes // _IMAGE_BYTES)):
                    start = ByteTokenizer().eos_id
                    file.write(np.pad(some, ((0, 0), (1, 0)), constant_values=start))
                counts[name] += len(rows)
                for what in _differences(looks[path], shape):
                    odd.add(what, path)
        file.starts.extend(range(0, file.size, size + 1))
        spans = {
            name: Span(start * (size + 1), stop * (size + 1), (stop - start) * size)
            for name, (start, stop) in cut(counts).items()
        }
        file.finish(spans, [*broken.notes(), *files.notes(), *odd.notes()], shape)


def _differences(look: Look, shape: Sequence[int]) -> Iterator[str]:
    """How a picture is read otherwise than it is, besides its size."""
    if look.frames:
        yield "took only the first frame or page of"
    if look.deep:
        yield "took the upper 8 of 16 bits of"
    if look.shape[2] > shape[2]:
        yield "made grey:"


# Text.


def _build_text(
    files: Files, folder: Path, tokenizer: Tokenizer, text_column: str, on_error: OnError
) -> None:
    """Make tokens of documents: first all of them as bytes, one after another, then cut these."""
    broken, odd, empty = Broken(on_error), Odd(), 0
    as_text = not isinstance(tokenizer, ByteTokenizer)
    ends, sizes, total = array("q"), dict.fromkeys(files.splits, 0), 0
    raw_path = folder / "raw.bin"
    with raw_path.open("wb") as raw:
        for name, paths in files.splits.items():
            for path in paths:
                is_text = kind_of(path) == "text"
                for _, document in read_documents(path, text_column, as_text=as_text):
                    if isinstance(document, DataError):
                        broken.add(document)
                    elif not len(document):
                        empty += 1
                    else:
                        if is_text:
                            odd.look(path, document)
                        raw.write(document if isinstance(document, bytes) else document.data)
                        total += len(document)
                        ends.append(total)
                        sizes[name] += len(document)
    notes = [*broken.notes(), *files.notes()]
    if empty:
        notes.append(f"left out {empty:,} empty {'document' if empty == 1 else 'documents'}")
    notes += odd.notes()
    if not total:
        why = f": {notes[0]}" if notes else ""
        several = len(files.all) > 1
        which = f"{files.all[0]} and what is with it hold" if several else f"{files.all[0]} holds"
        raise DataError(f"{which} no data{why}")
    content = np.memmap(raw_path, np.uint8, mode="r")
    spans = {}
    with TokenFile(folder, tokenizer.vocab_size) as file:
        for name, (start, stop) in cut(sizes).items():
            if as_text:
                start, stop = (_character_start(content, place) for place in (start, stop))
            begin = file.size
            _write_tokens(file, content, np.array(ends), start, stop, tokenizer)
            spans[name] = Span(begin, file.size, stop - start)
        file.finish(spans, notes)
    del content
    raw_path.unlink()


def _write_tokens(
    file: TokenFile,
    content: np.ndarray,
    ends: np.ndarray,
    start: int,
    stop: int,
    tokenizer: Tokenizer,
) -> None:
    """Add the tokens of content[start:stop], in which documents end at `ends`.

    A single document has no token before it; nor has the rest of one that begins before `start`.
    """
    separator = [tokenizer.eos_id] if len(ends) > 1 else []
    waiting: list[tuple[bool, str]] = []  # pieces of text, and whether they begin a document

    def flush() -> None:
        encoded = tokenizer.encode_batch([text for _, text in waiting])
        for (begins, _), tokens in zip(waiting, encoded, strict=True):
            if begins:
                begin()
            file.write(tokens)
        waiting.clear()

    def begin() -> None:
        file.starts.append(file.size)
        file.write(separator)

    first, last = np.searchsorted(ends, (start, stop), "left")
    begins = start == 0 or bool(ends[first] == start)
    for end in (*ends[first:last].tolist(), stop):
        if end <= start:
            continue
        if isinstance(tokenizer, ByteTokenizer):
            if begins:
                begin()
            file.write(content[start:end])
        else:
            for piece in _pieces(content, start, end):
                waiting.append((begins, piece.decode()))
                begins = False
                if len(waiting) == _BATCH:
                    flush()
        start, begins = end, True
    flush()


def _pieces(content: np.ndarray, start: int, end: int) -> Iterator[bytes]:
    """A long document as pieces that end with a line, or at least not within a character."""
    while start < end:
        stop = min(start + _PIECE, end)
        piece = content[start:stop].tobytes()
        if stop < end:
            line = piece.rfind(b"\n") + 1
            stop = start + line if line else _character_start(content, stop)
            piece = content[start:stop].tobytes()
        yield piece
        start = stop


def _character_start(content: np.ndarray, place: int) -> int:
    """The first place from `place` on where a UTF-8 character begins, or the end."""
    while place < len(content) and content[place] & 0xC0 == 0x80:
        place += 1
    return place
