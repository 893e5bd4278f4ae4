"""What a model remembers beyond its window: `python benchmarks/recall.py --tasks far --seeds 1`.

For each task, model and seed, a small model is trained from nothing on episodes (docs/data.md,
"Tasks of memory") whose answers are farther back than its window reaches. Then it is asked on
held-out ones, with as much filler as it was trained with, 4 and 16 times as much. Models are with
key shift, gain and, in one of two units, a gate that forgets (vq), the same without the far part
(no-cache: what a window alone gives), and of full attention. A block in training holds an
episode, so that gradients reach every key; outputs do not depend on it (`--config.block-len 4
--config.soft-writes True`, or `--config.reach 64`, to compare). Evaluation carries the state
through chunks, so it takes linear time (full attention does not).

`reading` trains on text (Moby-Dick), and then reads 2,000 bytes of held-out text, other text, and
the same 2,000 bytes again: the gain is by how many bits per byte the second time costs less.

Prints a markdown table of means over seeds, or with --json a line for each seed with `task, model,
seed, filler, accuracy`, and of reading `first, second, gain` in bits per byte.

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

import jax
import numpy as np
import tyro

from transformer_vq import Model, ModelConfig, TrainConfig
from transformer_vq.cli.parse import overrides
from transformer_vq.data import Batches, Source, Task, as_source, bundled_corpus, load_bytes
from transformer_vq.errors import ConfigError, UserError
from transformer_vq.measure.reading import second_reading
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.train import (
    init_train_state,
    make_train_step,
    start_codebook,
    trained_model,
)

TASKS = {  # what is trained on
    "far": Task("far", pairs=6, filler=32),
    "updates": Task("updates", pairs=6, filler=32),
    "copy": Task("copy", pairs=12, letters=26, filler=64),
    "passkey": Task("passkey", pairs=5),
}
READING = "reading"
UPDATES, UPDATES_OF = 1000, {"copy": 2500}  # copying comes up late
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
    learning_rate=3e-3,
    warmup_steps=20,
    schedule="wsd",
    weight_decay=0.0,
    codebook_init="data",
    revive_below=0.1,
)
TEXT_LEN, PASSAGE, PASSAGES = 1024, 2000, 8
TEXT_CONFIG = CONFIG.replace(
    d_model=64, d_v=0, codebook_size=128, block_len=TEXT_LEN, window_len=64
)
ROW_TOKENS = 4096  # of a batch: how many rows it has, if --train.batch-size does not say
ASKED, ASKED_TOKENS = 256, 2**20  # held-out episodes of a length, and bytes of them, at most
ROWS = 16  # scored side by side

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
    updates: int | None = None  # of each task its own by default: 1,000, of copy 2,500
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
    tasks = [named(name, {**TASKS, READING: None}, "task") for name in args.tasks.split(",")]
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
    given = {"pairs": args.pairs, "filler": args.filler}
    given = {key: value for key, value in given.items() if value is not None}
    letters = 26 if given.get("pairs", 0) > TASKS[name].letters else TASKS[name].letters
    task = dataclasses.replace(TASKS[name], episodes=0, letters=letters, seed=seed, **given)
    config = configured(CONFIG.replace(block_len=task.length), model_name, args)
    model = trained(config, recipe(name, task.length, seed, args), task.source().split("train"))
    for times in map(int, args.lengths.split(",")):
        count = min(ASKED, max(ASKED_TOKENS // (task.length + times * task.filler), ROWS))
        longer = dataclasses.replace(task, filler=times * task.filler, episodes=20 * count)
        asked = longer.source().split("test")
        rows = ROWS if config.attention == "vq" else 1  # all keys of all rows are too many
        result = evaluate(model, asked, rows=min(rows, count), chunk_len=512)
        yield {
            "task": name,
            "model": model_name,
            "seed": seed,
            "filler": longer.filler,
            "accuracy": result.accuracy,
        }


def reading(name: str, model_name: str, seed: int, args: Options) -> Iterator[dict[str, Any]]:
    """Train on text; then bits per byte of held-out passages, the first and the second time."""
    text = as_source(load_bytes(bundled_corpus()))
    model = trained(
        configured(TEXT_CONFIG, model_name, args),
        recipe(name, TEXT_LEN, seed, args),
        text.split("train"),
    )
    held_out = np.concatenate([text.split("validation").tokens, text.split("test").tokens])
    for times in map(int, args.lengths.split(",")):
        read = second_reading(
            model, held_out, passage=PASSAGE, between=times * PASSAGE, passages=PASSAGES
        )
        yield {
            "task": name,
            "model": model_name,
            "seed": seed,
            "filler": times * PASSAGE,
            "accuracy": None,
            "first": read.first,
            "second": read.second,
            "gain": read.gain,
        }


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
    usual = UPDATES_OF.get(name, UPDATES)
    chosen: dict[str, Any] = {
        "batch_size": max(4, ROW_TOKENS // length),
        "sequence_len": length,
        "update_len": length,
        "steps": usual if args.updates is None else args.updates,
        **args.train,
    }
    return dataclasses.replace(TRAIN, seed=seed, **chosen)


def trained(config: ModelConfig, train: TrainConfig, source: Source) -> Model:
    """The model after `train.steps` updates on a source."""
    batches = Batches(
        source.tokens,
        starts=source.starts,
        counted=source.counted,
        whole_documents=source.whole_documents,
        batch_size=train.batch_size,
        sequence_len=train.sequence_len,
        seed=train.seed,
    )
    state = jax.jit(init_train_state, static_argnums=(0, 1))(config, train)
    if config.attention == "vq" and train.codebook_init == "data":
        start = jax.jit(start_codebook, static_argnums=(0, 1))
        state = start(config, train, state, batches.batch(0))
    step = make_train_step(config, train)
    for i in range(train.steps // train.updates_per_sequence):
        state, _ = step(state, batches.batch(i))
    return trained_model(state, config)


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
        fillers = sorted({row["filler"] for row in rows if row["task"] == task})
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [r for r in rows if (r["task"], r["model"]) == (task, model)]
            values = [[r[name] for r in mine if r["filler"] == f] for f in fillers]
            means = [statistics.mean(v) for v in values]
            axes.plot(fillers, means, color=colors[model], marker="o", markersize=4, label=model)
            for filler, seeds in zip(fillers, values, strict=True):
                axes.plot([filler] * len(seeds), seeds, ".", color=colors[model], alpha=0.4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(fillers, [f"{f:,}" for f in fillers])
        axes.set_title(task, loc="left", fontweight="bold", fontsize=10)
        axes.set_xlabel("bytes of filler")
        axes.set_ylabel("gain, bits per byte" if task == READING else "answers right")
        if task != READING:
            axes.set_ylim(-0.03, 1.03)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
