"""`tvq report`: one page that needs nothing else, whatever a model wrote. Checkpoints by name."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import train_on_one_device
from transformer_vq.cli import main
from transformer_vq.data import bundled_corpus
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.io.checksums import seal
from transformer_vq.run.log import read_metrics
from transformer_vq.show.charts import Series, heat_map, line_chart

OPTIONS = shlex.split("""--steps=12 --config.d-model=16 --config.d-k=8 --config.num-layers=1
    --config.codebook-size=8 --config.window-len=16 --config.block-len=32 --train.batch-size=8
    --train.sequence-len=32 --train.evaluate-tokens=300 --train.log-every=2 --train.sample-tokens=20
    --train.evaluate-every=4 --train.checkpoint-every=4 --train.warmup-steps=0""")
EVIL = "\x00</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>&amp;"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run, whose data file went since."""
    folder = tmp_path_factory.mktemp("runs")
    data, out = folder / "book.txt", folder / "a <run>"
    data.write_bytes(bundled_corpus().read_bytes()[:40_000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVQ_CACHE", "")
        train_on_one_device(patch)
        assert main(["train", "--data", str(data), "--out", str(out), *OPTIONS]) == 0
    return out


def add_lines(path: Path, records: list) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


class Page(HTMLParser):
    """Tags, attributes and text of a page; each tag that is opened must be closed in order."""

    VOID = frozenset({"meta", "input", "br", "img", "circle", "path", "rect"})

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.links, self.handlers, self.texts = [], [], [], {}
        self._open: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        links = ("src", "href", "action", "srcset", "data", "poster", "xlink:href")
        self.links += [value for name, value in attrs if name in links]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        tag = self._open[-1] if self._open else ""
        self.texts[tag] = self.texts.get(tag, "") + data + "\n"


def test_a_page_of_a_real_run(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TVQ_CACHE", "")
    assert main(["report", "--run", str(run)]) == 0
    assert "the report is in" in capsys.readouterr().out
    page = Page(run / "report.html")
    assert page.links == page.handlers == []
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert "url(" not in page.source and "@import" not in page.source
    assert "a &lt;run&gt;" in page.source and "<run>" not in page.source
    digest = hashlib.sha256(
        page.texts["script"][:-1].encode()
    ).digest()  # the only one that may run
    assert f"'sha256-{base64.b64encode(digest).decode()}'" in page.source

    best = min(
        r["validation_bpb"] for r in read_metrics(run / "metrics.jsonl") if "validation_bpb" in r
    )
    assert f"{best:.4f}" in page.texts["b"] and "MFU" in page.texts["span"]
    titles = page.texts["figcaption"]
    for title in ("Loss, bits per byte", "steps logarithmic", "Tokens per second", "Learning rate",
                  "Norm of the gradient", "Codewords in use", "Perplexity of codes, of 8",
                  "Loss by tokens of history", "What the far part brings, bits per byte",
                  "Keys beyond the window, log(1 + mass)"):  # fmt: skip
        assert title in titles
    assert titles.count("by unit") == 4 and "Tokens that a key lasts" in titles
    samples = read_metrics(run / "samples.jsonl")
    assert [s["step"] for s in samples] == [4, 8, 12]
    assert page.tags.count("pre") == 3
    for name in ("d_model", "max_loss_spike", "jaxlib", "devices", "fingerprint", "parameters"):
        assert name in page.texts["th"]
    assert "far part brings" in page.texts["td"]
    assert re.search(r"\n[+-]0\.\d{4} ± 0\.\d{4}\n", page.texts["td"])
    assert "256 to 511" in page.texts["td"] and "1,999 tokens of the validation" in page.source


def test_a_page_without_evaluation_of_a_run_with_everything(run, tmp_path, capsys):
    """Numbers by unit, hostile samples, many points, data that went: and nothing gets out."""
    copy = shutil.copytree(run, tmp_path / "run")
    count = len(read_metrics(copy / "metrics.jsonl")[0]["codebook_used_by_unit"])
    values = [(i + 1) / 8 for i in range(count)]
    names = ("codebook_used", "codebook_perplexity", "far_mass", "time_constant")
    units = {f"{name}_by_unit": values for name in names}
    more = [{"step": 12 + i, "bpb": 9 - i / 1e3, "loss": 1.0, **units} for i in range(3000)]
    add_lines(copy / "metrics.jsonl", more)
    add_lines(copy / "samples.jsonl", [{"step": 9000 + i, "text": EVIL} for i in range(20)])
    out = tmp_path / "page.html"
    assert main(["report", "--run", str(copy), "--no-eval", "--out", str(out)]) == 0
    page = Page(out)
    assert page.links == page.handlers == [] and page.tags.count("script") == 1
    assert "<script>alert(1)</script>" in page.texts["pre"] and "\x00" not in page.source
    assert page.texts["figcaption"].count("by unit") == 4
    assert 4 * count * 50 < page.tags.count("rect") <= 4 * count * 60
    assert page.tags.count("pre") == 8 and "Step 9,019" in page.texts["b"]  # some, the last one too
    assert "left out (--no-eval)" in page.texts["p"]
    assert len(page.source) < 400_000

    (copy.parent / "book.txt").write_text("other")
    assert (
        main(["report", "--run", str(copy), "--data", str(tmp_path / "gone"), "--out", str(out)])
        == 0
    )
    assert "no loss by position" in capsys.readouterr().out
    assert "not measured" in Page(out).texts["p"]


def test_what_cannot_be_reported(run, tmp_path, capsys):
    def fails(status: int, *arguments: str) -> str:
        assert main(["report", *arguments]) == status
        return capsys.readouterr().err

    assert "no run folder" in fails(1, "--run", str(tmp_path / "none"))
    assert "no such folder" in fails(2, "--run", str(run), "--out", str(tmp_path / "no" / "x"))


def test_damaged_files_are_named_and_the_rest_is_shown(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    for name, damage in (("metrics.jsonl", b"{damaged"), ("samples.jsonl", b"\xff\xfe\x00")):
        lines = (copy / name).read_bytes().splitlines()
        (copy / name).write_bytes(b"\n".join([lines[0], damage, *lines[1:]]) + b"\n\xfftorn")
    (copy / "config.json").write_text("{")
    assert main(["report", "--run", str(copy), "--no-eval"]) == 0
    said = capsys.readouterr().err
    assert f"line 2 of {copy / 'metrics.jsonl'} is damaged" in said
    assert f"line 2 of {copy / 'samples.jsonl'} is damaged" in said
    assert f"{copy / 'config.json'} cannot be used (it is damaged)" in said
    assert said.count("\n") == 3
    assert Page(copy / "report.html").tags.count("pre") == 3
    assert main(["info", "--run", str(copy)]) == 0
    assert "metrics.jsonl is damaged" in capsys.readouterr().err
    assert main(["info", "--run", str(copy), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["damage"]) == 2


def test_a_report_that_cannot_be_written_leaves_the_old_one(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["report", "--run", str(run), "--no-eval", "--out", str(out)]) == 1
    assert f"{out}: No space left on device" in capsys.readouterr().err
    assert out.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_charts():
    """A spike survives thinning, logarithmic axes leave 0 out, one point is enough."""
    points = [(float(x), 1.0 + (x == 5000)) for x in range(10_000)]
    chart = line_chart("t", [Series("s", points)], x_label="x")
    places = json.loads(re.search(r'data-points="([^"]*)"', chart)[1].replace("&quot;", '"'))
    assert len(places[0][1]) <= 400 and ["5k", "2"] in [place[1:] for place in places[0][1]]
    assert 'd="M52' in chart and "448.0" in chart  # from the left edge of the frame to the right
    log = line_chart(
        "t", [Series("s", [(0, 1), (1, 2), (10, 3), (100, 4)])], x_label="x", log_x=True
    )
    xs = [float(x) for x in re.findall(r"([\d.]+) [\d.]+(?=[L\"])", log.split('class="line')[1])]
    np.testing.assert_allclose(np.diff(xs[:3]), 198, atol=0.2)
    assert "<svg" in line_chart("t", [Series("s", [(3, 7.0)])], x_label="x")
    assert (
        line_chart("t", [Series("s", [])], x_label="x")
        == ""
        == heat_map("t", [], x_label="", row_label="")
    )
    series = Series("s", [(1, -2.0), (2, -1.0)], errors=[0.5, 0.0])
    bars = line_chart("t", [series], x_label="x", from_zero=True)
    places = re.findall(r'class="bar c1" d="M[\d.]+ ([\d.]+)V([\d.]+)"', bars)
    (low, high), (same, too) = [tuple(map(float, place)) for place in places]
    zero = float(re.search(r'class="axis" d="M52 ([\d.]+)H', bars)[1])
    assert low - high == pytest.approx(2 * (same - zero), abs=0.3) and same == too
    cut = [Series("s", [(i, 1e6 if i == 3 else 1.0 + i % 7) for i in range(100)])]
    assert "1M" in line_chart("t", cut, x_label="x").split("data-points")[1].split(">", 1)[1]
    assert (
        "1M"
        not in line_chart("t", cut, x_label="x", cut=True).split("data-points")[1].split(">", 1)[1]
    )


def test_in_a_browser(run, tmp_path):
    """400 pixels wide, nothing sticks out, and the script reads out a point."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("NOT TESTED: needs chromium")
    copy = shutil.copytree(run, tmp_path / "run")
    assert main(["report", "--run", str(copy), "--no-eval"]) == 0
    path = copy / "report.html"
    probe = """<style>html { width: 400px }</style><script>
        const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 1}));
        const wide = [...document.querySelectorAll("body *")].filter(
            (e) => e.getBoundingClientRect().right > 401);
        const said = svg.parentElement.querySelector("output").textContent;
        document.title = `${wide.length} wide, ${said}`;
        </script></body>"""
    source = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    path.write_text(source.replace("</body>", probe))
    options = shlex.split("""--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
        --dump-dom --disable-background-networking --disable-component-update --disable-sync""")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(
        [chromium, *options, profile, path.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    title = re.search("<title>(.*?)</title>", shown)[1]
    assert re.fullmatch(r"0 wide, step 12: training [\d.]+, validation [\d.]+", title)


def test_checkpoints_by_name(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TVQ_CACHE", "")
    copy = shutil.copytree(run, tmp_path / "run")
    best = Checkpoints(copy / "checkpoints").best()
    assert best == 12
    metadata = copy / "checkpoints" / "8" / "metadata.json"
    saved = json.loads(metadata.read_text())
    saved["metrics"]["validation_loss"] = 0.5
    metadata.write_text(json.dumps(saved))
    seal(metadata.parent)

    def step(command: str, *options: str) -> int:
        extra = ["--max-tokens", "2"] if command == "sample" else []
        assert main([command, "--run", str(copy), "--json", *extra, *options]) == 0
        record = json.loads(capsys.readouterr().out)
        return record["training"]["step"] if command == "info" else record["step"]

    named = [step("info", "--checkpoint", name) for name in ("latest", "best", "4")]
    assert [step("info"), *named] == [12, 12, 8, 4]
    assert step("sample", "--checkpoint", "best") == step("eval", "--checkpoint", "best") == 8

    def fails(name: str) -> str:
        assert main(["info", "--run", str(copy), "--checkpoint", name]) == 1
        return capsys.readouterr().err

    assert "'newest': it must be latest, best or a step" in fails("newest")
    assert "no checkpoint of step 7" in fails("7") and "it has 4, 8, 12" in fails("7")
    for each in (copy / "checkpoints").glob("*/metadata.json"):
        each.write_text(each.read_text().replace("validation_loss", "other"))
        seal(each.parent)
    assert "no checkpoint in" in fails("best") and "--train.evaluate-every" in fails("best")
