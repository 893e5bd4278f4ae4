"""What paths name: files, folders with all that is below them, and the kind of each.

Nothing is read here but names (and the list in a .zip). What is left out is said so.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformer_vq.data.compressed import ReadError, bare_name
from transformer_vq.data.text import DataError

Kind = Literal["text", "lines", "table", "picture", "pictures"]

SPLIT_FOLDERS = ("train", "validation", "test")
PICTURES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".avif", ".jp2"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_LINES = (".jsonl", ".ndjson")
_TABLES = (".parquet",)
_IMAGE_ARRAYS = re.compile(r"idx[34]-ubyte$|\.npz$")
# Arrays of pictures say in their names what they are for: train-images-idx3-ubyte, val_data.npz.
_ARRAY_SPLITS = (("train", "train"), ("val", "validation"), ("test", "test"), ("t10k", "test"))
# What tells a folder that this program made from one of data: a run, tokens that are kept, and a
# model that was exported.
_OURS = (
    {"config.json", "metrics.jsonl"},
    {"config.json", "checkpoints"},
    {"config.json", "model.safetensors"},
    {"source.json", "tokens.bin"},
)
# What a run writes, where its folder is that of the data.
_RUN = {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "tensorboard", "wandb"}
_RUN |= {"tokenizer.json", "tokenizer.model", "report.html"}


@dataclass(frozen=True)
class Files:
    """The files that some paths name, in the order in which they are read."""

    splits: dict[str, tuple[Path, ...]]  # by train, validation, test; "" if they are yet to be cut
    images: bool
    left_out: tuple[Path, ...]  # what is neither a text among texts nor a picture among pictures
    repeated: tuple[Path, ...] = ()  # files and folders that are there already, by another name
    ours: tuple[Path, ...] = ()  # folders of runs and of kept tokens

    @property
    def all(self) -> list[Path]:
        return [path for paths in self.splits.values() for path in paths]

    def notes(self) -> list[str]:
        """What is not read, a sentence each."""
        kind = "picture" if self.images else "text"
        several = f"{len(self.left_out):,} files, each no {kind}"
        return [
            f"{what}: {_names(paths)}"
            for paths, what in (
                (
                    self.left_out,
                    f"left out 1 file, which is no {kind}"
                    if len(self.left_out) == 1
                    else f"left out {several}",
                ),
                (self.repeated, "counted once what is given twice"),
                (self.ours, "left out what this program made itself"),
            )
            if paths
        ]


def find_files(paths: Sequence[str | Path]) -> Files:
    """What is in files and folders; folders with all that is below them, in sorted order.

    Links are followed, to folders too. A file or folder that is named twice, or by a link too, is
    read once. The folders train, validation and test in a folder are its splits, as PG-19 has them;
    and so are arrays of pictures with such names. Hidden files are not looked at, nor are the
    folders of runs. A folder holds pictures if it has an array of them, or if most of its files are
    pictures.

    Raises `DataError` for a path that is not there, a folder without files, and for splits that
    only a part of the data has.
    """
    walk = _Walk()
    found: list[tuple[str, Path]] = []
    left_out: list[Path] = []
    for path in paths:
        if not os.fspath(path):
            raise DataError("a path of the data is empty: give a file or a folder")
        path = Path(path)
        if not _stands_for_folder(path):
            walk.file(path)
            found += [("", file) for file in walk.taken()]
            continue
        walk.folder(path)
        below = sorted(walk.taken())
        if not below and not walk.repeated:
            raise DataError(f"{path} is a directory without files: give one that has some")
        if (path / "train").is_dir() and any((path / n).is_dir() for n in SPLIT_FOLDERS[1:]):
            parts = [(file.relative_to(path).parts[0], file) for file in below]
            found += [part for part in parts if part[0] in SPLIT_FOLDERS]
            beside = [file for name, file in parts if name not in SPLIT_FOLDERS]
            walk.forget(beside)
            left_out += beside
        else:
            found += [("", file) for file in below]
    kinds: dict[Path, Kind] = {file: kind_of(file) for _, file in found}
    arrays = "pictures" in kinds.values()
    images = arrays or 2 * sum(kind == "picture" for kind in kinds.values()) > len(found)
    left_out += [file for _, file in found if is_image(kinds[file]) != images]
    found = [(name, file) for name, file in found if is_image(kinds[file]) == images]
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
    return Files(splits, images, tuple(left_out), tuple(walk.repeated), tuple(walk.ours))


def kind_of(path: Path) -> Kind:
    """What a file holds, by its name: one text or picture, or many of them."""
    name = bare_name(path)
    if name.endswith(PICTURES):
        return "picture"
    if _IMAGE_ARRAYS.search(name):
        return "pictures"
    if name.endswith(_LINES):
        return "lines"
    return "table" if name.endswith(_TABLES) else "text"


def is_image(kind: Kind) -> bool:
    """Whether it is one picture or many."""
    return kind in ("picture", "pictures")


class _Walk:
    """Goes through folders, and takes every file once."""

    def __init__(self) -> None:
        self.repeated: list[Path] = []
        self.ours: list[Path] = []
        self._found: list[Path] = []
        self._seen: set[tuple[int, ...]] = set()

    def taken(self) -> list[Path]:
        """The files that were found since the last time."""
        found, self._found = self._found, []
        return found

    def forget(self, files: Sequence[Path]) -> None:
        """Take these again where they are given by name."""
        self._seen -= {_identity(file) for file in files if file.exists()}

    def file(self, path: Path) -> None:
        if self._is_new(path):
            self._found.append(path)

    def folder(self, root: Path) -> None:
        """All that is below a folder. A link back to a folder above it leads to nothing new."""
        waiting: list[tuple[Path, frozenset[tuple[int, ...]]]] = [(root, frozenset())]
        while waiting:
            path, above = waiting.pop()
            if not os.path.isdir(path):
                self.file(path)
                continue
            me = _identity(path)
            if me in above or not self._is_new(path):
                continue
            try:
                names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            except OSError as error:
                raise ReadError(path, error) from None
            if any(ours <= set(names) for ours in _OURS):
                if path != root:
                    self.ours.append(path)
                    continue
                self.ours += [path / name for name in names if name in _RUN]
                names = [name for name in names if name not in _RUN]
            waiting += [(path / name, above | {me}) for name in reversed(names)]

    def _is_new(self, path: Path) -> bool:
        try:
            me = _identity(path)
        except OSError:  # say, a link to nothing: it is named when it is read
            return True
        if me in self._seen:
            self.repeated.append(path)
            return False
        self._seen.add(me)
        return True


def _identity(path: Path) -> tuple[int, ...]:
    """The same for every name of one file or folder."""
    info = os.stat(path)
    if stat.S_ISDIR(info.st_mode):
        return info.st_dev, info.st_ino
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _stands_for_folder(path: Path) -> bool:
    """Whether a path that was given is a folder. Raises `DataError` if it is not there."""
    try:
        path.stat()
        return path.is_dir()
    except FileNotFoundError:
        address = re.match(r"[a-z]{2,5}:/", str(path))
        way = ", and what is behind an address is not read: download it first" if address else ""
        raise DataError(f"there is no file {path}{way}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ReadError(path, error) from None


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")


def _named_splits(found: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Splits from the names of arrays, if they name train and something else."""

    def named(given: str, path: Path) -> str:
        matches = (split for start, split in _ARRAY_SPLITS if path.name.lower().startswith(start))
        return given or next(matches, "")

    names = [(named(given, path), path) for given, path in found]
    splits = {name for name, _ in names}
    return names if "train" in splits and len(splits) > 1 and "" not in splits else found
