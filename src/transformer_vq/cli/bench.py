"""`tvq bench`: how fast this machine runs a model, beside what the machine can do."""

import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from transformer_vq import costs
from transformer_vq.cli.common import number, require_memory, size
from transformer_vq.cli.parse import UsageError, as_usage, option, overrides, require_whole
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.presets import PRESETS

if TYPE_CHECKING:
    ConfigOptions = dict[str, Any]
else:
    ConfigOptions = overrides(ModelConfig, "ConfigOptions", lambda f: "(default: the preset's)")

FEW_SIZES = (2, 4, 8, 16, 32, 64)  # tokens of a call
MOST_FEW = 256  # whose scores fit memory


@dataclass
class Bench:
    """Measure decoding, calls of a few tokens, prompt reading (prefill), sample_op, training or
    evaluation.

    Warm medians with their spread; compilation apart; the machine's own speed (bytes read or
    operations of a product per second) measured in the same process. Leave the machine alone
    while it runs.
    """

    examples: ClassVar[str] = """
  tvq bench decode --preset small --batch 1 8 32
  tvq bench decode --preset enwik8 --config.compute-dtype float32 --batch 1 --json
  tvq bench decode --preset small --batch 1 --profile
  tvq bench decode --preset small --batch 1 --draft
  tvq bench few --preset small --length 2 8 32
  tvq bench prefill --preset small --length 8192 100000
  tvq bench train --preset small --batch 4 --length 1024 8192
  tvq bench train --preset small --batch 1 --length 2048 8192 --attention vq full
  tvq bench train --preset small --batch 1 --length 8192 --attention full --config.block-len 8192
"""

    what: tyro.conf.Positional[Literal["decode", "few", "prefill", "sample", "train", "evaluate"]]
    preset: Annotated[str, option(f"model: {', '.join(PRESETS)}; --config.* change it", "NAME")] = (
        "small"
    )
    batch: Annotated[tuple[int, ...], option("rows", "INT...", default="1 8 32; to train 4")] = ()
    length: Annotated[
        tuple[int, ...],
        option("tokens in a prompt or sequence", "INT...", default="by what is measured"),
    ] = ()
    position: Annotated[
        tuple[int, ...], option("decode: tokens read before the first measured", "INT...")
    ] = (1,)
    attention: Annotated[
        tuple[Literal["vq", "full"], ...],
        option("train: kinds of attention, one by one", "KIND..."),
    ] = ()
    weights: Annotated[
        tuple[Literal["as-saved", "bfloat16", "int8"], ...],
        option("decode: how the large matrices are kept, one by one", "KIND..."),
    ] = ("as-saved",)
    profile: Annotated[
        bool, option("decode: where the time of a step goes, by layer and operation")
    ] = False
    draft: Annotated[
        bool, option("decode: with and without drafts, on noise and on text that repeats itself")
    ] = False
    repeats: Annotated[int, option("measurements of each", "INT")] = 5
    json: Annotated[bool, option("print JSON: one object, with all measurements")] = False
    config: tyro.conf.FlagConversionOff[ConfigOptions] = field(default_factory=dict)

    def main(self) -> int:
        for name in ("batch", "length", "position"):
            for value in getattr(self, name):
                require_whole(f"--{name}", value)
        require_whole("--repeats", self.repeats, high=10**6)
        if self.what != "decode" and (self.profile or self.draft or self.weights != ("as-saved",)):
            raise UsageError(
                f"--profile, --draft and --weights are for tvq bench decode, and this is "
                f"{self.what}: leave them out"
            )
        if self.profile and self.draft:
            raise UsageError("--profile is of plain decoding: leave out --draft or --profile")
        try:
            config = ModelConfig.preset(self.preset, **self.config)
        except ValueError as error:
            raise as_usage(error, "--config.", ModelConfig) from None

        from transformer_vq.measure import bench
        from transformer_vq.measure.memory import trim_after_compiling

        self._require_memory(config, 1)
        trim_after_compiling()
        about = bench.device_info()
        if not self.json:
            print(
                f"{self.what}, {self.preset}: {number(costs.parameter_count(config))} parameters, "
                f"{config.compute_dtype}; jax {about['jax']} on {about['devices']} x "
                f"{about['device']}"
            )
        if self.what in ("train", "prefill", "evaluate") and config.compute_dtype == "float32":
            from transformer_vq.run.peak import product_rates

            rates = product_rates(config)
            about["product_rates"] = rates._asdict()
            if not self.json:
                print(f"products: {config.products}; {rates}", flush=True)
        rows = []
        for row in self._measure(config):
            rows.append(row)
            if not self.json:
                if self.profile:
                    _show_profile(row)
                else:
                    line = _draft_line if self.draft else _LINES[self.what]
                    print(line(row), flush=True)
        if self.json:
            record = {"what": self.what, "preset": self.preset, **about}
            print(json.dumps({**record, "config": config.to_dict(), "results": rows}))
        return 0

    def _measure(self, config: ModelConfig):
        from transformer_vq.measure import bench
        from transformer_vq.measure.drafts import TEXTS, bench_drafts
        from transformer_vq.measure.profile import profile_decode

        if self.what == "decode":
            for batch in self.batch or (1, 8, 32):
                self._require_memory(config, batch)
                if self.draft:
                    for weights, text in itertools.product(self.weights, TEXTS):
                        yield bench_drafts(
                            config, batch, text=text, rounds=self.repeats, weights=weights
                        )
                    continue
                for position, weights in itertools.product(self.position, self.weights):
                    if self.profile:
                        yield profile_decode(config, batch, position=position, weights=weights)
                        continue
                    yield bench.bench_decode(
                        config, batch, position=position, rounds=self.repeats, weights=weights
                    )
        elif self.what == "few":
            from transformer_vq.measure.few import bench_few

            self._require_memory(config, 1)
            for length in self.length:
                require_whole("--length", length, low=2, high=MOST_FEW)
            yield bench_few(config, self.length or FEW_SIZES, turns=self.repeats)
        elif self.what == "prefill":
            for length in self.length or (1024, 16384):
                yield bench.bench_prefill(config, length, repeats=self.repeats)
        elif self.what == "sample":
            for batch in self.batch or (1, 8, 32):
                self._require_memory(config, batch)
                for length in self.length or (128,):
                    yield bench.bench_sample(config, batch, length=length, repeats=self.repeats)
        elif self.what == "evaluate":
            for length in self.length or (8192,):
                yield bench.bench_evaluate(config, length, repeats=self.repeats)
        else:
            for attention in self.attention or (config.attention,):
                for batch in self.batch or (4,):
                    for length in self.length or (1024, 8192):
                        train = TrainConfig(batch_size=batch, sequence_len=length)
                        kind = config.replace(attention=attention)
                        least = costs.least_training_bytes(kind, train)
                        require_memory(least, "their gradients and a batch", "--batch")
                        yield bench.bench_train(kind, train, repeats=self.repeats)

    def _require_memory(self, config: ModelConfig, batch: int) -> None:
        least = costs.least_decoding_bytes(config, batch)
        states = "a state" if batch == 1 else f"{batch:,} states"
        require_memory(least, f"codebooks and {states}", "--batch")


