"""`tvq eval`: how well a model predicts a text."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from transformer_vq.cli.common import CheckpointOption, progress_bar, run_data, say, tell
from transformer_vq.cli.models import FarOptions, RunFolder, WeightsOption, bounded, local
from transformer_vq.cli.parse import DataPaths, UsageError, flat, option, require_whole
from transformer_vq.data import run_tokenizer
from transformer_vq.run.log import to_json
from transformer_vq.show.words import bar

if TYPE_CHECKING:
    from rich.console import Console

    from transformer_vq import Model
    from transformer_vq.ops.evaluate import Evaluation
    from transformer_vq.ops.scores import Gain
    from transformer_vq.run.folder import RunInfo


BAR = 18  # columns of the longest bar, so that a line fits into 80
TOO_MUCH = 1.2  # bpb after the longest histories over the best beyond the length of training


@dataclass
class Evaluate:
    """Score a text with a trained model, every token given the entire history before it.

    The state is carried through the whole split. The result is in bits per byte (bpb), the size
    that the text could be compressed to: xz and bz2 are measured in the same unit, and so is any
    vocabulary. What the far part brings is by how much the loss of the same tokens would be higher
    if keys beyond the window were masked. Pictures are scored one by one, in bits per dimension,
    and so are episodes of a task (recall:pairs=6), of which only the answers count. The result
    depends neither on --chunk-len nor on the block length of the model. With --weights the text is
    scored twice, and what rounding costs is kept beside the checkpoints.
    """

    examples: ClassVar[str] = """
  tvq eval --run runs/book
  tvq eval --run runs/book --checkpoint best
  tvq eval --run runs/book --data other.txt --split all --json
  tvq eval --run runs/book --rows 16 --no-gain
  tvq eval --run runs/book --context-len 16384
  tvq eval --run runs/book --far-decay 2048
  tvq eval --run runs/book --weights int8 --no-gain
