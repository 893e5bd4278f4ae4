"""`tvq info`: what a run is and what its model costs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from transformer_vq import costs
from transformer_vq.cli.common import CheckpointOption, memory_at_hand, number, size, tell
from transformer_vq.cli.models import RunFolder, local
from transformer_vq.cli.parse import option
from transformer_vq.cli.served import STATE_CACHE
from transformer_vq.config import DEFAULT_CAPACITY, ModelConfig
from transformer_vq.errors import plain
from transformer_vq.run.log import to_json

NARROW = 36  # columns, from which on a name and what it is stand side by side


@dataclass
class Info:
    """Show what a run is: sizes and costs of its model, what it was trained on, how far it is.

    Costs are counted from the configuration: parameters and state are exact, operations are those
    of matrix products.
    """

    examples: ClassVar[str] = """
  tvq info --run runs/book
  tvq info --run runs/book --json
"""

    run: RunFolder
    checkpoint: CheckpointOption = "latest"
    json: Annotated[bool, option("print JSON, with the whole configuration")] = False

    def main(self) -> int:
        record = describe(local(self.run), self.checkpoint) | {"run": str(self.run)}
        if self.json:
            print(to_json(record))
        else:
            _show(record)
        return 0


def describe(folder: Path, checkpoint: str = "latest") -> dict[str, Any]:
    """All that `tvq info` tells. Raises a `UserError` as `load_info` does."""
    from transformer_vq.run.folder import find_step, load_info
    from transformer_vq.run.log import damaged_lines, read_metrics

    info = load_info(folder, find_step(folder, checkpoint))
    config, train = info.config, info.train
    checkpoints, damage = _checkpoints(folder, info.step)
    damaged = [damaged_lines(folder / name) for name in ("metrics.jsonl", "samples.jsonl")]
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] <= info.step]
    last: dict[str, Any] = {}
    for record in records:
        last |= record
    memory = memory_at_hand()
    room = info.context_limit or DEFAULT_CAPACITY
    return {
        "run": str(folder),
        "model": {
            "parameters": costs.parameter_count(config),
            "codebook": costs.codebook_count(config),
            "state_bytes": costs.state_bytes(config),
            "decode_bytes": costs.decode_bytes(config),
            "decode_flops": costs.decode_flops(config),
            "train_flops": costs.run_flops(config, train),
        },
        "serving": {
            "slot_bytes": costs.slot_bytes(config, room),
            "memory": memory,
            "slots": costs.slots_that_fit(config, memory - (STATE_CACHE << 20), room),
        },
        "data": {**dataclasses.asdict(info.data), "tokenizer": info.tokenizer},
        "training": {
            "step": info.step,
            "steps": train.steps,
            "tokens": info.step * train.batch_size * train.update_len,
            "seconds": info.seconds,
            **{
                name: last.get(name)
                for name in ("loss", "bpb", "validation_loss", "validation_bpb")
            },
        },
        "checkpoints": checkpoints,
        "damage": [text for text in (damage, *damaged) if text],
        "config": config.to_dict(),
        "train": dataclasses.asdict(train),
    }


def _checkpoints(folder: Path, exported: int) -> tuple[list[dict[str, Any]], str]:
    """The checkpoints of a run, and what is wrong with them; of an exported model the one it is.

    `exported`: its step.
    """
    from transformer_vq.io.checkpoint import CheckpointError
    from transformer_vq.io.export import MODEL_FILE, is_export
    from transformer_vq.run.folder import checkpoints_of

    if is_export(folder):
        bytes_ = (folder / MODEL_FILE).stat().st_size
        return [{"step": exported, "best": False, "bytes": bytes_}], ""
    checkpoints = checkpoints_of(folder)
    try:
        best, damage = checkpoints.best(), ""
    except CheckpointError as error:
        best, damage = None, str(error)
    sizes = {step: _folder_size(folder / "checkpoints" / str(step)) for step in checkpoints.steps()}
    return [{"step": s, "best": s == best, "bytes": size} for s, size in sizes.items()], damage


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _show(record: dict[str, Any]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from transformer_vq.show.console import Console
    from transformer_vq.show.words import describe_attention, duration

    model, data, training = record["model"], record["data"], record["training"]
    config, train = ModelConfig.from_dict(record["config"]), record["train"]
    console = Console(highlight=False)
    stacked = console.width < NARROW
    table = Table.grid(padding=(0, 2))
    table.add_column(style="" if stacked else "bold", no_wrap=not stacked)
    table.add_column(overflow="fold")

    def section(title: str) -> None:
        table.add_row()
        table.add_row(f"[cyan]{title}[/cyan]")

    def row(name: str, value: "str | Text") -> None:
        if not stacked:
            table.add_row(name, value)
            return
        if name:
            table.add_row(f"[bold]{name}[/bold]")
        table.add_row(Padding(value, (0, 0, 0, 2)))

    section("model")
    row("layers", f"{config.num_layers} of width {config.d_model}")
    attention = describe_attention(config)
    heads = "1 head" if config.num_heads == 1 else f"{config.num_heads} heads"
    row("attention", f"{attention}, {heads} ({config.head_type})")
    row("parameters", f"{model['parameters']:,}, and {model['codebook']:,} in the codebooks")
    if config.products != "float32":
        row("products", f"rounded to {config.products}, sums in float32")
    section("costs")
    most = config.default_capacity
    limit = "whatever its length" if most is None else f"of at most {most:,} tokens"
    row("state", f"{size(model['state_bytes'])} per sequence, {limit}")
    row(
        "a decoded token",
        f"{size(model['decode_bytes'])} read, {number(model['decode_flops'])}FLOP",
    )
    row("a trained token", f"{number(model['train_flops'])}FLOP")
    serving = record["serving"]
    row(
        "slots to serve",
        f"{serving['slots']:,} of {size(serving['slot_bytes'])} in the {size(serving['memory'])} "
        f"that are free, beside the model and a --state-cache of {STATE_CACHE:,} MB",
    )
    section("training")
    row("data", Text(plain(data["path"])))
    named = plain(f"({data['tokenizer']}), {data['fingerprint'][:16]}…")
    row("", Text(f"{data['size']:,} tokens {named}"))
    row(
        "steps",
        f"{training['step']:,} of {training['steps']:,}, {number(training['tokens'])} tokens in "
        f"{duration(training['seconds'])}",
    )
    row(
        "batch",
        f"{train['batch_size']} sequences of {train['sequence_len']}, "
        f"{train['update_len']} per update",
    )
    for name, text in (("", "training loss"), ("validation_", "validation loss")):
        loss, bpb = training[f"{name}loss"], training[f"{name}bpb"]
        if loss is None or bpb is None:
            row(text, "none in metrics.jsonl yet")
        else:
            row(text, f"{loss:.4f} ({bpb:.4f} bpb)")
    section("checkpoints")
    for checkpoint in record["checkpoints"]:
        best = ", the best by validation loss" if checkpoint["best"] else ""
        row(f"step {checkpoint['step']:,}", size(checkpoint["bytes"]) + best)

    for text in record["damage"]:
        tell(text)
    console.print(Text(plain(record["run"]), style="bold"))
    console.print(table)
