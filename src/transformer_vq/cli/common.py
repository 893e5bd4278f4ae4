"""What several commands do: describe a model, train with progress, find a run's data."""

import os
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import numpy as np

from transformer_vq import costs
from transformer_vq.cli.cache import cache_folder
from transformer_vq.cli.parse import UsageError, option
from transformer_vq.cli.text import broken
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import (
    DataError,
    Source,
    Tokenizer,
    as_source,
    bundled_corpus,
    find_files,
    free_memory,
    is_task,
    open_source,
)
from transformer_vq.errors import UserError, plain
from transformer_vq.show.words import describe_model as describe_model
from transformer_vq.show.words import number as number
from transformer_vq.show.words import size as size

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from transformer_vq.run.folder import DataSource
    from transformer_vq.run.loop import TrainResult
    from transformer_vq.run.observer import Observer


CheckpointOption = Annotated[
    str, option("latest, best (by validation loss), or the step of a checkpoint", "NAME")
]


MOST_SMALL = 1 << 20  # bytes of a file of keys, or of a template


def program() -> str:
    """How to call this program again: `tvq`, or the path to it where the shell does not find it."""
    me, found = Path(sys.argv[0]), shutil.which("tvq")
    if me.name != "tvq" or not me.is_file() or (found and me.samefile(found)):
        return "tvq"
    return os.path.relpath(me)


def tell(text: str) -> None:
    """A line on standard error, whatever characters the names in it have."""
    print(f"tvq: {plain(text)}", file=sys.stderr)


def say(text: str) -> None:
    """A line on standard output, whatever characters the names in it have.

    A terminal that is narrower gets several, broken between words.
    """
    print(broken(plain(text)) if sys.stdout.isatty() else plain(text))


def quoted(path: str | os.PathLike) -> str:
    """A path as a shell wants it, and as it can be shown."""
    return plain(shlex.quote(os.fspath(path)))


def standard_input() -> BinaryIO:
    """Where `-` reads from. Raises `UsageError` if it is closed."""
    if sys.stdin is None:
        raise UsageError("standard input is closed: give a file, or - with something to read")
    return sys.stdin.buffer


def read_small(option: str, path: str | os.PathLike) -> bytes:
    """What a file of a few lines holds. Raises `UserError` for one that is large, or has no end.

    Of pipes only those that somebody holds open are read, as `<(...)` of a shell is.
    """
    given = f"{option} {os.fspath(path)}"
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode) and not os.fspath(path).startswith("/dev/"):
            raise UserError(f"{given} is a pipe: give a file")
        with open(path, "rb") as file:
            content = file.read(MOST_SMALL + 1)
    except OSError as error:
        raise UserError(f"{given} cannot be read ({error.strerror}): give a file") from None
    if len(content) > MOST_SMALL:
        raise UserError(f"{given} has more than {MOST_SMALL:,} bytes: give another file")
    return content


def check_file(option: str, path: str | os.PathLike) -> None:
    """Raise `UsageError` now, and not after the work, if no file can be written there.

    (A device or a pipe is written to as it is.)
    """
    target, given = Path(path), f"{option} is {os.fspath(path)}"
    if os.path.isdir(target):
        raise UsageError(f"{given}, which is a folder: give the name of a file")
    if not os.path.isdir(target.parent):
        raise UsageError(f"{given}: there is no such folder, make it first")
    if not os.path.exists(target) or os.path.isfile(target):
        check_folder(given, target.parent, "its folder")


def check_folder(given: str, folder: Path, what: str = "the folder") -> None:
    """Raise `UsageError` if a folder cannot be written to. `given`: "--out is x"."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{given}: {what} cannot be written to ({error.strerror})") from None


def join_processes(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Become one of the processes of a run, before JAX is used; only the first one prints.

    Without a coordinator, JAX finds the others itself, through SLURM, Kubernetes, Open MPI or the
    metadata of a TPU pod. Waits for all of them. Raises `UsageError` if there is nothing to find.
    """
    import jax

    by_hand = (coordinator or None, num_processes, process_id)
    try:
        jax.distributed.initialize(*by_hand)
    except ValueError as error:
        raise UsageError(
            f"--distributed finds no cluster that it knows ({' '.join(str(error).split())}): "
            f"give --coordinator HOST:PORT, --num-processes and --process-id"
        ) from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the end)


def train_with_progress(
    config: ModelConfig,
    train: TrainConfig,
    tokens: np.ndarray | Source,
    folder: Path,
    *,
    data: "DataSource",
    resume: bool,
    max_seconds: float | None = None,
    observers: "Sequence[Observer]" = (),
    mesh: "Mesh | None" = None,
    reword: Callable[[str], str] = str,
) -> "TrainResult":
    """`run.loop.train` on the train split of `tokens`, live on the terminal.

    `reword`: what becomes of the notes of a run, which name fields of configurations.
    """
    from transformer_vq.measure.memory import trim_after_compiling
    from transformer_vq.run import loop
    from transformer_vq.show.progress import Progress

    least = costs.least_training_bytes(config, train)
    require_memory(least, "their gradients and a batch", "--train.batch-size", mesh)
    trim_after_compiling()
    source = as_source(tokens)
    tokens_per_step = train.batch_size * train.update_len
    progress = Progress(train.steps, tokens_per_step, max_seconds=max_seconds, reword=reword)
    return loop.train(
        config,
        train,
        source.split("train"),
        source.split("validation") if "validation" in source.spans else None,
        folder,
        data=data,
        resume=resume,
        max_seconds=max_seconds,
        decode=None if source.whole_documents else source.tokenizer.decode_text,
        mesh=mesh,
        observers=(progress, *observers),
    )


