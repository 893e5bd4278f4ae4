"""What several commands do: describe a model, train with progress, find a run's data."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from transformer_vq import costs
from transformer_vq.cli.parse import UsageError, option
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import (
    ByteTokenizer,
    DataError,
    bundled_corpus,
    fingerprint,
    load_bytes,
    split,
)

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from transformer_vq.metrics import Tracker
    from transformer_vq.ops.loop import TrainResult
    from transformer_vq.ops.run import DataSource


CheckpointOption = Annotated[
    str, option("latest, best (by validation loss), or the step of a checkpoint", "NAME")
]


def number(value: float) -> str:
    """A large number as people read it: `1.23 M`."""
    for power, name in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {name}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes as people read them: `1.23 MB`."""
    return f"{number(count)}B" if count >= 1000 else f"{count:.0f} bytes"


def program() -> str:
    """How to call this program again: `tvq`, or the path to it where the shell does not find it."""
    me, found = Path(sys.argv[0]), shutil.which("tvq")
    if me.name != "tvq" or not me.is_file() or (found and me.samefile(found)):
        return "tvq"
    return os.path.relpath(me)


def describe_model(config: ModelConfig) -> str:
    """A model in one line."""
    attention = f"{config.codebook_size} codes" if config.attention == "vq" else "full attention"
    return (
        f"{number(costs.parameter_count(config))} parameters, {config.num_layers} layers of width "
        f"{config.d_model}, {attention}, window {config.window_len}, "
        f"{size(costs.state_bytes(config))} of state"
    )


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
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the end)


def train_with_progress(
    config: ModelConfig,
    train: TrainConfig,
    tokens: np.ndarray,
    folder: Path,
    *,
    data: "DataSource",
    resume: bool,
    max_seconds: float | None = None,
    trackers: "Sequence[Tracker]" = (),
    mesh: "Mesh | None" = None,
) -> "TrainResult":
    """`ops.loop.train` on the train split of `tokens`, live on the terminal."""
    from transformer_vq.metrics import Progress
    from transformer_vq.ops import loop

    tokens_per_step = train.batch_size * train.update_len
    with Progress(train.steps, tokens_per_step, max_seconds=max_seconds) as progress:
        return loop.train(
            config,
            train,
            split(tokens, "train"),
            split(tokens, "validation"),
            folder,
            data=data,
            resume=resume,
            max_seconds=max_seconds,
            decode=ByteTokenizer().decode_text,
            trackers=trackers,
            mesh=mesh,
            on_record=progress.show,
            on_save=progress.saved,
            say=progress.say,
        )


def run_data(data: "DataSource", given: str) -> tuple[Path, np.ndarray]:
    """The file a run was trained on, or the one given instead: its path and its tokens.

    Raises `DataError` if the run's own file has gone or changed.
    """
    if given:
        return Path(given), load_bytes(given)
    path = Path(data.path)
    if not path.is_file() and path.name == bundled_corpus().name:
        path = bundled_corpus()  # this program may have moved since
    if not path.is_file():
        raise DataError(
            f"{path}, which the run was trained on, is not there any more: say where it is with "
            f"--data FILE"
        )
    tokens = load_bytes(path)
    if fingerprint(tokens) != data.fingerprint:
        raise DataError(
            f"{path} has changed since the run was trained on it ({len(tokens):,} bytes, not the "
            f"{data.size:,} of then, or other ones): give --data FILE, of the same name if you "
            f"mean it"
        )
    return path, tokens


@contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A live line on standard error while it is open: call what it gives with (done, of all)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.completed / max(task.elapsed or 0, 0.01):,.0f} tokens/s")

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(24), TextColumn("{task.percentage:.0f} %"), Speed())
    hidden = quiet or not console.is_terminal
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=hidden, transient=True
    ) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
