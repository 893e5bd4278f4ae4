"""The frame of `tvq`: help, wrong options, and what is whose fault."""

import subprocess
import sys

import pytest

from tests.helpers import fails
from transformer_vq.cli import COMMANDS, main
from transformer_vq.config import ModelConfig, TrainConfig


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options_defaults_and_examples(capsys, command):
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: tvq {command}")
    assert "(default: " in printed or command == "info"
    assert f"  tvq {command} " in printed.partition("examples:\n")[2]


def test_help_reaches_every_field(capsys):
    assert main(["train", "--help"]) == 0
    words = set(capsys.readouterr().out.split())
    for prefix, kind in (("config", ModelConfig), ("train", TrainConfig)):
        for name in kind.__dataclass_fields__:
            assert f"--{prefix}.{name.replace('_', '-')}" in words


def test_overview_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "no command 'trian'"),
        (["train", "--out", "x"], "--data FILE"),
        (["train", "--data", "x"], "--out is missing"),
        (["train", "--out", "x", "--resume"], "no run in x to resume"),
        (["train", "--dry-run", "--resume"], "leave out --resume"),
        (
            ["train", "--dry-run", "--train.optimizer", "adam"],
            "one of adamw, lion, adafactor, muon",
        ),
        (["train", "--dry-run", "--train.accumulate", "3"], "--train.batch-size is 8, not a mul"),
        (["train", "--dry-run", "--preset", "huge"], "'huge': the presets are tiny"),
        (
            ["train", "--out", "x", "--data", "x", "--preset", "huge"],
            "'huge': the presets are tiny",
        ),
        (["train", "--out", "x", "--data", "x", "--config.d-k", "-1"], "--config.d-k is -1"),
        (["train", "--out", "x", "--data", "x", "--config.d-k", "one"], "--config.d-k is 'one'"),
        (["train", "--out", "x", "--data", "x", "--config.dk", "1"], "no option --config.dk"),
        (["train", "--out", "x", "--data", "x", "--config.attention", "best"], "one of vq, full"),
        (["train", "--out", "x", "--data", "x", "--train.batch-size", "0"], "--train.batch-size"),
        (["train", "--out", "x", "--data", "x", "--steps", "1", "--train.steps", "2"], "give one"),
        (["sample", "--run", "x", "more"], "'more'"),
        (["sample", "--run", "x", "--top-p", "0"], "--top-p is 0.0: it must be above 0"),
        (["sample", "--run", "x", "--top-p", "1.5"], "--top-p is 1.5: it must be above 0 and at"),
        (["sample", "--run", "x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["sample", "--run", "x", "--stop", ""], "stop sequence is empty"),
        (["sample", "--run", "x", "--prompt", "a", "--prompt-file", "b"], "both given"),
        (["sample", "--run", "x", "--num-samples", "0"], "--num-samples is 0"),
        (["sample", "--run", "x", "--num-samples", "2", "--save-state", "s"], "one state"),
        (["sample", "--run", "x", "--save-state", "no/s"], "no such folder"),
        (["eval", "--run", "x", "--rows", "0"], "--rows is 0"),
        (["demo", "--minutes", "0"], "--minutes is 0"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, 2, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eval", "sample", "info"])
def test_a_folder_without_a_model(capsys, tmp_path, command):
    assert "no run folder" in fails(capsys, 1, command, "--run", str(tmp_path / "none"))
    assert "no checkpoint" in fails(capsys, 1, command, "--run", str(tmp_path))


def test_unusable_files(capsys, tmp_path, run):
    text = tmp_path / "text"
    text.write_text("no state")
    assert "not a state file" in fails(capsys, 1, "sample", "--run", run, "--state", str(text))
    gone = str(tmp_path / "gone")
    assert "no file" in fails(capsys, 1, "sample", "--run", run, "--prompt-file", gone)
    assert "unknown split" in fails(capsys, 1, "eval", "--run", run, "--split", "best")


def test_faults_of_the_program_keep_their_traceback(monkeypatch, run):
    monkeypatch.setattr("transformer_vq.run.folder.load_run", lambda *_: int("x"))
    monkeypatch.setattr("transformer_vq.cli._is_ours", lambda error: False)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["sample", "--run", run])


def test_help_and_wrong_options_do_not_wait_for_jax(user_env):
    code = (
        "import sys; from transformer_vq.cli import main\n"
        "assert main(['train', '--help']) == 0\n"
        "assert main(['train', '--out', 'x', '--data', 'x', '--config.d-k', '-1']) == 2\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=user_env, check=True, capture_output=True)
