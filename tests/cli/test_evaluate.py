"""`tvq eval`: the same in words and in JSON, and whose data it scores."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import fails
from transformer_vq.cli import main
from transformer_vq.io.checksums import seal
from transformer_vq.ops.evaluate import Evaluation
from transformer_vq.ops.scores import Gain


def test_eval_says_the_same_in_words_and_in_json(capsys, run):
    assert main(["eval", "--run", run, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["split"] == "test" and record["tokens"] == 2999
    assert record["bpb"] == pytest.approx(record["loss"] / np.log(2))
    assert [row["start"] for row in record["by_position"]][:3] == [0, 64, 128]
    assert main(["eval", "--run", run]) == 0
    printed = capsys.readouterr().out
    assert f"{record['bpb']:.4f} bpb" in printed and "2,999 tokens" in printed
    assert f"{record['by_position'][-1]['loss']:.4f}" in printed


def test_eval_tells_what_the_far_part_brings(capsys, run, tmp_path):
    assert main(["eval", "--run", run, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    first, *_, last = record["by_position"]
    assert first["far_gain_error"] is None and last["far_gain_error"] > 0
    tokens = [min(row["end"], 2999) - row["start"] for row in record["by_position"]]
    gains = [row["far_gain"] for row in record["by_position"]]
    assert record["far_gain"] == pytest.approx(np.dot(tokens, gains) / 2999)
    assert main(["eval", "--run", run]) == 0
    printed = capsys.readouterr().out
    said = f"The far part brings {record['far_gain']:+.4f} ± {record['far_gain_error']:.4f} bpb"
    assert said in printed and f"{last['far_gain']:+.4f} ± {last['far_gain_error']:.4f}" in printed
    assert "(± standard error)" in printed
    (tmp_path / "short").write_bytes(b"Call me Ishmael. " * 9)
    assert main(["eval", "--run", run, "--data", str(tmp_path / "short"), "--split", "all"]) == 0
    assert "(too few tokens for a standard error)" in capsys.readouterr().out
    assert main(["eval", "--run", run, "--no-gain", "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert without["loss"] == record["loss"] and "far_gain" not in without
    assert "far_gain" not in without["by_position"][0]


def test_eval_forgets_when_it_is_told_to(capsys, run):
    assert main(["eval", "--run", run, "--no-gain", "--context-len", "128", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 2999 and record["by_position"][-1]["end"] == 128
    assert main(["eval", "--run", run, "--no-gain", "--json"]) == 0  # control
    whole = json.loads(capsys.readouterr().out)
    assert whole["bpb"] != record["bpb"] and whole["by_position"][-1]["end"] == 2999
    said = fails(capsys, 2, "eval", "--run", run, "--context-len", "2500")
    assert "--context-len is 2500: it must be a multiple of --chunk-len, 2048" in said


@pytest.mark.slow
def test_eval_bounds_what_far_keys_weigh(capsys, run):
    def bpb(*arguments):
        assert main(["eval", "--run", run, "--no-gain", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["bpb"]

    plain = bpb()
    assert bpb("--far-decay", "200") != plain and bpb("--far-cap", "20") != plain
    assert bpb("--far-cap", "1000000") == plain  # control: there are never so many
    assert 0 < abs(bpb("--products", "bfloat16") - plain) < 0.01  # no bound: products are rounded
    said = fails(capsys, 2, "eval", "--run", run, "--far-decay", "-1")
    assert "--far-decay is -1" in said


def test_eval_says_that_long_histories_confuse(capsys, monkeypatch, run):
    """Where losses rise with history, unless the far part is known to help all the same."""
    for late, gain, warned in ((1.1, -0.1, False), (1.3, -0.1, True), (1.3, 0.1, False)):
        bins = [(0, 64, 2.0), (64, 128, 1.0), (128, 256, late)]
        gains = [Gain(gain, 0.01)] * 3
        result = Evaluation(1.5, 256, bins, far_gain=gains[0], far_gain_by_position=gains)
        monkeypatch.setattr("transformer_vq.cli.evaluate.score", lambda *_, r=result, **__: r)
        assert main(["eval", "--run", run]) == 0
        assert ("longer histories confuse it" in capsys.readouterr().out) == warned


def test_eval_knows_the_data_of_the_run(capsys, tmp_path, run):
    """A file that went or changed is not scored in silence."""
    moved = shutil.copytree(run, tmp_path / "run")
    path = next((moved / "checkpoints").glob("*/metadata.json"))
    saved = json.loads(path.read_text())

    def with_data(file: Path) -> None:
        saved["metadata"]["data"]["path"] = str(file)
        path.write_text(json.dumps(saved))
        seal(path.parent)

    with_data(tmp_path / "gone.txt")
    assert "not there any more" in fails(capsys, 1, "eval", "--run", str(moved))
    (tmp_path / "other.txt").write_text("other text " * 20)
    with_data(tmp_path / "other.txt")
    assert "has changed" in fails(capsys, 1, "eval", "--run", str(moved))
    other = ["--data", str(tmp_path / "other.txt"), "--split", "all"]
    assert main(["eval", "--run", run, *other, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 219
