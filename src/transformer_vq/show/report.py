"""A run as one HTML page, which needs nothing but a browser."""

import base64
import hashlib
import importlib.resources
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from transformer_vq.config import ModelConfig
from transformer_vq.ops.evaluate import Evaluation
from transformer_vq.run.log import Record
from transformer_vq.show.charts import Series, heat_map, line_chart
from transformer_vq.show.words import describe_model, duration, number, size

SAMPLES = 8  # of those in samples.jsonl
_CONTROLS = {code: 0xFFFD for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def page(
    run: Mapping[str, Any],
    records: Sequence[Record],
    samples: Sequence[Record],
    environment: Mapping[str, str],
    evaluation: Evaluation | str,
) -> str:
    """The page as HTML, all of it from these values.

    `run`: of `cli.info.describe`. `records`, `samples`: of metrics.jsonl and samples.jsonl.
    `environment`: versions by name. `evaluation`: of the validation split, or why there is none.
    """
    files = importlib.resources.files("transformer_vq.show")
    style, script = ((files / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    # Even a text that got in unescaped could run and load nothing.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    name = escape(Path(run["run"]).resolve().name)
    sections = [
        _section("Loss", _loss(run, records)),
        _section("Speed and steps", _speed(records)),
        _section("Codebooks", _codebooks(run, records)),
        _section("Loss by position in context", _positions(run, evaluation)),
        _section("Samples through time", _samples(samples, records)),
        _section("Details", _details(run, environment)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{name}</title>
<style>{style}</style>
</head>
<body>
<header>{_head(name, run)}</header>
<div class="tiles">{_tiles(run, records)}</div>
{"".join(sections)}
<footer>Made by <code>tvq report</code> on {time.strftime("%Y-%m-%d at %H:%M")}, of the run in
{escape(str(run["run"]))}.</footer>
<script>{script}</script>
</body>
</html>
"""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _head(name: str, run: Mapping[str, Any]) -> str:
    training, data = run["training"], run["data"]
    return (
        f"<h1>{name}</h1><p>{escape(describe_model(ModelConfig.from_dict(run['config'])))}</p>"
        f'<p class="soft">Trained on {escape(Path(data["path"]).name)}, {data["size"]:,} tokens '
        f"({escape(data['tokenizer'])}).</p>"
        f"<p class='soft'>Step {training['step']:,} of {training['steps']:,}.</p>"
    )


def _tiles(run: Mapping[str, Any], records: Sequence[Record]) -> str:
    training, model = run["training"], run["model"]
    scored = [r for r in records if "validation_bpb" in r]
    tiles = []
    if scored:
        best = min(scored, key=lambda r: r["validation_bpb"])
        text = f"best validation, {_bits(run)}, at step {best['step']:,}"
        tiles.append((f"{best['validation_bpb']:.4f}", text))
    tiles += [
        (number(training["tokens"]), f"tokens trained on, in {duration(training['seconds'])}"),
        (number(model["parameters"]), f"parameters, {size(model['state_bytes'])} of state"),
        (f"{number(training['tokens'] * model['train_flops'])}FLOP", "of training, by formula"),
    ]
    for name, form, text in (
        ("tokens_per_second", "{:,.0f}", "tokens per second, median"),
        ("mfu", "{:.0%}", "model FLOP/s of what matrix products reach (MFU), median"),
    ):
        values = sorted(r[name] for r in records if name in r)
        if values:
            tiles.append((form.format(values[len(values) // 2]), text))
    return "".join(f"<div><b>{escape(v)}</b><span>{escape(text)}</span></div>" for v, text in tiles)


def _loss(run: Mapping[str, Any], records: Sequence[Record]) -> str:
    lines = [
        Series("training", _points(records, "bpb"), "c2"),
        Series("validation", _points(records, "validation_bpb"), "c1", dots=True),
    ]
    charts = [
        line_chart(f"Loss, {_bits(run)}", lines, x_label="step", cut=True),
        line_chart("The same, steps logarithmic", lines, x_label="step", log_x=True),
    ]
    return _cards(charts) or "<p>Nothing was measured yet.</p>"


def _speed(records: Sequence[Record]) -> str:
    charts = [
        line_chart(
            title, [Series(name, _points(records, name))], x_label="step", from_zero=True, cut=cut
        )
        for title, name, cut in (
            ("Tokens per second", "tokens_per_second", False),
            ("Learning rate", "learning_rate", False),
            ("Norm of the gradient, before clipping", "grad_norm", True),
            ("Commitment loss", "commitment", True),
        )
    ]
    return _cards(charts)


def _codebooks(run: Mapping[str, Any], records: Sequence[Record]) -> str:
    if run["config"]["attention"] != "vq":
        return ""
    charts = []
    for title, name, top in (
        ("Codewords in use, of all", "codebook_used", 1.0),
        (f"Perplexity of codes, of {run['config']['codebook_size']}", "codebook_perplexity", 0.0),
    ):
        line = [Series(name, _points(records, name))]
        charts.append(line_chart(title, line, x_label="step", from_zero=True))
        charts.append(_by_unit(title, name, records, top))
    mass = [Series("far mass", _points(records, "far_mass"))]
    title = "Keys beyond the window, log(1 + mass)"
    charts.append(line_chart(title, mass, x_label="step", from_zero=True))
    charts.append(_by_unit(title, "far_mass", records))
    charts.append(_by_unit("Tokens that a key lasts, by the bias", "time_constant", records))
    text = (
        "Means over all units and heads of the codewords that got a key in an update, and of the "
        "mass of keys beyond the window at the end of a batch."
    )
    return f'<p class="soft">{text}</p>{_cards(charts)}' if any(charts) else ""


def _by_unit(title: str, name: str, records: Sequence[Record], top: float = 0.0) -> str:
    """A map of what metrics.jsonl has of each unit; empty where it has nothing."""
    columns = [(r["step"], r[f"{name}_by_unit"]) for r in records if r.get(f"{name}_by_unit")]
    return heat_map(f"{title}, by unit", columns, x_label="step", row_label="unit", top=top)


def _positions(run: Mapping[str, Any], evaluation: Evaluation | str) -> str:
    if isinstance(evaluation, str):
        return f'<p class="soft">{escape(evaluation)}</p>'
    byte = math.log(2) * evaluation.bytes_per_token
    bins = [(start, end, loss / byte) for start, end, loss in evaluation.by_position]
    points = [(math.sqrt(max(start, 16) * end), bits) for start, end, bits in bins]
    chart = line_chart(
        f"Loss by tokens of history, {_bits(run)}",
        [Series("validation split", points, dots=True)],
        x_label="tokens before (logarithmic)",
        log_x=True,
    )
    gains = [
        (gain.nats / byte, None if gain.error is None else gain.error / byte)
        for gain in evaluation.far_gain_by_position or []
    ]
    gain_chart = line_chart(
        f"What the far part brings, {_bits(run)}",
        [
            Series(
                "gain",
                [(x, gain) for (x, _), (gain, _) in zip(points, gains, strict=False)],
                "c2",
                dots=True,
                errors=[error or 0.0 for _, error in gains],
            )
        ],
        x_label="tokens before (logarithmic)",
        log_x=True,
        from_zero=True,
    )
    table = _position_table(run, bins, gains)
    text = (
        f"{evaluation.tokens:,} tokens of the validation split in one stream, by the newest "
        f"checkpoint: {evaluation.bpb:.4f} {_bits(run)}."
    )
    if evaluation.accuracy is not None:
        text += f" {evaluation.accuracy:.1%} of the answers are right."
    if evaluation.far_gain is not None:
        gain, error = evaluation.far_gain.nats / byte, evaluation.far_gain.error
        spread = "" if error is None else f" ± {error / byte:.4f}"
        text += (
            f" With keys beyond the window masked, the same tokens take {gain:+.4f}{spread} more: "
            f"that is what the far part brings (bars: two standard errors)."
        )
    return f'<p class="soft">{escape(text)}</p>{_cards([chart, gain_chart, table])}'


def _position_table(
    run: Mapping[str, Any],
    bins: Sequence[tuple[int, int, float]],
    gains: Sequence[tuple[float, float | None]],
) -> str:
    """Bits by history, and what the far part brings if it is known."""
    head = ["tokens before", _bits(run)] + ["far part brings"] * bool(gains)
    rows = [[f"{start:,} to {end - 1:,}", f"{bits:.4f}"] for start, end, bits in bins]
    for row, (gain, error) in zip(rows, gains, strict=False):
        row.append(f"{gain:+.4f}" + ("" if error is None else f" ± {error:.4f}"))
    cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in (head, *rows))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _samples(samples: Sequence[Record], records: Sequence[Record]) -> str:
    if not samples:
        return '<p class="soft">None were kept (--train.sample-tokens 200 keeps some).</p>'
    scored = {r["step"]: r["validation_bpb"] for r in records if "validation_bpb" in r}
    last = len(samples) - 1
    chosen = sorted({round(i * last / (SAMPLES - 1)) for i in range(SAMPLES)})
    items = []
    for sample in (samples[i] for i in chosen):
        bpb = f", {scored[sample['step']]:.3f} bpb" if sample["step"] in scored else ""
        items.append(
            f'<li class="card"><b>Step {sample["step"]:,}</b><span class="soft">{bpb}</span>'
            f"<pre><em>{_shown(sample.get('prompt', ''))}</em>{_shown(sample['text'])}</pre></li>"
        )
    text = "The same prompt (grey) and seed at every validation, top-p 0.9."
    return f'<p class="soft">{text}</p><ol>{"".join(items)}</ol>'


def _details(run: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    model = run["model"]
    costs = {
        "parameters": f"{model['parameters']:,}",
        "numbers in codebooks": f"{model['codebook']:,}",
        "state of a sequence": size(model["state_bytes"]),
        "operations to train on a token": f"{number(model['train_flops'])}FLOP",
        "operations to decode a token": f"{number(model['decode_flops'])}FLOP",
        "read to decode a token": size(model["decode_bytes"]),
    }
    checkpoints = {
        f"step {c['step']:,}": size(c["bytes"]) + (", the best" if c["best"] else "")
        for c in run["checkpoints"]
    }
    tables = {
        "Costs": costs,
        "Data": run["data"],
        "Checkpoints": checkpoints,
        "Environment": environment,
        "Model configuration": run["config"],
        "Training configuration": run["train"],
    }
    return "".join(
        f'<details class="card"{" open" * (title == "Costs")}><summary>{title}</summary>'
        f"<table>{_rows(values.items())}</table></details>"
        for title, values in tables.items()
        if values
    )


def _points(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if name in record]


def _cards(contents: Iterable[str]) -> str:
    cards = "".join(f'<div class="card">{content}</div>' for content in contents if content)
    return f'<div class="charts">{cards}</div>' if cards else ""


def _rows(values: Iterable[tuple[str, Any]]) -> str:
    return "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in values
    )


def _bits(run: Mapping[str, Any]) -> str:
    return "bits per dimension" if run["data"]["image_shape"] else "bits per byte"


def _shown(text: str) -> str:
    """A model's text for HTML: escaped, and control characters as U+FFFD."""
    return escape(text.translate(_CONTROLS))
