"""`tvq info`: what a run is and what its model costs."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from transformer_vq import costs
from transformer_vq.cli.common import CheckpointOption, number, size
from transformer_vq.cli.parse import option


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

    run: Annotated[Path, option("folder of a trained run", "DIR")]
    checkpoint: CheckpointOption = "latest"
    json: Annotated[bool, option("print JSON, with the whole configuration")] = False

    def main(self) -> int:
        record = describe(self.run, self.checkpoint)
        if self.json:
            print(json.dumps(record))
        else:
            _show(record)
        return 0


def describe(folder: Path, checkpoint: str = "latest") -> dict[str, Any]:
    """All that `tvq info` tells. Raises `RunError` and `CheckpointError` as `load_info` does."""
    from transformer_vq.run.folder import checkpoints_of, find_step, load_info
    from transformer_vq.run.log import read_metrics

    info = load_info(folder, find_step(folder, checkpoint))
    config, train = info.config, info.train
    steps, best = checkpoints_of(folder).steps(), checkpoints_of(folder).best()
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] <= info.step]
    last: dict[str, Any] = {}
    for record in records:
        last |= record
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
        "checkpoints": [
            {
                "step": step,
                "best": step == best,
                "bytes": _folder_size(folder / "checkpoints" / str(step)),
            }
            for step in steps
        ],
        "config": config.to_dict(),
        "train": dataclasses.asdict(train),
    }


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _show(record: dict[str, Any]) -> None:
    from rich.table import Table

    from transformer_vq.show.console import Console
    from transformer_vq.show.progress import duration

    model, data, training = record["model"], record["data"], record["training"]
    config, train = record["config"], record["train"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def section(title: str) -> None:
        table.add_row()
        table.add_row(f"[cyan]{title}[/cyan]")

    section("model")
    attention = (
        f"{config['codebook_size']} codes, window {config['window_len']}"
        if config["attention"] == "vq"
        else "full"
    )
    table.add_row("layers", f"{config['num_layers']} of width {config['d_model']}")
    table.add_row("attention", f"{attention}, {config['num_heads']} heads ({config['head_type']})")
    table.add_row(
        "parameters", f"{model['parameters']:,}, and {model['codebook']:,} in the codebooks"
    )
    section("costs")
    limit = "of at most 4,096 tokens" if config["attention"] == "full" else "whatever its length"
    table.add_row("state", f"{size(model['state_bytes'])} per sequence, {limit}")
    table.add_row(
        "a decoded token",
        f"{size(model['decode_bytes'])} read, {number(model['decode_flops'])}FLOP",
    )
    table.add_row("a trained token", f"{number(model['train_flops'])}FLOP")
    section("training")
    table.add_row("data", f"{data['path']}")
    table.add_row("", f"{data['size']:,} tokens ({data['tokenizer']}), {data['fingerprint'][:16]}…")
    table.add_row(
        "steps",
        f"{training['step']:,} of {training['steps']:,}, {number(training['tokens'])} tokens in "
        f"{duration(training['seconds'])}",
    )
    table.add_row(
        "batch",
        f"{train['batch_size']} sequences of {train['sequence_len']}, "
        f"{train['update_len']} per update",
    )
    for name, text in (("", "training loss"), ("validation_", "validation loss")):
        loss, bpb = training[f"{name}loss"], training[f"{name}bpb"]
        table.add_row(text, "not measured yet" if loss is None else f"{loss:.4f} ({bpb:.4f} bpb)")
    section("checkpoints")
    for checkpoint in record["checkpoints"]:
        best = ", the best by validation loss" if checkpoint["best"] else ""
        table.add_row(f"step {checkpoint['step']:,}", size(checkpoint["bytes"]) + best)

    console = Console(highlight=False)
    console.print(f"[bold]{record['run']}[/bold]")
    console.print(table)
