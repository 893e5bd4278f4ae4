"""The one kind of error that is the user's to mend; standard library only.

Raise `UserError`, or one of its kinds (`ConfigError`, `DataError`, `RunError`, ...), for a value, a
file or a folder that cannot be used: one sentence that names what it is, the limit, and the way
out. The command line prints that sentence. Any other exception is a fault of the program and keeps
its traceback.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

MOST_SHOWN = 100  # characters of a value in a sentence


class UserError(ValueError):
    """Something that was given cannot be used. The message says what, why, and what to do."""


class ConfigError(UserError):
    """A field of a configuration has a value that it cannot have.

    `field`: its name, with which the message begins, where the error is about one.
    """

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


def require_kind(name: str, value: Any, kind: type, source: str = "") -> None:
    """Raise `UserError` for an argument of another class. `source`: where it may come from."""
    if not isinstance(value, kind):
        where = f", {source}" if source else ""
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise UserError(f"{name} is {shown(value)}: it must be {article} {kind.__name__}{where}")


def is_listed(value: Any) -> bool:
    """Whether it can be gone through: not the arrays without axes of a library, nor a class."""
    return (
        hasattr(value, "__iter__")
        and getattr(value, "ndim", 1) != 0
        and not isinstance(value, type)
    )


def as_path(name: str, value: Any) -> Path:
    """An argument that names a file or a folder. Raises `UserError` for what does not."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name} is {shown(value)}: it must be a path, as text or as a Path")
    if not os.fspath(value):
        raise UserError(f"{name} is empty: give a path")
    try:
        named = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half a character
        named = False
    if not named:
        raise UserError(f"{name} is {shown(value)}: no file can have that name")
    return Path(value)


def shown(value: Any) -> str:
    """A value as a sentence shows it: as Python has it, and cut in the middle if it is long."""
    try:
        return cut(plain(repr(value)))
    except ValueError:  # Python writes no whole numbers of more than 4,300 digits
        return "a number of thousands of digits"


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """The text, of which the middle is left out if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    head = (most - 3) // 2
    return f"{text[:head]}...{text[len(text) - (most - 3 - head) :]}"


def plain(text: str) -> str:
    r"""The text with all that does not print as an escape (`\x1b`), fit for any terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_install(extra: str) -> str:
    """The command that installs an extra of this package where it runs.

    A shell's `pip` may be that of another environment: then the command begins with our Python.
    """
    found, python = shutil.which("pip"), sys.executable
    if found and Path(found).parent == Path(python).parent:
        pip = "pip"
    else:
        below = python.startswith(os.getcwd() + os.sep)
        pip = f"{os.path.relpath(python) if below else python} -m pip"
    return f"{pip} install 'transformer-vq[{extra}]'"
