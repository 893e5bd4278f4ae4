"""From arguments to options: tyro parses, and its errors become one sentence each."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    ClassVar,
    TypedDict,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import tyro
from tyro.conf import OmitArgPrefixes, arg

from transformer_vq.errors import UserError, cut, shown
from transformer_vq.fields import MOST, refusal, whole_limit


class UsageError(UserError):
    """The options make no sense; one sentence names the option, its value and what to do."""


NARROWEST = 40  # columns that help is broken to; below some ten tyro does so for ever

# Paths after one --data, and in several of them: `--data a b --data c`.
DataPaths = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


def flat(paths: tuple[tuple[str, ...], ...]) -> list[str]:
    """All paths that were given."""
    return [path for group in paths for path in group]


def option(help: str, metavar: str | None = None, *, default: str | None = None) -> Any:
    """What an option of a command says in its help. `default`: in words, where that is clearer."""
    return arg(help=help, metavar=metavar, help_behavior_hint=default and f"(default: {default})")


def overrides(
    config: type,
    name: str,
    hint: Callable[[dataclasses.Field], str],
    *,
    only: Sequence[str] | None = None,
) -> Any:
    """A type of options for fields of a configuration: a dictionary of those that are given.

    Help texts come from the fields' metadata; `hint` says what a field is if it is not given.
    `only`: these fields. The options of a command's field `x` are `--x.FIELD`, or `--FIELD` where
    its type is `Annotated[overrides(...), flat_names]`.
    """
    hints = get_type_hints(config)
    fields = {
        f.name: Annotated[hints[f.name], arg(help=f.metadata["help"], help_behavior_hint=hint(f))]
        for f in dataclasses.fields(config)
        if only is None or f.name in only
    }
    return TypedDict(name, fields, total=False)  # pyright: ignore[reportArgumentType]


flat_names = arg(name="")


def require_whole(option: str, value: int, low: int = 1, high: int = MOST) -> None:
    """Raise `UsageError` unless the value of an option is in these limits."""
    if not low <= value <= high:
        raise UsageError(str(refusal(option, value, whole_limit(low, high))))


def as_usage(error: Exception, prefix: str, fields: type) -> UsageError:
    """An error about a field of a configuration as one about the option: `--top-p is 2`."""
    name = getattr(error, "field", "")
    others = {f.name for f in dataclasses.fields(fields) if "_" in f.name}

    def as_option(match: re.Match[str]) -> str:
        word = match[0]
        known = word in others or (word == name and match.start() == 0)
        return prefix + word.replace("_", "-") if known else word

    return UsageError(re.sub(r"\w+", as_option, str(error)))


def with_options(text: str, command: type, field: str = "") -> str:
    """A sentence in which the fields of configurations are the options that somebody typed.

    "lower warmup_steps" is "lower --train.warmup-steps" where the command has that option. `field`:
    a field of one word with which the sentence may begin. Names in paths stay.
    """
    names = {option.rpartition(".")[2].lstrip("-"): option for option in _known_options(command)}

    def as_option(match: re.Match[str]) -> str:
        word = match[0]
        meant = "_" in word or (word == field and match.start() == 0)
        return names.get(word.replace("_", "-"), word) if meant else word

    return re.sub(r"""(?<![\w/.\-'"])\w+(?![\w/\-'"]|\.\w)""", as_option, text)


def options(command: type, name: str, arguments: Sequence[str]) -> Any:
    """The command with the options given; None if help was asked for, and printed.

    Raises `UsageError`.
    """
    known = _known_options(command)
    _refuse_values(known, arguments)
    see = f"(see tvq {name} --help)"

    def refuse(event: Any) -> None:
        if sentence := _explained(event, list(known)):
            raise UsageError(sentence.replace("SEE", see))

    heard = io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(heard),
            contextlib.redirect_stdout(cast(io.TextIOBase, _OneBlankLine(sys.stdout))),
            _told_of_errors(refuse),
            _wide_enough(),
        ):
            return tyro.cli(
                command,
                prog=f"tvq {name}",
                description=_wrapped(command.__doc__ or ""),
                args=arguments,
                config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as exit:
        if exit.code:
            words = " ".join(re.sub(r"[│╭╮╰╯─]|--+ | [|+]", " ", heard.getvalue()).split())
            raise UsageError(f"the options cannot be used: {words}") from None
        print(f"examples:\n{command.examples.strip(chr(10))}")
        return None


def _known_options(command: type) -> dict[str, str | None]:
    """The options of a command, as they are typed: the metavar of each, if it has one."""
    known: dict[str, str | None] = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if get_origin(kind) is ClassVar or kind is ClassVar:
            continue
        if is_typeddict(kind):
            prefix = "" if flat_names in marks else f"{name}."
            names = [prefix + inner for inner in get_type_hints(kind)]
            known |= dict.fromkeys(f"--{inner.replace('_', '-')}" for inner in names)
        elif dataclasses.is_dataclass(kind) and OmitArgPrefixes in marks:
            known |= _known_options(cast(type, kind))
        else:
            metavar = next((m for x in marks if (m := getattr(x, "metavar", None))), None)
            known[f"--{name.replace('_', '-')}"] = metavar
    return known


def _refuse_values(known: Mapping[str, str | None], arguments: Sequence[str]) -> None:
    """Raise `UsageError` for an option that is no text and is empty, or has a NUL character.

    An empty path would be the current folder; mostly it is a variable of a shell that is not set.
    No file can have a name with NUL in it; a shell cannot give one, but a call of `main` can.
    """
    option = ""
    for argument in arguments:
        given, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = given.replace("_", "-")
        empty = argument == "" or (argument.startswith("--") and equals and not value)
        if known.get(option, "TEXT") == "TEXT":
            continue
        if empty:
            raise UsageError(f"{option} is empty: give a value, or leave it out")
        if "\0" in argument:
            raise UsageError(f"{option} has {shown(argument)}: leave out the NUL character")


# What tyro finds wrong, as one sentence.


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    """Meanwhile the terminal has at least `NARROWEST` columns, as far as anybody asks."""
    given = os.environ.get("COLUMNS")
    columns = shutil.get_terminal_size().columns
    if columns >= NARROWEST:
        yield
        return
    os.environ["COLUMNS"] = str(NARROWEST)
    try:
        yield
    finally:
        if given is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = given


def _told_of_errors(hear: Callable[[Any], None]) -> contextlib.AbstractContextManager[None]:
    """While it is open, tyro tells what is wrong before it draws a box of it.

    That part of tyro is private: a version without it gives what the box says, in one line.
    """
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        return contextlib.nullcontext()
    return on_parse_error(hear)


def _explained(event: Any, known: Sequence[str]) -> str | None:
    """The sentence for an error of tyro's; None for one of a kind that it does not know."""
    try:
        match type(event).__name__:
            case "UnrecognizedArgs":
                return _unknown(event.tokens[0], known)
            case "MissingArgs":
                if event.unrecognized_tokens:
                    return _unknown(event.unrecognized_tokens[0], known)
                missing = event.missing_arguments[0].arg
                name = missing.display_name()
                if missing.lowered.choices and not name.startswith("-"):
                    return f"say what to do: {', '.join(missing.lowered.choices)} SEE"
                return f"{name} is missing: give it SEE"
            case "BadValue":
                return f"{event.argument.display_name()} needs a value SEE"
            case "InvalidChoice":
                choices = [c for c in event.choices if c != "None"]
                if "None" in event.choices:  # tyro gives those of such an option in any order
                    choices.sort(key=lambda c: (int(c) if c.isdecimal() else 0, c))
                limit = f"one of {', '.join(choices)}"
                return str(refusal(event.argument.display_name(), event.value, limit))
            case "InstantiationFailure":
                return _not_a_number(event.argument.display_name(), event.message)
    except (AttributeError, IndexError):  # another version of tyro
        pass
    return None


def _unknown(token: str, known: Sequence[str]) -> str:
    if not token.startswith("-"):
        main = next((o for o in ("--run", "--data", "--file") if o in known), None)
        meant = f": perhaps you meant {main} {cut(token)}" if main else ""
        return f"there is no use for {shown(token)}{meant} SEE"
    nearest = difflib.get_close_matches(token.replace("_", "-"), known, n=1)
    meant = f", perhaps you meant {nearest[0]}" if nearest else ""
    return f"there is no option {cut(token)}{meant} SEE"


def _not_a_number(name: str, message: str) -> str:
    """From what Python says of text that is no number."""
    limit = "a number" if "float" in message else "a whole number"
    if found := re.search(r"base 10: '(.*)'|to float: '(.*)'", message):
        return str(refusal(name, found[1] or found[2] or "", limit))
    return f"{name} cannot be used: {cut(' '.join(message.split()))} SEE"


class _OneBlankLine:
    """A stream that writes one blank line where tyro writes two: between paragraphs, as it makes a
    line of its own of each line that is indented."""

    def __init__(self, stream: Any):
        self._stream, self._end = stream, ""

    def write(self, text: str) -> int:
        known = len(self._end)
        text = re.sub(r"\n{3,}", "\n\n", self._end + text)
        self._end = text[len(text.rstrip("\n")) :]
        return self._stream.write(text[known:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _wrapped(text: str) -> str:
    """A docstring with its paragraphs broken to the width of the terminal."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), 100)
    paragraphs = inspect.cleandoc(text).split("\n\n")
    # Indented, because tyro joins lines that begin with a letter.
    fill = textwrap.TextWrapper(width, initial_indent=" ", subsequent_indent=" ").fill
    return "\n\n".join(map(fill, paragraphs))
