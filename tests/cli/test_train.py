"""`tvq train`: what it prints, what it leaves, and how it goes on."""

import gzip
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import SIZES, STEPS, fails, start
from transformer_vq import costs
from transformer_vq.cli import main
from transformer_vq.cli.parse import UsageError
from transformer_vq.cli.train import Train
from transformer_vq.config import ModelConfig
from transformer_vq.run import peak
from transformer_vq.run.folder import load_run
from transformer_vq.run.log import read_metrics
from transformer_vq.run.peak import Rates


def test_products_are_as_asked_for_or_as_is_faster(capsys, monkeypatch):
    config = ModelConfig.preset("tiny")

    def made(asked, saved=None, **options):
        return Train(products=asked, **options)._with_products(config, saved).products

    for rate, said in (
        (0.9e11, "tvq: --products bfloat16 is slower here than float32: th"),
        (2e11, ""),
    ):
        monkeypatch.setattr(peak, "product_rates", lambda config, rate=rate: Rates(1e11, rate))
        assert made("bfloat16") == "bfloat16" and made("float32") == "float32"
        assert capsys.readouterr().err[: len(said) or None] == said
    for lead, faster in ((3e11, "bfloat16"), (1.1e11, "float32")):
        monkeypatch.setattr(peak, "product_rates", lambda config, lead=lead: Rates(1e11, lead))
        assert made("auto") == faster
        assert capsys.readouterr().out.startswith(f"products: {faster}, for those of a unit run")
    rounded = {"config": {"products": "bfloat16"}}
    assert made("auto", saved=rounded) == made("bfloat16", saved=rounded) == "bfloat16"
    assert made("auto", saved={"config": {}}) == "float32"
    with pytest.raises(UsageError, match="and the run says bfloat16 already: leave it out"):
        made("float32", saved=rounded)
    with pytest.raises(UsageError, match=r"and --config\.products says float32 already"):
        made("bfloat16", config={"products": "float32"})
    with pytest.raises(UsageError, match="auto measures one machine, and there are several"):
        made("auto", distributed=True)
    half = ModelConfig.preset("tiny", compute_dtype="bfloat16")
    with pytest.raises(
        UsageError, match=r"--config.products is bfloat16 and --config.compute-dtype is"
    ):
        Train(products="bfloat16")._with_products(half, None)


def test_dry_run_tells_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    """The model and recipe of a preset, changed; on the eight devices of the tests."""
    monkeypatch.chdir(tmp_path)
    changes = ["--train.batch-size=16", "--train.ema-decay=0.9", "--config.num-layers=1"]
    changes += ["--train.sequence-len=64", "--train.optimizer=adamw"]
    assert main(["train", "--preset", "tiny", "--dry-run", *changes]) == 0
    printed = capsys.readouterr().out
    config = ModelConfig.preset("tiny", num_layers=1)
    size = 4 * costs.parameter_count(config) / 1e6
    for line in (
        "recipe: adamw, 1,000 updates of 16 rows by 64 tokens, in sequences of 64",
        "for 8 devices (cpu)",
        f"  parameters                {size:.2f} MB",
        f"  optimizer                 {2 * size:.2f} MB",
        " of 1,024 tokens",
        "in all: 1.02 M tokens",
    ):
        assert line in printed, printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_task(capsys):
    """It has the length of an episode; files are not read, and that is said."""
    plan = ["train", "--preset", "tiny", "--dry-run", "--config.num-layers=1", "--data"]
    assert main([*plan, "recall:pairs=3"]) == 0
    assert "8 rows by 44 tokens, in sequences of 44" in capsys.readouterr().out
    assert main([*plan, "recall:pairs=0"]) == 1
    assert "pairs is 0: it must be" in capsys.readouterr().err
    assert main([*plan, "a.txt", "--train.sequence-len=64"]) == 0
    said = "".join(capsys.readouterr())
    assert "in sequences of 64" in said and "the data are not read" in said


def test_a_recipe_for_other_data_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = ["train", "--data", "copy:episodes=20", "--out", "run", "--preset", "tiny"]
    for option in ("--train.repeat-passages=0.5", "--train.streaming=True"):
        assert "document" in fails(capsys, 1, *task, option)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no file"), (b"", "is empty"), (b"x", "0 of the 65 tokens"), ("folder", "a directory")],
)
def test_data_that_cannot_be_trained_on(capsys, tmp_path, content, says):
    path = tmp_path / "data"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    out = str(tmp_path / "run")
    assert says in fails(capsys, 1, "train", "--data", str(path), "--out", out, *SIZES)
    assert not Path(out).exists()


def test_a_run_is_not_overwritten(capsys, run, data):
    says = fails(capsys, 1, "train", "--data", str(data), "--out", run, *SIZES)
    assert f"already holds a run, at step {STEPS}" in says