# A line for each measurement.


def _spread(row: dict[str, Any]) -> str:
    if "ms_per_step" in row:
        return f"{row['ms_per_step']:8.2f} ms/step ({row['ms_low']:.2f} to {row['ms_high']:.2f})"
    low, high = row["tokens_per_second_low"], row["tokens_per_second_high"]
    return f"{row['tokens_per_second']:9,.0f} tokens/s ({low:,.0f} to {high:,.0f})"


def _mfu(row: dict[str, Any]) -> str:
    return f"MFU {row['mfu']:.2f} of {row['product_rate'] / 1e9:,.0f} GFLOP/s"


def _decode_line(row: dict[str, Any]) -> str:
    return (
        f"batch {row['batch']:3}, position {row['position']:9,}, weights {row['weights']}: "
        f"{_spread(row)}, "
        f"{row['tokens_per_second']:7,.0f} tokens/s; {size(row['bytes_per_step'])} a step at "
        f"{row['bandwidth'] / 1e9:.1f} GB/s, fraction {row['bandwidth_fraction']:.2f}; "
        f"compiled in {row['compile_seconds']:.1f} s ({row['compile_seconds_warm_cache']:.1f} s "
        f"from the cache), the prompt's program in {row['compile_seconds_prompt']:.1f} s "
        f"({row['compile_seconds_prompt_warm_cache']:.1f} s); peak {size(row['peak_bytes'])}, "
        f"state {size(row['state_bytes'])}"
    )


