"""`tvq demo`: from nothing to a model that has read a book and writes, in five minutes."""

import bz2
import json
import lzma
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from transformer_vq.cli.common import (
    describe_model,
    program,
    quoted,
    say,
    size,
    train_with_progress,
)
from transformer_vq.cli.parse import UsageError, option
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import (
    ByteTokenizer,
    StreamDecoder,
    Task,
    bundled_corpus,
    load_bytes,
    split,
)
from transformer_vq.errors import plain

if TYPE_CHECKING:
    from transformer_vq import Model
    from transformer_vq.run.loop import TrainResult

# Three to five minutes on two idle cores. Half as many updates would still beat bz2 by far.
# A cap bounds what is far, as a gate would, and leaves time for more updates (docs/results.md).
CONFIG = ModelConfig.preset("tiny", block_len=128, forget="none", far_cap=512)
TRAIN = TrainConfig(
    batch_size=8,
    sequence_len=512,
    update_len=256,
    steps=850,
    learning_rate=4e-3,
    warmup_steps=50,
    final_learning_rate=0.05,
    codebook_init="data",
    revive_below=0.1,
    remat=False,
    evaluate_every=100,
    evaluate_tokens=20_000,
    checkpoint_every=100,
)
TRAIN_SHARE = 0.77  # of the time; the rest is for the last validation, evaluation and samples
# A second model learns to remember. Its window holds no answer; the shorter the episodes, the
# sooner it learns (docs/log.md).
RECALL = Task("far", pairs=6, filler=8, episodes=20_000)
RECALL_CONFIG = ModelConfig(
    d_model=32,
    d_k=32,
    num_layers=1,
    codebook_size=64,
    block_len=RECALL.length,
    window_len=4,
    codebook_decay=0.95,
    key_shift=True,
    score_gain=True,
)
RECALL_TRAIN = TrainConfig(
    batch_size=64,
    sequence_len=RECALL.length,
    steps=200,
    learning_rate=5e-3,
    schedule="wsd",
    warmup_steps=20,
    weight_decay=0.0,
    codebook_init="data",
    revive_below=0.1,
    remat=False,
)
RECALL_SHARE, RECALL_LEAST = 0.08, 10.0  # of the time, at most; seconds, or it is left out
LATER, ASKED = 512, 64  # bytes of filler before a question, and episodes

PROMPTS = ("The whale", "“I tell ye, ", "CHAPTER 136. ")
SAMPLE_TOKENS = 500
PASSAGE = 2000  # bytes that are read twice, and in between
TEMPERATURE = 0.7


