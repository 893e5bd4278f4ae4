"""The command line, `tvq`: one module per command, and here what they share from start to exit.

A command is a dataclass: its fields are the options, `main()` does the work and returns the exit
status. JAX is imported in there, never at the top of a module, so that help and wrong options
answer at once.

Exit status: 0; 1 if something given cannot be used; 2 for wrong options; 130 after Ctrl-C (and 143
after SIGTERM, for a command that ends by it in good order); 141 if the reader of the output has
gone. What is neither a `UserError` nor the machine's (files, memory, devices) is a fault of the
program: it keeps its traceback, with status 1.
"""

import difflib
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from transformer_vq.cli import parse
from transformer_vq.cli.cache import cache_folder, use_compilation_cache
from transformer_vq.cli.environment import of_environment, settle_environment, without_devices
from transformer_vq.cli.interrupts import Interrupts, leave
from transformer_vq.cli.parse import UsageError
from transformer_vq.cli.sentences import (
    end,
    out_of_memory,
    sentence,
    too_large,
)
from transformer_vq.cli.streams import drop_output, open_streams
from transformer_vq.errors import UserError, plain, shown

# Name: (module, class, one line for the list).
COMMANDS = {
    "demo": ("demo", "Demo", "train on a bundled book, evaluate, sample: five minutes"),
    "train": ("train", "Train", "train a model on a file, or go on with a run"),
    "eval": ("evaluate", "Evaluate", "how well a model predicts a text: bits per byte"),
    "score": ("score", "Score", "how probable a model finds a text, its lines and its tokens"),
    "sample": ("sample", "Sample", "write text"),
    "serve": ("serve", "Serve", "serve a model: OpenAI's API, and a page to play on"),
    "batch": ("batch", "Batch", "answer a file of requests, or of prompts, one a line"),
    "draw": ("draw", "Draw", "draw pictures"),
    "tokenizer": ("tokenizer", "Tokenizer", "make a vocabulary from text"),
    "prefill": ("prefill", "Prefill", "read a long prompt once and keep the state it leaves"),
    "export": ("export", "Export", "a trained model as a folder to carry, keep or publish"),
    "import-official": (
        "import_official",
        "ImportOfficial",
        "weights of the paper's own implementation as such a folder",
    ),
    "bench": ("bench", "Bench", "how fast this machine runs a model, beside what it can do"),
    "bench compile": ("compile", "Compile", "what programs need on devices that are not here"),
    "info": ("info", "Info", "what a run is: sizes, costs, data, losses, checkpoints"),
    "report": ("report", "Report", "a run as one HTML page: curves, codebooks, samples"),
}

HELP = """\
usage: tvq COMMAND [OPTIONS]

Transformer-VQ: models of very long sequences, at constant memory.

commands:
{commands}

  tvq COMMAND --help    all options of a command, with their defaults
  tvq --version

examples:
  tvq demo
  tvq train --data book.txt --out runs/book --steps 2000
  tvq eval --run runs/book
  tvq sample --run runs/book --prompt 'It was' --temperature 0.8

environment:
  TVQ_CACHE      folder of compiled programs, so that a second start is fast,
                 and of data made into tokens; empty: none
                 ({cache})
  TVQ_TRACEBACK  1: show where an error came from
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tvq` with these arguments, and return the exit status.

    By default it is the program: with the arguments of the process, which Ctrl-C ends at once.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if argv is None:  # looking for garbage as often as by default takes 6 % of a start
        gc.set_threshold(10_000, 20, 100)
    open_streams()
    try:
        with Interrupts(last=argv is None):
            status = _run(arguments)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        status = end("\ntvq: interrupted", 130)
        return leave(status) if argv is None else status
    except BrokenPipeError:  # whoever read the output has gone: nothing to say, nobody to say it to
        drop_output()
        return 141
    except (UserError, OSError) as error:
        if os.environ.get("TVQ_TRACEBACK"):
            raise
        status = 2 if isinstance(error, UsageError) else 1
        return end(f"tvq: {_with_options(sentence(error), error, arguments)}", status)
    except Exception as error:
        if out_of_memory(error) and not os.environ.get("TVQ_TRACEBACK"):
            return end(f"tvq: {too_large(error, arguments[0])}", 1)
        if (why := of_environment(error) or without_devices()) and not os.environ.get(
            "TVQ_TRACEBACK"
        ):
            return end(f"tvq: {why}", 1)
        error.add_note(
            "tvq: this is a fault of the program, not of what was given: please report it, with "
            "the command and all of the above"
        )
        raise


def _run(arguments: list[str]) -> int:
    name, rest = split_command(arguments or ["--help"])
    if name in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:{width}}  {line}" for name, (_, _, line) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines), cache=_said_cache()), end="")
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"tvq {version('transformer-vq')}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"perhaps you meant {nearest[0]}; " if nearest else ""
        raise UsageError(
            f"there is no command {shown(name)}: {meant}the commands are {', '.join(COMMANDS)} "
            f"(see tvq --help)"
        )
    options = parse.options(_command(name), name, rest)
    if options is None:  # it was a question, and is answered
        return 0
    settle_environment()
    if name != "tokenizer":  # which does without JAX
        use_compilation_cache()
    return options.main()


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of a command, of one word or two, and its options."""
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    return " ".join(arguments[:words]), arguments[words:]


def _command(name: str) -> type:
    module, kind, _ = COMMANDS[name]
    return getattr(importlib.import_module(f"transformer_vq.cli.{module}"), kind)


def _with_options(text: str, error: Exception, arguments: list[str]) -> str:
    """What a `UserError` says, in terms of the options of the command that was called."""
    name, _ = split_command(arguments)
    if name not in COMMANDS or not isinstance(error, UserError):
        return text
    return parse.with_options(text, _command(name), getattr(error, "field", ""))


def _said_cache() -> str:
    """What help says of the folder that is used."""
    folder = cache_folder("jax")
    if "TVQ_CACHE" in os.environ:
        return f"now: {plain(str(folder)) if folder else 'none'}"
    return f"default: {folder or 'none, where there is no home folder'}"
