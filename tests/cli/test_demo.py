"""`tvq demo`, small; and, slowly, the real one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from transformer_vq import Model
from transformer_vq.cli import demo, main
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import bundled_corpus
from transformer_vq.measure import recall
from transformer_vq.show.figures import learning_curve

FILES = {"checkpoints", "config.json", "metrics.jsonl", "learning_curve.png", "samples.txt",
         "results.json"}  # fmt: skip


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.slow
def test_demo_leaves_a_run_and_is_done(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TVQ_CACHE", "")
    config = ModelConfig(
        d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=64, window_len=16
    )
    train = TrainConfig(batch_size=4, sequence_len=64, steps=4, evaluate_tokens=500, remat=False)
    monkeypatch.setattr(demo, "CONFIG", config)
    monkeypatch.setattr(demo, "TRAIN", train)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 20)
    monkeypatch.setattr(demo, "PASSAGE", 200)
    asked = []

    def train_on(config, train, source, max_seconds):
        assert config == demo.RECALL_CONFIG and train == demo.RECALL_TRAIN and max_seconds == 24
        assert source.sequence_len == demo.RECALL.length
        return Model({}, {}, config)

    def share_right(model, task, episodes):
        asked.append((task.pairs, task.filler, episodes))
        return 0.987 if model.config.use_cache else 0.0625

    monkeypatch.setattr(recall, "train_on", train_on)
    monkeypatch.setattr(recall, "share_right", share_right)
    book = tmp_path / "book.txt"
    book.write_bytes(bundled_corpus().read_bytes()[:150_000])
    monkeypatch.setattr(demo, "bundled_corpus", lambda: book)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    first = capsys.readouterr().out
    for text in (
        "far part brings",
        "A passage of 200 bytes, read again",
        "98.7% of its answers are right. With its\nfar part masked: 6.2%. Guessing: 6.2%.",
        "Transformer-VQ",
        "bz2 -9",
        "xz -9e",
        "The whale",
        "tvq sample",
    ):
        assert text in first
    assert {path.name for path in out.iterdir()} >= FILES
    assert picture_size(out / "learning_curve.png") == (1200, 675)
    assert all(prompt in (out / "samples.txt").read_text() for prompt in demo.PROMPTS)
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] and results["bytes"] == 7_500 == results["tokens"] + 1
    assert results["first_reading"] > 1 and results["far_gain_error"] > 0
    assert (results["recall"], results["recall_masked"]) == (0.987, 0.0625)
    assert asked == [(6, demo.LATER, demo.ASKED)] * 2

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(["demo", "--out", str(out)]) == 0
    again = capsys.readouterr().out
    again_written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert again_written == written  # told again: neither trained nor evaluated
    assert "is done" in again and f"{results['bpb']:.3f}" in again and "The whale" in again

    # An interrupted demo, trained but not evaluated, goes on. A minute leaves out remembering.
    (out / "results.json").unlink()
    assert main(["demo", "--out", str(out), "--minutes", "1"]) == 0
    assert "learned to remember" not in capsys.readouterr().out
    later = json.loads((out / "results.json").read_text())
    assert (later["bpb"], later["recall"]) == (results["bpb"], None) and len(asked) == 2


def test_results_that_are_damaged_are_none(capsys, tmp_path):
    """What an earlier version wrote, without recall, is shown."""
    position = {"start": 0, "end": 9, "loss": 1.7, "bpb": 2.5}
    sound: dict = dict.fromkeys(("bpb", "bytes", "bz2_bytes", "xz_bytes", "minutes"), 5)
    sound |= {"first_reading": 2.1, "second_reading": 2.0}
    gain = {"far_gain": 0.1, "far_gain_error": 0.01}
    sound |= {"finished": True, "trained": "4 updates", "by_position": [position | gain], **gain}
    recall = {"recall": 1.0, "recall_masked": 0.1}
    (tmp_path / "samples.txt").write_text("The whale")

    def shown(results: str) -> str | None:
        (tmp_path / "results.json").write_text(results)
        if demo.Demo(tmp_path)._results() is None:
            return None
        assert main(["demo", "--out", str(tmp_path)]) == 0
        return capsys.readouterr().out

    with_recall, without = shown(json.dumps(sound | recall)), shown(json.dumps(sound))
    assert "100.0% of its answers are right" in with_recall and "is done" in with_recall
    assert "answers" not in without and "is done" in without
    damages = [{"bpb": math.nan}, {"xz_bytes": 0}, {"bytes": 10**400}, {"finished": "x"}]
    damages += [{"by_position": []}, {"by_position": [{}]}, {"far_gain": math.inf}, {"trained": 5}]
    damages += [{"recall": 2}, {"recall_masked": None}, {"recall": "x"}]
    for change in damages:
        assert shown(json.dumps(sound | recall | change)) is None
    assert shown("[" * 10**5) is None
    hostile = shown(json.dumps(sound | {"trained": "\x1b[2J [/bold]"}))
    assert r"\x1b[2J [/bold]; every byte" in hostile


def test_learning_curve_of_little(tmp_path):
    """No measurements, or one, are no reason to fail."""
    learning_curve([], tmp_path / "none.png")
    learning_curve([{"step": 1, "bpb": 8.0}], tmp_path / "one.png", levels={"xz": 3.0}, test=2.0)
    assert picture_size(tmp_path / "one.png") == (1200, 675)


@pytest.mark.slow
def test_the_demo_beats_bz2_in_five_minutes(tmp_path, user_env):
    tvq = str(Path(sys.executable).with_name("tvq"))
    subprocess.run([tvq, "demo"], cwd=tmp_path, env=user_env, check=True, stdout=subprocess.PIPE)
    results = json.loads((tmp_path / "runs/demo/results.json").read_text())
    assert results["seconds"] < 5 * 60  # of training, however slow the machine is
    assert results["tokens"] == 60_249
    bz2, xz = (8 * results[f"{name}_bytes"] / results["bytes"] for name in ("bz2", "xz"))
    assert (round(bz2, 3), round(xz, 3)) == (2.873, 3.175)
    assert results["bpb"] < bz2 - 0.2
    assert results["recall"] > 0.9 and results["recall_masked"] < 0.2