def require_memory(least: int, what: str, smaller: str, mesh: "Mesh | None" = None) -> None:
    """Raise `UserError` if the devices' memory does not hold the bytes that are needed at least.

    They are of the parameters and `what`; `smaller`: the option that saves some. It would be found
    out only after a program is compiled, which may take for ever.
    """
    import jax

    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    try:
        if devices[0].platform == "cpu":
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * jax.process_count()
        else:
            memory = jax.local_devices()[0].memory_stats()["bytes_limit"] * len(devices)
    except (AttributeError, KeyError, TypeError, ValueError, OSError):
        return  # nobody knows
    if least > memory:
        raise UserError(
            f"the parameters, {what} take {size(least)}, and the memory is {size(memory)}: make "
            f"the model (--config.*) or {smaller} smaller"
        )


def memory_at_hand() -> int:
    """Bytes that one device of this process can still take, as far as the system says."""
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return free_memory()
    stats = device.memory_stats() or {}
    return max(0, stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))


def open_data(paths: Sequence[str | Path], *, tokenizer: Tokenizer, **how: Any) -> Source:
    """`open_source` with the cache of this user; says on standard error what was left out.

    And what of the text the vocabulary changes.
    """
    source = open_source(paths, tokenizer=tokenizer, cache=cache_folder("data"), **how)
    for note in source.notes:
        tell(note)
    if tokenizer.changes:
        tell(
            f"the vocabulary {tokenizer.name} does not give every text back as it was: it "
            f"changes {tokenizer.changes}"
        )
    return source


def describe_data(source: Source, part: Source) -> str:
    """The data of a run in one line; `part` is what is trained on."""
    if source.image_shape:
        shape = " x ".join(map(str, source.image_shape))
        return (
            f"{source.path}, {len(source.starts):,} pictures of {shape}, of which "
            f"{len(part.starts):,} to train on"
        )
    if source.counted is not None and source.whole_documents:
        answers = int(source.counted.sum()) // len(source.starts)
        return (
            f"{source.path}, {len(source.starts):,} episodes of {source.sequence_len:,} bytes with "
            f"{answers:,} answers, of which {len(part.starts):,} to train on"
        )
    size = f"{source.num_bytes:,} bytes"
    if len(source.tokens) != source.num_bytes:
        size = f"{len(source.tokens):,} tokens ({source.tokenizer.name}) of {size}"
    if len(source.starts) > 1:
        size += f" in {len(source.starts):,} documents"
    return f"{source.path}, {size}, of which {len(part.tokens):,} to train on"


def run_data(data: "DataSource", given: Sequence[str], tokenizer: Tokenizer) -> Source:
    """The data a run was trained on, or that given instead, read in the same way.

    Raises `DataError` if the run's own data has gone or changed.
    """
    how = {name: getattr(data, name) for name in ("text_column", "image_size", "on_error")}
    if given and (any(map(is_task, given)) or not find_files(given).images):
        how["image_size"] = 0
    elif given and data.image_shape:
        how["channels"] = data.image_shape[2]
    if given:
        return _like_the_run(open_data(given, tokenizer=tokenizer, **how), data)
    paths = list(data.paths)
    if not os.path.exists(paths[0]) and os.path.basename(paths[0]) == bundled_corpus().name:
        paths[0] = str(bundled_corpus())  # this program may have moved since
    for path in paths:
        if not is_task(path) and not os.path.exists(path):
            raise DataError(
                f"{path}, which the run was trained on, is not there any more: say where it is "
                f"with --data PATH"
            )
    source = open_data(paths, tokenizer=tokenizer, **how)
    if source.fingerprint != data.fingerprint:
        raise DataError(
            f"{source.path} has changed since the run was trained on it ({len(source.tokens):,} "
            f"tokens, not the {data.size:,} of then, or other ones): give --data PATH, of the same "
            f"name if you mean it"
        )
    return source


def _like_the_run(source: Source, data: "DataSource") -> Source:
    """The source. Raises `DataError` if it is text and the run is of pictures, and the like."""

    def said(shape: Sequence[int] | None) -> str:
        return f"pictures of {' x '.join(map(str, shape))}" if shape else "text"

    if source.image_shape != data.image_shape:
        raise DataError(
            f"{source.path} holds {said(source.image_shape)}, and the run was trained on "
            f"{said(data.image_shape)}: give data of its kind"
        )
    return source


@contextmanager
def progress_bar(
    what: str, *, quiet: bool = False, unit: str = "tokens"
) -> Iterator[Callable[[int, int | None], None]]:
    """A live line on standard error while it is open: call what it gives with (done, of all)."""
    if quiet:
        yield lambda done, total: None
        return

    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    from transformer_vq.show.console import Console

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.completed / max(task.elapsed or 0, 0.01):,.0f} {unit}/s")

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(24), TextColumn("{task.percentage:.0f} %"), Speed())
    hidden = not console.is_terminal
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=hidden, transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