@dataclass
class Demo:
    """Train a small model on Moby-Dick, which comes with the program, and see what it learned.

    It trains with live progress, scores the held-out end of the book beside what xz and bz2 make
    of the same bytes, tells what the model gains from what is far back, and writes samples. Another
    model, a tiny one, learns within half a minute to remember what is far, and is asked. The run
    folder keeps all of it: checkpoints, metrics.jsonl, learning_curve.png, samples.txt,
    results.json. Ctrl-C saves and stops; the same command goes on. Once it is done, the command
    shows the results again.
    """

    examples: ClassVar[str] = """
  tvq demo
  tvq demo --out runs/short --minutes 1
"""

    out: Annotated[Path, option("folder of the run; made if need be", "DIR")] = Path("runs/demo")
    minutes: Annotated[float, option("of training and evaluation, at most")] = 5.0

    def main(self) -> int:
        if not 0 < self.minutes < 1e6:
            raise UsageError(f"--minutes is {self.minutes}: it must be above 0")
        results = self._results()
        if results and (results["finished"] or results["minutes"] >= self.minutes):
            say(f"The demo is done: its run is in {self.out}. Remove the folder to start again.")
            self._show(results)
            print(f"\n{results['sample']}")
            self._show_what_now()
            return 0
        return self._make()

    def _make(self) -> int:
        from transformer_vq.run.folder import make_run_folder
        from transformer_vq.run.lock import one_writer

        make_run_folder(self.out, resume=False)
        with one_writer(self.out):
            result = self._train()
            if result.status == "interrupted":
                print(f"interrupted and saved at step {result.step}: the same command goes on")
                return 130
            self._evaluate(result)
        self._show_what_now()
        return 0

    def _train(self) -> "TrainResult":
        from transformer_vq.run.folder import DataSource, checkpoints_of, load_info

        path = bundled_corpus()
        tokens = load_bytes(path)
        limit = self.minutes * 60 * TRAIN_SHARE
        if begun := checkpoints_of(self.out).latest() is not None:
            limit -= load_info(self.out).seconds
        say(f"model: {describe_model(CONFIG)}")
        print(f"data:  Moby-Dick, {size(len(tokens))}: 90 % to train on, 10 % held out")
        minutes = "a minute" if self.minutes == 1 else f"{self.minutes:g} minutes"
        print(f"time:  at most {minutes}. Ctrl-C saves; the same command goes on.\n")
        return train_with_progress(
            CONFIG,
            TRAIN,
            tokens,
            self.out,
            data=DataSource.of(path, tokens),
            resume=begun,
            max_seconds=max(limit, 1.0),
        )

    def _evaluate(self, result: "TrainResult") -> None:
        """Score the held-out text, write samples, and leave both in the run folder."""
        from transformer_vq.atomic import write_whole
        from transformer_vq.cli.evaluate import score, summary
        from transformer_vq.measure.reading import second_reading
        from transformer_vq.run.folder import load_run
        from transformer_vq.run.log import read_metrics, to_json
        from transformer_vq.show.figures import learning_curve
        from transformer_vq.show.words import duration

        model, info = load_run(self.out)
        test = split(load_bytes(bundled_corpus()), "test")
        content = test.tobytes()
        reading = second_reading(model, test, passage=PASSAGE, between=PASSAGE)
        results = {
            **summary(score(model, info, test, far_gain=True)),
            **self._remember(),
            "first_reading": reading.first,
            "second_reading": reading.second,
            "bytes": len(content),
            "bz2_bytes": len(bz2.compress(content, 9)),
            "xz_bytes": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
            "step": result.step,
            "seconds": result.seconds,
            "trained": f"{result.step:,} updates in {duration(result.seconds)}",
            "finished": result.step >= TRAIN.steps,
            "minutes": self.minutes,
        }
        self._show(results)
        print()
        samples = [
            _sample(model, prompt, seed, show=seed == 0) for seed, prompt in enumerate(PROMPTS)
        ]
        write_whole(self.out / "samples.txt", RULE.join(samples).encode())
        learning_curve(
            read_metrics(self.out / "metrics.jsonl"),
            self.out / "learning_curve.png",
            title="Learning Moby-Dick, byte by byte",
            levels={"bz2 -9": _bpb(results, "bz2"), "xz -9e": _bpb(results, "xz")},
            test=results["bpb"],
        )
        write_whole(self.out / "results.json", to_json(results).encode() + b"\n")

    def _remember(self) -> dict[str, float | None]:
        """Teach a tiny model to remember; how often it answers right, as it is, and without what
        is beyond its window. None where there is no time for it."""
        from transformer_vq.measure.recall import share_right, train_on
        from transformer_vq.nn.model import Model

        limit = self.minutes * 60 * RECALL_SHARE
        if limit < RECALL_LEAST:
            return {"recall": None, "recall_masked": None}
        say("a tiny model learns to remember ...")
        episodes = RECALL.source().split("train")
        model = train_on(RECALL_CONFIG, RECALL_TRAIN, episodes, max_seconds=limit)
        near = Model(model.params, model.codebook, RECALL_CONFIG.replace(use_cache=False))
        later = replace(RECALL, filler=LATER)
        right, masked = (share_right(m, later, episodes=ASKED) for m in (model, near))
        return {"recall": right, "recall_masked": masked}

    def _results(self) -> dict[str, Any] | None:
        """What an earlier demo in this folder found; None if there was none, or it is damaged."""
        try:
            found = json.loads((self.out / "results.json").read_bytes())
            numbers = ("bpb", "bytes", "bz2_bytes", "xz_bytes", "minutes", "first_reading",
                       "second_reading")  # fmt: skip
            whole = all(0 < found[name] < 1e15 for name in numbers)
            recalled = [found.setdefault(name) for name in ("recall", "recall_masked")]  # new ones
            whole = whole and (recalled == [None] * 2 or all(0 <= x <= 1 for x in recalled))
            whole = whole and found["finished"] in (True, False)
            whole = whole and isinstance(found["trained"], str) and bool(found["by_position"])
            for row in found["by_position"]:
                whole = whole and all(0 <= row[name] < 1e15 for name in _OF_HISTORIES)
            for row in (found, *found["by_position"]):
                whole = whole and all(abs(row[name] or 0) < 1e15 for name in _GAINS)
            found["trained"] = plain(found["trained"])
            text = (self.out / "samples.txt").read_text("utf-8", errors="replace")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return found | {"sample": text.split(RULE)[0].rstrip()} if whole else None

    def _show(self, results: dict[str, Any]) -> None:
        from rich import box
        from rich.table import Table

        from transformer_vq.cli.evaluate import show_histories
        from transformer_vq.show.console import Console
        from transformer_vq.show.words import bar

        rows = [
            ("Transformer-VQ", results["bpb"], "bold green"),
            ("bz2 -9", _bpb(results, "bz2"), ""),
            ("xz -9e", _bpb(results, "xz"), ""),
        ]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(f"held-out text, {results['bytes']:,} bytes")
        table.add_column("bits per byte", justify="right")
        table.add_column("")
        for name, bpb, style in rows:
            table.add_row(name, f"{bpb:.3f}", f"[dim]{bar(bpb, rows[-1][1])}[/dim]", style=style)
        console = Console(highlight=False)
        console.print()
        console.print(table)
        show_histories(console, results)
        console.print(
            f"A passage of {PASSAGE:,} bytes, read again {PASSAGE:,} bytes later, takes "
            f"{results['second_reading']:.3f} bits per\nbyte; at first it took "
            f"{results['first_reading']:.3f}.\n"
        )
        if results["recall"] is not None:
            console.print(
                f"A tiny model that learned to remember was told {RECALL.pairs} values, and asked "
                f"for them\n{LATER} bytes later, with a window of {RECALL_CONFIG.window_len}: "
                f"{results['recall']:.1%} of its answers are right. With its\nfar part masked: "
                f"{results['recall_masked']:.1%}. Guessing: {1 / RECALL.letters:.1%}.\n"
            )
        console.print(
            f"{results['trained']}; every byte is predicted from the entire history before it",
            style="dim",
            markup=False,
        )

    def _show_what_now(self) -> None:
        tvq, out = program(), quoted(self.out)
        print(f"\nIn {out}: checkpoints, metrics.jsonl, learning_curve.png, samples.txt.")
        print("What now:")
        print(f"  {tvq} sample --run {out} --prompt 'The whale' --temperature 0.7")
        print(f"  {tvq} eval --run {out}")
        print(f"  {tvq} report --run {out}")
        print(f"  {tvq} train --data YOUR_FILE --out runs/mine")


_OF_HISTORIES = ("start", "end", "loss", "bpb")
_GAINS = ("far_gain", "far_gain_error")  # or None
RULE = f"\n\n{'─' * 60}\n\n"  # between the samples of samples.txt


def _bpb(results: dict[str, Any], name: str) -> float:
    return 8 * results[f"{name}_bytes"] / results["bytes"]


def _sample(model: "Model", prompt: str, seed: int, *, show: bool) -> str:
    """The prompt and what the model writes after it, also on the terminal as it comes."""
    from transformer_vq import SamplingParams, stream
    from transformer_vq.cli.text import printable

    params = SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=TEMPERATURE, seed=seed)
    decoder, text = StreamDecoder(), prompt
    if show:
        print(prompt, end="", flush=True)
    for token in stream(model, [ByteTokenizer().encode(prompt)], params):
        piece = printable(decoder.push(token))
        text += piece
        if show:
            print(piece, end="", flush=True)
    if show:
        print()
    return text