def _draft_line(row: dict[str, Any]) -> str:
    text = {"noise": "cannot be guessed", "repeats": "repeats itself"}[row["text"]]
    share = f"{row['right'] / row['guessed']:.0%}" if row["guessed"] else "none"
    differ = "" if row["same"] else "; rounding has decided a draw otherwise"
    return (
        f"batch {row['batch']:3}, weights {row['weights']}, text that {text}: "
        f"{row['tokens_per_second']:,.0f} tokens/s, with drafts "
        f"{row['drafted_tokens_per_second']:,.0f}, {row['ratio']:.2f} times as fast "
        f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}; all turns "
        f"{row['ratio_of_all']:.2f}); {share} of {row['guessed']:,} guesses right{differ}"
    )


def _few_line(row: dict[str, Any]) -> str:
    lines = [
        f"a step: {row['ms_per_step']:.2f} ms, {row['bandwidth_fraction']:.2f} of the bandwidth of "
        f"{row['bandwidth'] / 1e9:.1f} GB/s; products run at {row['product_rate'] / 1e9:,.0f} "
        f"GFLOP/s"
    ]
    lines += [
        f"{call['tokens']:3} tokens: {call['ms']:8.2f} ms, {call['in_steps']:5.2f} steps "
        f"({call['in_steps_low']:.2f} to {call['in_steps_high']:.2f}); at least "
        f"{call['least']:.2f} by what the machine can do; {call['flops_per_second'] / 1e9:,.0f} "
        f"GFLOP/s"
        for call in row["calls"]
    ]
    return "\n".join(lines)


def _prefill_line(row: dict[str, Any]) -> str:
    return (
        f"length {row['length']:9,}: {_spread(row)}; {_mfu(row)}; first call "
        f"{row['compile_seconds']:.1f} s more; peak {size(row['peak_bytes'])}"
    )


def _sample_line(row: dict[str, Any]) -> str:
    return (
        f"batch {row['batch']:3}, {row['length']} tokens each: {_spread(row)}, "
        f"{row['tokens_per_second']:7,.0f} tokens/s; first call {row['compile_seconds']:.1f} s "
        f"more; peak {size(row['peak_bytes'])}"
    )


def _train_line(row: dict[str, Any]) -> str:
    kind = row["attention"]
    if kind == "full":  # with one block it is the whole score matrix
        kind += f" in blocks of {min(row['block_len'], row['update_len']):,}"
    return (
        f"{kind}, batch {row['batch']:3} x {row['length']:7,}: {_spread(row)}; "
        f"{_mfu(row)}; compiled in "
        f"{row['compile_seconds']:.1f} s; temporaries {size(row['temporary_bytes'])}, peak "
        f"{size(row['peak_bytes'])}"
    )


_LINES = {
    "decode": _decode_line,
    "few": _few_line,
    "prefill": _prefill_line,
    "sample": _sample_line,
    "train": _train_line,
    "evaluate": _prefill_line,
}


LEAST_SHARE = 0.01  # of the time, of a row of its own


def _show_profile(row: dict[str, Any]) -> None:
    """The operations of a decoding step as a table, 80 columns wide."""
    operations, memory = row["operations"], row["bandwidth"]
    total = sum(op["seconds"] for op in operations)
    print(
        f"batch {row['batch']}, position {row['position']:,}, weights {row['weights']}: "
        f"{row['ms_per_step']:.2f} ms/step, {row['ms_recorded']:.2f} while it was recorded; memory "
        f"reads {memory / 1e9:.1f} GB/s\n"
    )

    def line(*cells: str) -> None:
        layer, kind, *numbers = cells
        widths = (6, 10, 9, 7, 6)
        right = "".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths, strict=True))
        print(f"{layer:22.22}{kind:20.20}{right}")

    def add(layer: str, kind: str, calls: float, nbytes: float, seconds: float) -> None:
        speed = nbytes / seconds if seconds else 0.0
        moved = f"{speed / 1e9:.1f}" if nbytes else ""
        line(
            "/".join(layer.split("/")[-2:]),
            kind,
            f"{calls:,.0f}",
            size(int(nbytes)),
            f"{1e6 * seconds:,.1f}",
            f"{seconds / total:.1%}",
            moved,
        )

    line("layer", "operation", "calls", "bytes", "us", "share", "GB/s")
    shown = [op for op in operations if op["seconds"] >= LEAST_SHARE * total]
    for op in shown:
        add(op["layer"], op["kind"], op["calls"], op["bytes"], op["seconds"])
    if rest := operations[len(shown) :]:
        sums = (sum(op[name] for op in rest) for name in ("calls", "bytes", "seconds"))
        add("less than 1 % each", f"{len(rest)} kinds", *sums)
    print(
        "\nOf one step, equal units added up. Bytes are what an operation reads and writes:\n"
        "what is in a cache comes faster than memory reads. Operations may overlap.",
        flush=True,
    )
