"""The checksums of a checkpoint: written with it, and looked at before any of it is believed.

`SHA256SUMS` is a file as `sha256sum` writes it: `cd runs/NAME/checkpoints/100 && sha256sum -c
SHA256SUMS` checks by hand.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

CHECKSUM_FILE = "SHA256SUMS"
METADATA_FILE = "metadata.json"
# Written after the checksums, and not needed to restore.
_UNVERIFIED = {CHECKSUM_FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}
# Names of the files that a save writes. Others came later (desktop.ini, Thumbs.db) and do no harm.
_OURS = re.compile(r"metadata\.json|manifest\.ocdbt|_METADATA|_sharding|process_\d+|[0-9a-f]{32}")


def seal(checkpoint: Path) -> None:
    """Write the checksums of the files that are in the folder."""
    sums = "".join(f"{sha256(checkpoint / name)}  {name}\n" for name in verified_files(checkpoint))
    (checkpoint / CHECKSUM_FILE).write_text(sums, "utf-8")


def find_damage(checkpoint: Path, names: Sequence[str] = ()) -> str | None:
    """What is wrong with these files of a checkpoint, by default all of them; None if nothing is.

    A file that a save would write and that has no checksum counts as damage, for the list of
    checksums may have been cut. Raises `OSError` if a file cannot be read.
    """
    lines = (checkpoint / CHECKSUM_FILE).read_text("utf-8", errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    known = listed.keys() | {METADATA_FILE, *verified_files(checkpoint)}
    for name in names or sorted(known):
        if "\0" in name or not (checkpoint / name).is_file():
            return f"{name} is missing"
        if sha256(checkpoint / name) != listed.get(name):
            return f"{name} is not as it was written"
    return None


def verified_files(checkpoint: Path) -> Iterator[str]:
    """All files of a checkpoint that have a checksum, in order."""
    for path in sorted(checkpoint.rglob("*")):
        if path.name not in _UNVERIFIED and _OURS.fullmatch(path.name) and path.is_file():
            yield path.relative_to(checkpoint).as_posix()


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
