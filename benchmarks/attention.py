"""VQ beside full attention: `python benchmarks/attention.py [--lengths 2048 8192 32768 131072]`.

Trains bench-small with `tvq bench train` at each length: VQ, full attention by blocks (those of the
future skipped), and full attention as the whole score matrix, where it fits. Every row is a process
of its own, one after the other. Prints a markdown table and draws tokens/s against length. On a GPU
add `--config.compute-dtype bfloat16`, and with more memory `--whole-up-to`.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BENCH = [sys.executable, "-c", "import sys; from transformer_vq.cli import main; sys.exit(main())"]
FORMS = {"vq": "VQ", "blocks": "full, by blocks", "whole": "full, whole matrix"}


def main() -> None:
    """Print a line for every length and form; options that are not known go to `tvq bench`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--block", type=int, default=512, help="block_len of full attention")
    parser.add_argument("--full-up-to", type=int, default=32768, help="longest by blocks")
    parser.add_argument("--whole-up-to", type=int, default=8192, help="longest whole matrix")
    parser.add_argument("--tokens", type=int, default=8192, help="of an update, or one sequence")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--figure", default="docs/attention.svg")
    args, more = parser.parse_known_args()
    limits = {"vq": max(args.lengths), "blocks": args.full_up_to, "whole": args.whole_up_to}

    print("| attention | tokens | tokens/s | MFLOP a token | MFU | temporaries, GB | VQ leads by |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        for form in args.forms:
            if length > limits[form]:
                continue
            row = measure(args, form, length, more)
            print(line(row, rows) if row else f"| {FORMS[form]} | {length:,} | failed | | | | |")
            sys.stdout.flush()
            rows += [row] if row else []
    draw(rows, args.figure)


def measure(args: argparse.Namespace, form: str, length: int, more: list[str]) -> dict[str, Any]:
    """The record of a form at a length; empty if its process failed."""
    block = {"vq": 256, "blocks": args.block, "whole": length}[form]
    options = {
        "preset": args.preset,
        "attention": "vq" if form == "vq" else "full",
        "length": length,
        "batch": max(1, args.tokens // length),
        "repeats": args.repeats,
        "config.window-len": 256,
        "config.block-len": block,
    }
    given = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    command = [*BENCH, "bench", "train", "--json", *given, *more]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(result.stderr[-2000:], file=sys.stderr)
        return {}
    return {"form": form, **json.loads(result.stdout)["results"][0]}


def line(row: dict[str, Any], before: list[dict[str, Any]]) -> str:
    """A row of the table; "VQ leads by" compares with VQ at the same length."""
    label = FORMS[row["form"]]
    label += f" of {row['block_len']:,}" if row["form"] == "blocks" else ""
    speed, low, high = (row[f"tokens_per_second{end}"] for end in ("", "_low", "_high"))
    ours = [x for x in before if x["form"] == "vq" and x["length"] == row["length"]]
    lead = ""
    if ours:  # and, in parentheses, what the operations say
        lead = f"{ours[0]['tokens_per_second'] / speed:.1f} times"
        lead += f" ({row['flops_per_token'] / ours[0]['flops_per_token']:.1f})"
    return (
        f"| {label} | {row['batch']} x {row['length']:,} | {speed:,.0f} ({low:,.0f} to {high:,.0f})"
        f" | {row['flops_per_token'] / 1e6:,.0f} | {row['mfu']:.2f} "
        f"| {row['temporary_bytes'] / 1e9:.2f} | {lead} |"
    )


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Tokens/s against length, both by doublings."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for form, label in FORMS.items():
        points = [(row["length"], row["tokens_per_second"]) for row in rows if row["form"] == form]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = sorted({row["length"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens in a sequence")
    axes.set_ylabel("tokens/s in training")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