@pytest.mark.slow
def test_the_same_command_gives_the_same_losses(capsys, tmp_path, run, content):
    """Digit for digit; and a compressed file is what it holds."""
    data, out = tmp_path / "book.gz", str(tmp_path / "run")
    data.write_bytes(gzip.compress(content))
    assert main(["train", "--data", str(data), "--out", out, "--steps", str(STEPS), *SIZES]) == 0
    printed = capsys.readouterr().out
    assert "60,000 bytes" in printed and f"done: {STEPS} steps" in printed

    def losses(folder: str) -> list:
        records = read_metrics(Path(folder) / "metrics.jsonl")
        return [(r["step"], r.get("loss"), r.get("validation_loss")) for r in records]

    assert losses(out) == losses(run)
    assert len(losses(out)) == STEPS + 1


@pytest.mark.slow
def test_resuming_needs_nothing_but_the_folder(capsys, tmp_path, run):
    out = shutil.copytree(run, tmp_path / "run")
    arguments = ["train", "--out", str(out), "--resume"]
    assert "--config.d-model 32, not 64" in fails(capsys, 1, *arguments, "--config.d-model", "64",
                                         "--config.d-v", "64")  # fmt: skip
    assert main([*arguments, "--steps", str(STEPS + 2)]) == 0
    assert f"resuming at step {STEPS}" in capsys.readouterr().out
    steps = [r["step"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, STEPS + 3))


@pytest.mark.slow
def test_ctrl_c_in_training_saves(tmp_path, data, user_env):
    out = str(tmp_path / "run")
    process = start(user_env, "train", "--data", str(data), "--out", out, "--steps", "1000000",
                    "--train.checkpoint-every", "1000000", *SIZES)  # fmt: skip
    while not (line := process.stdout.readline()).startswith(b"step "):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    step = int(re.search(rb"interrupted and saved at step (\d+)", printed)[1])
    assert f"train --resume --out {out}".encode() in printed
    assert load_run(out)[1].step == step > 0


@pytest.mark.slow
def test_a_second_training_and_a_terminal_that_closes(tmp_path, data, user_env, capsys):
    """The second `tvq train` is refused; SIGHUP, even twice, saves the first, which is unharmed."""
    out = tmp_path / "run"
    arguments = ["train", "--data", str(data), "--out", str(out), "--steps", "1000000",
                 "--train.checkpoint-every", "1000000", *SIZES]  # fmt: skip
    process = start(user_env, *arguments)
    while not (line := process.stdout.readline()).startswith(b"step "):
        assert line, process.stderr.read()
    before = (out / "config.json").read_bytes()
    assert f"being written by process {process.pid} on " in fails(capsys, 1, *arguments)
    other = [*arguments, "--train.seed", "1"]
    assert "or use another folder" in fails(capsys, 1, *other)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in errors
    step = int(re.search(rb"interrupted and saved at step (\d+)", printed)[1])
    assert load_run(out)[1].step == step and (out / "config.json").read_bytes() == before
    steps = [r["step"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, step + 1))


@pytest.mark.slow
def test_a_reader_that_leaves_training_saves_it(tmp_path, data, user_env):
    out = tmp_path / "run"
    process = start(user_env, "train", "--data", str(data), "--out", str(out), "--steps", "1000000",
                    "--train.checkpoint-every", "1000000", "--train.evaluate-every", "20",
                    *SIZES)  # fmt: skip
    assert any(line.startswith(b"step ") for line in process.stdout)  # up to there it is read
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(timeout=300) == 141
    assert load_run(out)[1].step > 0


@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff", b'{"data": 5}'])
def test_a_damaged_config_is_that_of_the_checkpoint(capsys, tmp_path, run, damage):
    out = shutil.copytree(run, tmp_path / "run")
    whole = (out / "config.json").read_bytes()
    (out / "config.json").write_bytes(damage)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert "config.json is damaged: the checkpoint says" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == whole
    shutil.rmtree(out / "checkpoints")
    (out / "config.json").write_bytes(damage)
    assert "is damaged (" in fails(capsys, 2, "train", "--out", str(out), "--resume")


@pytest.mark.slow
def test_kill_during_a_checkpoint(tmp_path, data, user_env):
    """Whatever was being written when it was killed, `--resume` goes on from a whole checkpoint."""
    arguments = ["train", "--data", str(data), "--steps", "80", "--train.checkpoint-every", "2",
                 "--train.evaluate-every", "0", *SIZES]  # fmt: skip
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    for kill in range(3):
        resume = ["--resume"] if kill else []
        process = start(user_env, *arguments, "--out", str(out), *resume)
        before = max(
            (int(p.name) for p in checkpoints.glob("[0-9]*") if p.name.isdecimal()), default=0
        )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            names = [p.name for p in checkpoints.glob("*")] if checkpoints.is_dir() else []
            newest = max((int(n) for n in names if n.isdecimal()), default=0)
            if newest > before + 4 and any("tmp" in name for name in names):
                break
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    process = start(user_env, *arguments, "--out", str(out), "--resume")
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert b"done: 80 steps" in printed

    unbroken = tmp_path / "unbroken"
    process = start(user_env, *arguments, "--out", str(unbroken))
    process.communicate(timeout=500)

    def losses(folder: Path) -> list:
        return [(r["step"], r.get("loss")) for r in read_metrics(folder / "metrics.jsonl")]

    assert losses(out) == losses(unbroken)
