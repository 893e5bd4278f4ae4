"""This project beside others of equal size: `python benchmarks/peers.py [--reference DIR]`.

Times a Transformer-VQ of this project, a Hugging Face Llama and Mamba (install them with the extra
`peers`) and, with `--reference DIR`, the paper's own implementation, whose sources are in DIR:
decoding after contexts of several lengths, reading prompts, scoring texts, and training; float32,
random weights, batch 1 (in training as many rows as make 4,096 tokens, or one). Each model is in a
process of its own (`peer.py`), and they take turns. Prints a markdown table of medians, with how
many times as fast ours is (the median of the ratios of each turn), and draws them.

The first call of each compiles and warms up, and never counts. What then takes longer than `--long`
seconds is measured once.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = "transformer-vq"
NAMES = {
    OURS: "Transformer-VQ",
    "llama": "Llama",
    "mamba": "Mamba",
    "reference": "the paper's code",
}
NEEDS = {"llama": ("torch", "transformers"), "mamba": ("torch", "transformers")}
TITLES = {
    "decode": "decoding",
    "prompt": "reading a prompt",
    "score": "scoring a text",
    "train": "training",
}


class Peer:
    """A model in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace):
        environment = dict(os.environ)
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # whose turn it is not must not spin
        given = [name, "--smoke"] if args.smoke else [name]
        if name == "reference":  # its package has our name: only one of them can be imported
            environment["PYTHONPATH"] = str(Path(args.reference) / "src")
        script = str(Path(__file__).with_name("peer.py"))
        self.process = subprocess.Popen(
            [args.reference_python if name == "reference" else sys.executable, "-W", "ignore",
             script, *given],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        answer = self.ask({"what": "parameters"})
        if "error" in answer:
            self.close()
            sys.exit(f"{NAMES[name]} cannot be made: {answer['error']}")
        self.parameters = answer["parameters"]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer: `seconds` and what else it tells, or `error`."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the process has died"}

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def main() -> None:
    """Measure, print a table, draw a figure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--peers", nargs="*", choices=list(NEEDS), default=list(NEEDS))
    parser.add_argument("--reference", metavar="DIR", help="its sources: DIR/src/transformer_vq")
    parser.add_argument(
        "--reference-python",
        metavar="PYTHON",
        default=sys.executable,
        help="the Python that has the JAX and flax which the reference needs",
    )
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 8192, 32768])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 8192])
    parser.add_argument("--texts", type=int, nargs="*", default=[8192], help="to be scored")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 8192], help="training")
    parser.add_argument("--rounds", type=int, default=2, help="of 32 tokens, to decode in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--long", type=float, default=6.0)
    parser.add_argument("--figure", help="where to draw, as docs/peers.svg")
    parser.add_argument(
        "--rows", nargs="*", default=[], metavar="FILE", help="what --json printed of earlier parts"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each measurement")
    parser.add_argument("--smoke", action="store_true", help="tiny models, to see that all runs")
    args = parser.parse_args()
    names = [OURS, *args.peers, *(["reference"] if args.reference else [])]
    complain(names, args.reference)

    peers: dict[str, Peer] = {}
    try:
        for name in names:
            peers[name] = Peer(name, args)
        print(about(peers), flush=True)
        rows = earlier(args.rows)
        for question in questions(args):
            row = measured(peers, question, args)
            rows.append(row)
            print(json.dumps(row) if args.json else progress(row), file=sys.stderr, flush=True)
    finally:
        for peer in peers.values():
            peer.close()
    names = [name for name in NAMES if any(name in row["results"] for row in rows)]
    print(*table(rows, names), sep="\n")
    if args.figure:
        draw(rows, names, args.figure)


def earlier(files: list[str]) -> list[dict[str, Any]]:
    """The rows that earlier runs have printed with `--json`."""
    lines = (line for file in files for line in Path(file).read_text("utf-8").splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


def complain(names: list[str], reference: str | None) -> None:
    """End in one sentence if something that was asked for is not there."""
    needed = {module for name in names for module in NEEDS.get(name, ())}
    missing = sorted(module for module in needed if importlib.util.find_spec(module) is None)
    if missing:
        sys.exit(
            f"not installed, and needed by the peers: {' and '.join(missing)}. Install them with "
            f"pip install -e '.[peers]', or leave the peers out with an empty --peers"
        )
    if reference and not (Path(reference) / "src/transformer_vq/ops/sample.py").is_file():
        sys.exit(
            f"--reference is {reference}, and there is no src/transformer_vq/ops/sample.py in it: "
            f"give the folder with the sources of the paper's implementation"
        )


def questions(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What every peer is asked, in this order."""
    for length in args.contexts:
        yield {"what": "decode", "length": length, "tokens": 32 * args.rounds}
    for length in args.prompts:
        yield {"what": "prompt", "length": length, "tokens": length}
    for length in args.texts:
        yield {"what": "score", "length": length, "tokens": length}
    for length in args.lengths:
        rows = max(1, 4096 // length)
        yield {"what": "train", "length": length, "rows": rows, "tokens": rows * length}


def measured(
    peers: dict[str, Peer], question: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """The seconds of each turn of each peer, after a first call, which compiles and warms up. Where
    a call is long there is one turn."""
    results: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        first = peer.ask(question)
        if "error" not in first:
            first["seconds"] = []
        results[name] = first
    for _ in range(args.turns):
        for name, peer in peers.items():
            result = results[name]
            known = result.get("seconds", [])
            if "error" in result or max(known, default=0) > args.long:
                continue
            answer = peer.ask(question)
            if "error" in answer:
                result["error"] = answer["error"]
            else:
                known.append(answer["seconds"])
    return {**question, "results": results}


def speed(row: dict[str, Any], name: str) -> float | None:
    """Tokens a second, the median of the turns; None where it failed, or was not asked."""
    result = row["results"].get(name, {"error": ""})
    return None if "error" in result else row["tokens"] / statistics.median(result["seconds"])


def lead(row: dict[str, Any], name: str) -> float | None:
    """How many times as fast as this peer ours is."""
    ours, theirs = row["results"][OURS], row["results"][name]
    if "error" in ours or "error" in theirs:
        return None
    pairs = zip(ours["seconds"], theirs["seconds"], strict=False)
    return statistics.median(b / a for a, b in pairs)


def about(peers: dict[str, Peer]) -> str:
    """Of which sizes the models are, and where they run."""
    sizes = (f"{NAMES[name]} {peer.parameters / 1e6:.2f} M" for name, peer in peers.items())
    processor = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        models = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
        processor = models[0] if models else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"parameters: {', '.join(sizes)}; {cores} cores of {processor}\n"


def progress(row: dict[str, Any]) -> str:
    """What came of one question."""
    cells = (f"{NAMES[name]} {cell(row, name)}" for name in row["results"])
    return f"{TITLES[row['what']]}, {row['length']:,}: " + ", ".join(cells)


def cell(row: dict[str, Any], name: str) -> str:
    """Tokens a second, and by how much ours is faster."""
    if name not in row["results"]:
        return ""
    value, times = speed(row, name), lead(row, name)
    if value is None:
        return "failed: " + row["results"][name]["error"]
    number = f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    return number if name == OURS or times is None else f"{number} ({times:.2f})"


def table(rows: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """Lines of markdown: tokens a second, and in parentheses how many times as fast ours is."""
    yield "| tokens/s | tokens | " + " | ".join(NAMES[name] for name in names) + " |"
    yield "|---" * (2 + len(names)) + "|"
    for row in rows:
        length = f"{row['length']:,}"
        if row["what"] == "train":
            length = f"{row['rows']} x {length}"
        cells = (cell(row, name) for name in names)
        yield f"| {TITLES[row['what']]} | {length} | " + " | ".join(cells) + " |"
    for row in (row for row in rows if row["what"] == "decode"):
        sizes = (row["results"].get(name, {}).get("state_bytes", 0) / 1e6 for name in names)
        cells = (f"{size:,.1f}" if size else "" for size in sizes)
        yield f"| state, MB | {row['length']:,} | " + " | ".join(cells) + " |"


def draw(rows: list[dict[str, Any]], names: list[str], path: str) -> None:
    """Tokens/s against length, a panel for each task."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    matplotlib.rcParams["svg.hashsalt"] = "peers"  # the same figure of the same numbers

    tasks = [what for what in TITLES if any(row["what"] == what for row in rows)]
    size = (3.3 * len(tasks), 3.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)
    for axes, what in zip(panels[0], tasks, strict=True):
        some = [row for row in rows if row["what"] == what]
        for name in names:
            points = [(row["length"], speed(row, name)) for row in some]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                width = 2.4 if name == OURS else 1.4
                axes.plot(*zip(*points, strict=True), marker="o", lw=width, label=NAMES[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = [row["length"] for row in some]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(TITLES[what], fontsize=10)
        axes.set_xlabel("tokens before" if what == "decode" else "tokens")
        axes.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("tokens/s")
    panels[0][-1].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
    main()
