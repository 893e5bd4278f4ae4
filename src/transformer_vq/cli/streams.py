"""Standard streams that are closed, full, or not read any more."""

import codecs
import io
import os
import sys


def open_streams() -> None:
    """Let what is printed to a closed stream go nowhere, and all else reach even a poor terminal.

    A closed descriptor is taken by the null device, or the next file that is opened would take it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the end)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    raw = getattr(sys.stdout, "buffer", None)
    if sys.stdout is sys.__stdout__ and isinstance(raw, io.RawIOBase):
        # Of PYTHONUNBUFFERED, which forgets what cannot be written.
        buffer = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(buffer, sys.stdout.encoding, line_buffering=True)
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        codecs.register_error("poor", _in_ascii)
        reconfigure(errors="poor")  # a terminal that is not UTF-8 shows what it can


# What is drawn and printed here beside ASCII, and what a typewriter has in its place.
_TYPED = {"─": "-", "█": "#", "±": "+-", "…": "...", "×": "x", "—": "--", "“": '"', "”": '"'}
_TYPED |= {"‘": "'", "’": "'"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Characters that a stream does not have, as it has them; `?` for others."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_TYPED.get(character, "?") for character in text), error.end


def output_fails(error: OSError) -> bool:
    """Whether it is standard output that cannot be written; what is left of it is dropped."""
    try:
        sys.stdout.flush()
    except OSError as again:
        drop_output()
        return again.errno == error.errno
    return False


def drop_output() -> None:
    """Let what is left to be printed go nowhere, so that the end of the process does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
