"""From arguments to options: tyro parses, and its errors become one sentence each."""

import contextlib
import dataclasses
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, TypedDict, get_type_hints

import tyro
from tyro.conf import arg

from transformer_vq.errors import UserError


class UsageError(UserError):
    """The options make no sense; one sentence names the option, its value and what to do."""


# Paths after one --data, and in several of them: `--data a b --data c`.
DataPaths = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


def flat(paths: tuple[tuple[str, ...], ...]) -> list[str]:
    """All paths that were given."""
    return [path for group in paths for path in group]


def option(help: str, metavar: str | None = None, *, default: str | None = None) -> Any:
    """What an option of a command says in its help. `default`: in words, where that is clearer."""
    return arg(help=help, metavar=metavar, help_behavior_hint=default and f"(default: {default})")


def overrides(config: type, name: str, hint: Callable[[dataclasses.Field], str]) -> Any:
    """A type of options for the fields of a configuration: a dictionary of those that are given.

    Help texts come from the fields' metadata; `hint` says what a field is if it is not given.
    """
    hints = get_type_hints(config)
    fields = {
        f.name: Annotated[hints[f.name], arg(help=f.metadata["help"], help_behavior_hint=hint(f))]
        for f in dataclasses.fields(config)
    }
    return TypedDict(name, fields, total=False)  # pyright: ignore[reportArgumentType]


def as_usage(error: Exception, prefix: str, fields: type) -> UsageError:
    """An error of a dataclass about one of its fields, as one about the option: `--top-p is 2`."""
    text = str(error)
    name = text.split(" ", 1)[0]
    if name in {f.name for f in dataclasses.fields(fields)}:
        text = f"{prefix}{name.replace('_', '-')}{text[len(name) :]}"
    return UsageError(text)


def options(command: type, name: str, arguments: list[str]) -> Any:
    """The command with the options given; None if help was asked for, and printed.

    Raises `UsageError`.
    """
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(
                command,
                prog=f"tvq {name}",
                description=_wrapped(command.__doc__ or ""),
                args=arguments,
                config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as exit:
        if exit.code:
            raise UsageError(_sentence(heard.getvalue(), name)) from None
        print(f"examples:\n{command.examples.strip(chr(10))}")
        return None


def _wrapped(text: str) -> str:
    """A docstring with its paragraphs broken to the width of the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs = inspect.cleandoc(text).split("\n\n")
    # Indented, because tyro joins lines that begin with a letter.
    fill = textwrap.TextWrapper(width, initial_indent=" ", subsequent_indent=" ").fill
    return "\n\n".join(map(fill, paragraphs))


# tyro draws boxes: a title, what is wrong, then a line and advice.


def _sentence(box: str, name: str) -> str:
    """What is wrong, from the text that tyro prints."""
    parts = [""]
    for line in box.splitlines():
        line = line.strip(" │╭╮╰╯|+")
        if line.strip("─-") == "":
            parts.append("")
        elif "───" not in line and "---" not in line:  # no title
            parts[-1] = f"{parts[-1]} {line}".strip()
    parts = [part for part in parts if part]
    if "╭" not in box:  # without Unicode the title stands like a part
        del parts[:1]
    problem = parts[0] if parts else "the options cannot be used"
    see = f"(see tvq {name} --help)"
    if match := re.match(r"Unrecognized options: (.*)", problem):
        unknown = match[1].split(", ")[0]
        nearest = re.search(r"--[\w.-]+", parts[1]) if len(parts) > 2 else None
        meant = f", perhaps you meant {nearest[0]}" if nearest else ""
        what = f"no option {unknown}" if unknown.startswith("-") else f"no use for {unknown!r}"
        return f"there is {what}{meant} {see}"
    if match := re.match(r"invalid choice '(.*)' for argument '(\S+)'.*one of \((.*)\)", problem):
        choices = match[3].replace("'", "").rstrip(",")
        return f"{match[2]} is {match[1]!r}: it must be one of {choices}"
    if match := re.match(r"Missing from .*?: (--\S+)", problem):
        return f"{match[1]} is missing: give it {see}"
    if match := re.match(r"Missing value for argument '(\S+)'", problem):
        return f"{match[1]} needs a value {see}"
    for pattern, limit in (
        (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", "a whole number"),
        (r"Error parsing (\S+): no type matching INT .* from \['(.*)'\]", "a whole number"),
        (r"Error parsing (\S+): could not convert string to float: (.*)", "a number"),
    ):
        if match := re.match(pattern, problem):
            value = match[2].strip("'")
            return f"{match[1]} is {value!r}: it must be {limit}"
    return f"{problem[0].lower()}{problem[1:].rstrip('.')} {see}"