"""

    run: RunFolder
    checkpoint: CheckpointOption = "latest"
    data: Annotated[
        DataPaths, option("files or folders to score", "PATH", default="those of the run")
    ] = ()
    split: Annotated[
        str, option("train, validation, test (90, 5 and 5 %, if not given) or all", "NAME")
    ] = "test"
    rows: Annotated[int, option("streams to cut it into, scored side by side: faster")] = 1
    chunk_len: Annotated[
        int | None,
        option(
            "tokens of each stream at once: more need more memory",
            default="2048, of long texts and a small model 8192",
        ),
    ] = None
    context_len: Annotated[
        int, option("forget everything after so many tokens, again and again", default="never")
    ] = 0
    weights: WeightsOption = "as-saved"
    far: FarOptions = field(default_factory=dict)
    no_gain: Annotated[
        bool, option("do not also score with the far part masked: half the time")
    ] = False
    json: Annotated[bool, option("print JSON")] = False

    def main(self) -> int:
        require_whole("--rows", self.rows)
        if self.chunk_len is not None:
            require_whole("--chunk-len", self.chunk_len)
        require_whole("--context-len", self.context_len, low=0)

        from transformer_vq.nn.weights import round_weights
        from transformer_vq.ops.evaluate import CHUNK, has_far_part
        from transformer_vq.run.folder import find_step, load_run

        chunk_len = self.chunk_len
        if self.context_len:
            each = min(chunk_len or CHUNK, self.context_len)
            if self.context_len % each:
                raise UsageError(
                    f"--context-len is {self.context_len}: it must be a multiple of --chunk-len, "
                    f"{chunk_len or CHUNK}, or less than it"
                )
            chunk_len = chunk_len and each
        folder = local(self.run)
        model, info = load_run(folder, find_step(folder, self.checkpoint))
        model = bounded(model, self.far)
        source = run_data(info.data, flat(self.data), run_tokenizer(folder, info.tokenizer))
        part = source.split(self.split)
        if part.whole_documents and self.context_len:
            each = "picture" if part.image_shape else "episode"
            raise UsageError(f"--context-len is for text: every {each} begins anew in any case")
        began = time.monotonic()
        options: dict[str, Any] = dict(
            rows=self.rows,
            chunk_len=chunk_len,
            context_len=self.context_len or None,
            quiet=self.json,
        )
        far_gain = has_far_part(model.config) and not self.no_gain
        result = score(model, info, part, far_gain=far_gain, **options)
        rounding = {}
        if self.weights != "as-saved":
            rounded = score(round_weights(model, self.weights), info, part, **options)
            rounding = self._rounding(folder, info, result, rounded)
        record = {
            "run": str(self.run),
            "step": info.step,
            "data": source.path,
            "split": self.split,
            **summary(result),
            **({"bpd": result.bpb} if part.image_shape else {}),  # a byte is a dimension
            **rounding,
            "seconds": round(time.monotonic() - began, 3),
        }
        if self.json:
            print(to_json(record))
        else:
            _show(record)
            if not info.train.streaming:
                _warn_of_long_histories(record, info.train.sequence_len)
        return 0

    def _rounding(
        self, folder: Path, info: "RunInfo", result: "Evaluation", rounded: "Evaluation"
    ) -> dict[str, Any]:
        """What rounded weights cost, as JSON has it; kept for the commands that write."""
        from transformer_vq.run.weights import Cost, save_cost

        cost = Cost(info.step, info.seconds, result.bpb, rounded.bpb, result.tokens)
        if not save_cost(folder, self.weights, cost):
            tell(f"{self.run} cannot be written to, so what {self.weights} costs is not kept there")
        return {
            "weights": self.weights,
            "rounded_bpb": cost.rounded_bpb,
            "rounding_costs": cost.difference,
            "rounding_allowed": cost.is_small,
        }


def score(
    model: "Model",
    info: "RunInfo",
    tokens: Any,
    *,
    rows: int = 1,
    chunk_len: int | None = None,
    context_len: int | None = None,
    max_tokens: int | None = None,
    far_gain: bool = False,
    quiet: bool = False,
) -> "Evaluation":
    """`ops.evaluate.evaluate` with progress on the terminal."""
    from transformer_vq.measure.memory import trim_after_compiling
    from transformer_vq.ops.evaluate import evaluate

    trim_after_compiling()
    if info.context_limit is not None:
        chunk_len = context_len = min(context_len or info.context_limit, info.context_limit)
    with progress_bar("scoring", quiet=quiet) as show:
        return evaluate(
            model,
            tokens,
            rows=rows,
            chunk_len=chunk_len,
            max_tokens=max_tokens,
            context_len=context_len,
            far_gain=far_gain,
            on_progress=show,
        )


def summary(result: "Evaluation") -> dict[str, Any]:
    """An evaluation as JSON has it. Gains are in bits per byte, as `bpb` is."""
    byte = math.log(2) * result.bytes_per_token

    def as_bits(gain: "Gain | None") -> dict[str, float | None]:
        if gain is None:
            return {}
        error = None if gain.error is None else gain.error / byte
        return {"far_gain": gain.nats / byte, "far_gain_error": error}

    gains = result.far_gain_by_position or [None] * len(result.by_position)
    return {
        "loss": result.loss,
        "bpb": result.bpb,
        "tokens": result.tokens,
        **({} if result.accuracy is None else {"accuracy": result.accuracy}),
        **as_bits(result.far_gain),
        "by_position": [
            {"start": start, "end": end, "loss": loss, "bpb": loss / byte, **as_bits(gain)}
            for (start, end, loss), gain in zip(result.by_position, gains, strict=True)
        ],
    }


def _warn_of_long_histories(record: dict[str, Any], sequence_len: int) -> None:
    """Say so if tokens far beyond the length of training are predicted much worse; but not where
    the far part is known to help them: then it is the text that is harder there."""
    beyond = [row for row in record["by_position"] if row["start"] >= sequence_len]
    best = min((row["bpb"] for row in beyond), default=0.0)
    if not beyond or beyond[-1].get("far_gain", 0.0) > 0:
        return
    if beyond[-1]["bpb"] > TOO_MUCH * best:
        print(
            f"The model was trained on sequences of {sequence_len:,} tokens, and longer histories "
            f"confuse it: let far keys fade (--far-decay {2 * sequence_len}), forget them "
            f"(--context-len), or train with --train.streaming True."
        )


def _show(record: dict[str, Any]) -> None:
    from transformer_vq.show.console import Console

    console = Console(highlight=False, soft_wrap=True)
    unit = "bits per dimension" if "bpd" in record else "bpb"
    say(
        f"{record['run']} at step {record['step']:,}, on the {record['split']} split of "
        f"{record['data']}"
    )
    console.print(
        f"\n  [bold]{record['bpb']:.4f} {unit}[/bold]   {record['loss']:.4f} nats per token   "
        f"{record['tokens']:,} tokens in {record['seconds']:.1f} s\n"
    )
    if "weights" in record:
        verdict = "allowed" if record["rounding_allowed"] else "refused: over 0.01"
        console.print(
            f"  [bold]{record['rounded_bpb']:.4f} {unit}[/bold]   with {record['weights']} "
            f"weights: {record['rounding_costs']:+.4f} ({verdict})\n"
        )
    if "accuracy" in record:
        console.print(f"  [bold]{record['accuracy']:.2%}[/bold] of the answers are right\n")
    show_histories(console, record)


def show_histories(console: "Console", record: dict[str, Any]) -> None:
    """Loss by length of history, and what the far part brings, of a `summary`."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("tokens of history", justify="right")
    table.add_column("bpb", justify="right")
    table.add_column("nats", justify="right")
    if "far_gain" in record:
        table.add_column("far part brings", justify="right")
    worst = max(row["bpb"] for row in record["by_position"])
    table.add_column("")
    for row in record["by_position"]:
        history = f"{row['start']:,} to {row['end'] - 1:,}"
        gain = [_gain(row)] if "far_gain" in record else []
        shown = f"[dim]{bar(row['bpb'], worst, BAR)}[/dim]"
        table.add_row(history, f"{row['bpb']:.4f}", f"{row['loss']:.4f}", *gain, shown)
    console.print(table)
    if "far_gain" in record:
        known = record["far_gain_error"] is not None
        error = "± standard error" if known else "too few tokens for a standard error"
        console.print(
            f"The far part brings {_gain(record)} bpb: with keys beyond the window\n"
            f"masked, the same tokens would take so much more ({error}).\n"
        )


def _gain(row: dict[str, Any]) -> str:
    """What the far part brings, with its error: "+0.0123 ± 0.0040"."""
    error = "" if row["far_gain_error"] is None else f" ± {row['far_gain_error']:.4f}"
    return f"{row['far_gain']:+.4f}{error}"
