"""The command line, `tvq`: one module per command, and here what they share from start to exit.

A command is a dataclass: its fields are the options, `main()` does the work and returns the exit
status. JAX is imported in there, never at the top of a module, so that help and wrong options
answer at once.

Exit status: 0; 1 if something given cannot be used; 2 for wrong options; 130 after Ctrl-C.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from transformer_vq.cli import parse
from transformer_vq.cli.parse import UsageError

# Name: (module, class, one line for the list).
COMMANDS = {
    "demo": ("demo", "Demo", "train on a book that comes with it, evaluate, sample: five minutes"),
    "train": ("train", "Train", "train a model on a file, or go on with a run"),
    "eval": ("evaluate", "Evaluate", "how well a model predicts a text: bits per byte"),
    "score": ("score", "Score", "how probable a model finds a text, its lines and its tokens"),
    "sample": ("sample", "Sample", "write text"),
    "tokenizer": ("tokenizer", "Tokenizer", "make a vocabulary from text"),
    "prefill": ("sample", "Prefill", "read a long prompt once and keep the state it leaves"),
    "bench": ("bench", "Bench", "how fast this machine runs a model, beside what it can do"),
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
  TVQ_CACHE        folder of compiled programs, so that a second start is fast, and of data made
                   into tokens; empty: none
                   (default: {cache})
  TVQ_TRACEBACK    1: show where an error came from
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tvq` with these arguments, by default those of the process; return the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ntvq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone: nothing to say, nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get("TVQ_TRACEBACK") or not _is_ours(error):
            raise
        print(f"tvq: {_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _run(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:{width}}  {line}" for name, (_, _, line) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines), cache=_default_cache()), end="")
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"tvq {version('transformer-vq')}")
        return 0
    if name not in COMMANDS:
        raise UsageError(
            f"there is no command {name!r}: the commands are {', '.join(COMMANDS)} (see tvq --help)"
        )
    module, kind, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"transformer_vq.cli.{module}"), kind)
    options = parse.options(command, name, rest)
    if options is None:  # it was a question, and is answered
        return 0
    _use_compilation_cache()
    return options.main()


def _is_ours(error: Exception) -> bool:
    """Whether an error is a wrong input that our code found, and not a fault of the program."""
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parents[1]) + os.sep
    return bool(frames) and frames[-1].filename.startswith(package)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot use{where or ' a file'}: {error.strerror}"
    return " ".join(str(error).split())


# Compiled programs, kept between starts.


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "transformer-vq" / "jax"


def _use_compilation_cache() -> None:
    """Let JAX keep compiled programs in a folder of the user's, if that can be written to."""
    folder = Path(os.environ.get("TVQ_CACHE", _default_cache()))
    if os.environ.get("TVQ_CACHE") == "" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    if "jax" in sys.modules:
        import jax

        for name, value in settings.items():
            jax.config.update(name, value)
    else:  # JAX reads these when it is imported
        os.environ.update({name.upper(): str(value) for name, value in settings.items()})
