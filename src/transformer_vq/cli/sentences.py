"""What the command line says of an error: one sentence, whatever the names in it."""

import contextlib
import errno
import os
import re
import sys

from transformer_vq.cli.cache import cache_folder
from transformer_vq.cli.streams import output_fails
from transformer_vq.errors import cut, plain

MOST = 1000  # characters
MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # in errors of XLA

SMALLER = {  # what to make smaller where memory runs out
    "train": "--train.batch-size, --train.update-len or the model (--config.*)",
    "eval": "--rows or --chunk-len",
    "sample": "--num-samples or the prompt",
    "prefill": "the prompt",
    "serve": "--slots or --state-cache",
    "batch": "--slots or --state-cache",
    "score": "the text",
    "tokenizer": "--vocab-size or the data",
    "bench": "--batch, --length or the model (--config.*)",
}


def end(text: str, status: int) -> int:
    """Say it on standard error, if somebody listens there."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
    return status


def sentence(error: Exception) -> str:
    """What a `UserError` says, or of an `OSError` which file cannot be used and why."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        if name is not None and not isinstance(name, int):
            text = f"cannot use {cut(str(name), 300)}: {error.strerror}"
        elif output_fails(error):
            text = f"cannot write the output: {error.strerror}"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = (
                f"cannot write a file: {error.strerror}; look at the disks of the output, of the "
                f"run folder, of {_cache_name()} and of the folder for temporary files"
            )
        else:
            text = f"cannot use a file: {error.strerror}"
    return cut(plain(" ".join(text.split())), MOST)


def _cache_name() -> str:
    folder = cache_folder("data")
    return f"the cache {folder.parent}" if folder else "the cache"


def out_of_memory(error: Exception) -> bool:
    """Whether an error, of Python or of XLA, says that memory does not suffice."""
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        return any(words in str(error) for words in MEMORY)
    return isinstance(error, MemoryError)


def too_large(error: Exception, command: str) -> str:
    """What did not fit, and what to make smaller."""
    of_xla = re.search(r"[Oo]ut of memory.*?(\d+) ?bytes", str(error))
    of_numpy = re.search(r"Unable to allocate (.*?) for", str(error))
    wanted = f"{int(of_xla[1]) / 1e9:,.1f} GB" if of_xla else of_numpy[1] if of_numpy else ""
    said = f": {wanted} were needed at once" if wanted else ""
    return f"memory does not suffice{said}; make {SMALLER.get(command, 'it')} smaller"
