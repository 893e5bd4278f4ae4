"""`tvq export`, and what takes an exported model for a run: every command."""

import json
from pathlib import Path

import pytest

from tests.helpers import STEPS, fails, hub_cache, raw, sample
from transformer_vq import load
from transformer_vq.cli import main
from transformer_vq.cli.models import open_draft
from transformer_vq.io.hub import HubError
from transformer_vq.run.folder import load_run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> dict[str, str]:
    """Exported models by dtype."""
    folders = {}
    for dtype in ("float32", "bfloat16"):
        folders[dtype] = out = str(tmp_path_factory.mktemp("exports") / dtype)
        assert main(["export", "--run", run, "--out", out, "--dtype", dtype]) == 0
    return folders


def printed(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


def test_export_says_what_it_wrote(capsys, run, tmp_path):
    out = tmp_path / "model"
    command = ["export", "--run", run, "--out", str(out), "--license", "mit"]
    assert main([*command, "--checkpoint", "best"]) == 0
    output = capsys.readouterr()
    assert f"the model at step {STEPS} is in {out}: " in output.out and "in float32" in output.out
    assert 'edit its "data" before you publish it' in output.err
    assert raw(load(out)[0]) == raw(load(run)[0])
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "on the validation split, at step 4." in card
    assert "already holds an exported model" in fails(capsys, 1, *command)
    assert main([*command, "--overwrite"]) == 0
    assert "no run folder" in fails(capsys, 1, "export", "--run", "x", "--out", str(tmp_path / "y"))
    assert "--license is" in fails(capsys, 2, *command[:-1], "mit\nx: y")
    assert "is not empty" in fails(capsys, 1, "export", "--run", run, "--out", run)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_commands_give_what_they_give_of_the_run(capsys, run, exported):
    same = exported["float32"]
    prompt = ["--prompt", "It was", "--max-tokens", "20"]
    assert sample(capsys, same, *prompt) == sample(capsys, run, *prompt)
    of_run, of_export = (printed(capsys, "eval", "--run", folder) for folder in (run, same))
    assert without(of_export, "run", "seconds") == without(of_run, "run", "seconds")
    assert raw(open_draft(same)) == raw(load(run)[0])


def test_info_and_report(capsys, run, exported, tmp_path):
    of_run, of_export = (
        printed(capsys, "info", "--run", folder) for folder in (run, exported["bfloat16"])
    )
    differ = ("run", "checkpoints", "config", "model", "serving")  # half the bytes of weights
    assert without(of_export, *differ) == without(of_run, *differ)
    assert of_export["config"] == {**of_run["config"], "param_dtype": "bfloat16"}
    assert of_export["checkpoints"][0]["step"] == STEPS
    page = tmp_path / "page.html"
    command = ["report", "--run", exported["float32"], "--no-eval", "--out", str(page)]
    assert main(command) == 0
    assert f"Step {STEPS} of" in page.read_text() and "Nothing was measured" not in page.read_text()


def test_a_state_goes_on_with_the_exported_model(capsys, run, exported, tmp_path):
    state = str(tmp_path / "state")
    made = ["--prompt", "It was", "--max-tokens", "5", "--save-state", state]
    sample(capsys, run, *made)
    go_on = ["--state", state, "--max-tokens", "10"]
    expected = sample(capsys, run, *go_on)
    assert sample(capsys, exported["float32"], *go_on) == expected
    other = ["sample", "--run", exported["bfloat16"], *go_on]
    assert "is the state of another model" in fails(capsys, 1, *other)


def test_models_of_the_hub(capsys, monkeypatch, exported, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files = {path.name: path.read_bytes() for path in Path(exported["float32"]).iterdir()}
    hub_cache(tmp_path, files)
    name = "hf:owner/name"
    assert raw(load(name)[0]) == raw(load_run(name)[0]) == raw(load(exported["float32"])[0])
    prompt = ["--prompt", "It was", "--max-tokens", "20"]
    assert sample(capsys, name, *prompt) == sample(capsys, exported["float32"], *prompt)
    assert printed(capsys, "info", "--run", name)["run"] == name
    assert "--out is missing" in fails(capsys, 2, "report", "--run", name)
    texts = {"score": ["--text", "a"], "prefill": ["--prompt-file", "a", "--save-state", "b"]}
    texts |= {"export": ["--out", "c"], "report": ["--out", "d"]}
    for command in ("info", "eval", "sample", "serve", "draw", *texts):
        arguments = ["--run", "hf:owner/other", *texts.get(command, [])]
        sentence = fails(capsys, 1, command, *arguments)
        assert sentence.startswith("tvq: cannot get hf:owner/other: ")
    with pytest.raises(HubError, match="cannot get hf:owner/other"):
        open_draft("hf:owner/other")


def test_no_run_begins_in_an_exported_model(capsys, exported, data):
    folder = exported["float32"]
    for more in (["--resume"], ["--data", str(data)]):
        assert "cannot be trained on" in fails(capsys, 1, "train", "--out", folder, *more)
