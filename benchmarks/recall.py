"""What a model remembers beyond its window: `python benchmarks/recall.py --tasks far --seeds 1`.

For each task, model and seed, a small model is trained from nothing on episodes (docs/data.md,
"Tasks of memory") whose answers are farther back than its window reaches. Then it is asked on
held-out ones, with as much filler as it was trained with, 4 and 16 times as much. Models are with
key shift, gain and, in one of two units, a gate that forgets (vq), the same without the far part
(no-cache: what a window alone gives), and of full attention. A block in training holds an
episode, so that gradients reach every key; outputs do not depend on it (`--config.block-len 4
--config.soft-writes True`, or `--config.reach 64`, to compare). Evaluation carries the state
through chunks, so it takes linear time (full attention does not).

`reading` trains on text (Moby-Dick) in which passages come again, and then reads passages of
held-out text, other text, and the same passages again: the gain is by how many bits per byte the
second time costs less, `far` what of the second time is owed to keys beyond the window.

Prints a markdown table of means over seeds, or with --json a line for each seed with `task, model,
seed, filler, accuracy`, and of reading `first, second, gain, far` in bits per byte.

    python benchmarks/recall.py --tasks far,updates,copy --seeds 3 --json
    python benchmarks/recall.py --tasks far --models vq --config.key-shift False
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from transformer_vq import ModelConfig, TrainConfig
from transformer_vq.cli.parse import overrides
from transformer_vq.data import Task, bundled_corpus, load_bytes, split
from transformer_vq.data.tasks import AUTO
from transformer_vq.errors import ConfigError, UserError
from transformer_vq.measure.reading import second_reading
from transformer_vq.measure.recall import share_right, train_on

TASKS = {  # what is trained on: where something is told amid the filler, it is asked far later
    "far": Task("far", pairs=6, filler=32, nearest=0),
    "updates": Task("updates", pairs=6, filler=32),  # amid it, 16 times as far was forgotten
    "copy": Task("copy", pairs=12, letters=26, filler=32, nearest=0),
    "passkey": Task("passkey", pairs=5, filler=64, nearest=0),
    "reading": Task("reading", pairs=100, filler=200),
}
READING = "reading"
UPDATES = 800
TRAIN_OF: dict[str, dict[str, Any]] = {
    "far": {"steps": 500},
    "updates": {"steps": 1400, "optimizer": "adamw", "learning_rate": 3e-3},
    "passkey": {"steps": 1600, "batch_size": 25, "learning_rate": 3e-3},
    "reading": {"steps": 600, "optimizer": "adamw", "learning_rate": 3e-3},
}
# The part of the updates in which the rate goes down, else a fifth. What is learned well is trained
# on without any loss, and drifts: at a low rate less (docs/log.md).
LINE_DOWN = {"updates": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "vq": {},
    "no-cache": {"use_cache": False, "reach": 0, "soft_writes": False},
    "full": {"attention": "full"},
}
CONFIG = ModelConfig(
    d_model=32,
    d_k=32,
    num_layers=1,
    codebook_size=64,
    window_len=4,
    codebook_decay=0.95,
    key_shift=True,
    score_gain=True,
    forget="gated",
    long_units=1,  # of two
)
TRAIN = TrainConfig(
    optimizer="muon",
    learning_rate=5e-3,
    warmup_steps=20,
    schedule="wsd",
    weight_decay=0.0,
    codebook_init="data",
    revive_below=0.1,
)
PASSAGES = 32
PASSKEY_CONFIG = CONFIG.replace(d_model=64, d_v=0, codebook_size=256, window_len=16)
READING_CONFIG = PASSKEY_CONFIG.replace(
    forget="none",  # a cap bounds what is far, as in the demo
    long_units=0,
    far_cap=512,
)
ROW_TOKENS = 4096  # of a batch: how many rows it has, if --train.batch-size does not say
ASKED, ASKED_TOKENS = 256, 2**20  # held-out episodes of a length, and bytes of them, at most
LEAST_ASKED = 16

if TYPE_CHECKING:
    ConfigOptions = dict[str, Any]
    TrainOptions = dict[str, Any]
else:
    ConfigOptions = overrides(ModelConfig, "ConfigOptions", lambda f: "")
    TrainOptions = overrides(TrainConfig, "TrainOptions", lambda f: "")


@dataclass
class Options:
    """Train small models to remember, and ask them."""

    tasks: str = "far,updates,copy,passkey,reading"
    models: str = "vq,no-cache,full"
    seeds: int = 1
    updates: int | None = None  # of each task its own by default
    pairs: int | None = None  # keys, letters or digits to remember; of each task its own by default
    filler: int | None = None  # bytes of filler in training
    lengths: str = "1,4,16"  # filler when it is asked, over that of training
    config: tyro.conf.FlagConversionOff[ConfigOptions] = field(default_factory=dict)
    train: tyro.conf.FlagConversionOff[TrainOptions] = field(default_factory=dict)
    json: bool = False
    plot: Path | None = None  # a figure, as PNG or SVG


def main() -> None:
    """Measure all that is asked for."""
    args = tyro.cli(Options, description=__doc__)
    try:
        rows = measured(args)
    except UserError as error:
        sys.exit(f"recall.py: {error}")
    if args.plot:
        draw(rows, args.plot)


def measured(args: Options) -> list[dict[str, Any]]:
    """Every row, printed as it is known if it is JSON, and else as a table at the end."""
    tasks = [named(name, TASKS, "task") for name in args.tasks.split(",")]
    models = [named(name, MODELS, "model") for name in args.models.split(",")]
    rows = []
    for task in tasks:
        for name in models:
            for seed in range(args.seeds):
                measure = reading if task == READING else recall
                for row in measure(task, name, seed, args):
                    rows.append(row)
                    if args.json:
                        print(json.dumps(row), flush=True)
                    else:
                        print(f"{row}", file=sys.stderr, flush=True)
    if not args.json:
        print("\n".join(table(rows)))
    return rows


def named(name: str, known: dict[str, Any], what: str) -> str:
    """The name, if it is known."""
    if name not in known:
        raise UserError(f"there is no {what} {name!r}: there are {', '.join(known)}")
    return name


def recall(name: str, model_name: str, seed: int, args: Options) -> Iterator[dict[str, Any]]:
    """Train on a task; then the share of right answers, by filler."""
    task = chosen(name, seed, args)
    base = PASSKEY_CONFIG if task.kind == "passkey" else CONFIG
    config = configured(base.replace(block_len=task.length), model_name, args)
    model = train_on(config, recipe(name, task.length, seed, args), task.source().split("train"))
    for times in map(int, args.lengths.split(",")):
        count = min(ASKED, max(ASKED_TOKENS // (task.length + times * task.filler), LEAST_ASKED))
        longer = dataclasses.replace(task, filler=times * task.filler, nearest=AUTO, episodes=AUTO)
        yield {
            "task": name,
            "model": model_name,
            "seed": seed,
            "filler": longer.filler,
            "accuracy": share_right(model, longer, episodes=count),
        }


def reading(name: str, model_name: str, seed: int, args: Options) -> Iterator[dict[str, Any]]:
    """Train on text with passages that come again; then bits per byte of held-out passages, the
    first and the second time, and what the far part brings to the second."""
    task = chosen(name, seed, args)
    config = configured(READING_CONFIG.replace(block_len=task.length), model_name, args)
    model = train_on(config, recipe(name, task.length, seed, args), task.source().split("train"))
    text = load_bytes(bundled_corpus())
    held_out = np.concatenate([split(text, "validation"), split(text, "test")])
    for times in map(int, args.lengths.split(",")):
        between = times * task.filler
        read = second_reading(
            model,
            held_out,
            passage=task.pairs,
            between=between,
            passages=PASSAGES,
            far_gain=True,
            start=0,  # as episodes begin
        )
        yield {
            "task": name,
            "model": model_name,
            "seed": seed,
            "filler": between,
            "accuracy": None,
            "first": read.first,
            "second": read.second,
            "gain": read.gain,
            "far": read.far,
            "far_error": read.far_error,
        }


def chosen(name: str, seed: int, args: Options) -> Task:
    """What is trained on: the task of that name, with the sizes that are given."""
    task = TASKS[name]
    given = {"pairs": args.pairs, "filler": args.filler}
    given = {key: value for key, value in given.items() if value is not None}
    letters = 26 if given.get("pairs", 0) > task.letters else task.letters
    return dataclasses.replace(task, episodes=AUTO, letters=letters, seed=seed, **given)


def configured(base: ModelConfig, model_name: str, args: Options) -> ModelConfig:
    """The model: with the fields that are given, as far as this kind of model has them."""
    given: dict[str, Any] = dict(args.config)
    if given.keys() & {"d_model", "d_k", "head_type"}:
        given = {"d_v": 0, "num_heads": 0, **given}
    base.replace(**given)  # a wrong value is nobody's
    while True:
        try:
            return base.replace(**{**given, **MODELS[model_name]})
        except ConfigError as error:
            if error.field not in given:
                raise
            print(f"{model_name} without {error.field}: {error}", file=sys.stderr)
            del given[error.field]


def recipe(name: str, length: int, seed: int, args: Options) -> TrainConfig:
    """How a model is trained on rows of this length, of this task."""
    chosen: dict[str, Any] = {
        "batch_size": max(4, ROW_TOKENS // length),
        "sequence_len": length,
        "update_len": length,
        "steps": UPDATES,
        **TRAIN_OF.get(name, {}),
        **({} if args.updates is None else {"steps": args.updates}),
        **args.train,
    }
    if name in LINE_DOWN:
        chosen.setdefault("decay_steps", max(1, int(LINE_DOWN[name] * chosen["steps"])))
    return dataclasses.replace(TRAIN, seed=seed, **chosen)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Means over seeds, and the least: a line for each task and model, `filler: value` in cells."""
    columns = max(len({row["filler"] for row in rows if row["task"] == r["task"]}) for r in rows)
    yield "| task | model |" + " filler: right |" * columns
    yield "|---|---|" + "---|" * columns
    for task, model in dict.fromkeys((row["task"], row["model"]) for row in rows):
        cells = []
        mine = [row for row in rows if (row["task"], row["model"]) == (task, model)]
        for filler in dict.fromkeys(row["filler"] for row in mine):
            name = "gain" if task == READING else "accuracy"
            values = [row[name] for row in mine if row["filler"] == filler]
            least = f" (least {min(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{filler:,}: {statistics.mean(values):.2f}{least}")
        yield f"| {task} | {model} | " + " | ".join(cells) + " |"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each task: accuracy (of reading, the gain) over filler, a line for each model."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    colors = dict(zip(MODELS, ("#0b62a8", "#8a8a8a", "#c25400"), strict=True))
    figure = Figure(figsize=(3.2 * len(tasks), 3.2), dpi=150, layout="constrained")
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        name = "gain" if task == READING else "accuracy"
        asked = [row for row in rows if row["task"] == task]
        for model in dict.fromkeys(row["model"] for row in asked):
            mine = [row for row in asked if row["model"] == model]
            fillers = sorted({row["filler"] for row in mine})
            values = [[r[name] for r in mine if r["filler"] == f] for f in fillers]
            means = [statistics.mean(v) for v in values]
            axes.plot(fillers, means, color=colors[model], marker="o", markersize=4, label=model)
            for filler, seeds in zip(fillers, values, strict=True):
                axes.plot([filler] * len(seeds), seeds, ".", color=colors[model], alpha=0.4)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["filler"] for row in asked})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.set_title(task, loc="left", fontweight="bold", fontsize=10)
        axes.set_xlabel("bytes of filler")
        axes.set_ylabel("gain, bits per byte" if task == READING else "answers right")
        if task != READING:
            axes.set_ylim(-0.03, 1.03)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].legend(frameon=False, loc="center left")
    figure.savefig(path)


if __name__ == "__main__":
    main()
