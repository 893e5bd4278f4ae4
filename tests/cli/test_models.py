"""A run opened with rounded weights: what that costs, and whose states are whose."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.engine.plain import make_model
from tests.helpers import fails
from transformer_vq.cli import main, models

PROMPT = ["--prompt", "It was", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def own(run, tmp_path_factory) -> str:
    """A copy of the run, to touch."""
    return str(shutil.copytree(run, tmp_path_factory.mktemp("own") / "run"))


@pytest.mark.slow
def test_what_rounding_costs_is_measured_once_and_kept(capsys, own):
    arguments = ["sample", "--run", own, "--weights", "int8", *PROMPT]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "tvq: int8 weights cost " in said and " tokens of the validation split" in said
    assert main(arguments) == 0
    assert "cost" not in capsys.readouterr().err
    assert main(["eval", "--run", own, "--weights", "bfloat16", "--no-gain"]) == 0
    printed = capsys.readouterr().out
    kept = json.loads(Path(own, "weights.json").read_text())
    assert f"{kept['bfloat16']['rounded_bpb']:.4f} bpb   with bfloat16 weights: " in printed
    assert "(allowed)" in printed and set(kept) == {"int8", "bfloat16"}


def test_a_state_is_of_the_weights_that_made_it(capsys, own, tmp_path):
    state = str(tmp_path / "state")
    rounded = ["--run", own, "--weights", "int8"]
    assert main(["sample", *rounded, *PROMPT, "--save-state", state]) == 0
    go_on = ["--state", state, "--max-tokens", "4"]
    assert main(["sample", *rounded, *go_on]) == 0
    said = fails(capsys, 1, "sample", "--run", own, *go_on)
    assert "is the state of another model: use the one it was made with" in said
    assert "--far-cap, and the rounding of products and weights included" in said


def test_rounding_that_costs_too_much_or_nobody_knows_what(capsys, own, data, tmp_path):
    assert main(["sample", "--run", own, "--weights", "int8", *PROMPT]) == 0  # measured once
    capsys.readouterr()
    bad = shutil.copytree(own, tmp_path / "bad")
    arguments = ["sample", "--run", str(bad), "--weights", "int8", *PROMPT]
    file, away = bad / "weights.json", tmp_path / "away"
    kept = json.loads(file.read_text())
    kept["int8"]["rounded_bpb"] += 0.02
    file.write_text(json.dumps(kept))
    said = fails(capsys, 1, *arguments)
    assert "int8 weights cost 0.02" in said and "use --weights bfloat16, or the weights" in said
    file.unlink()
    data.rename(away)
    try:
        said = fails(capsys, 1, *arguments)
    finally:
        away.rename(data)
    assert "what --weights int8 costs was not measured yet, and the text of the run" in said
    assert f"measure it once with tvq eval --run {bad} --weights int8 --data FILE" in said


def test_a_state_after_a_stop_text_has_the_room_of_any_other():
    """Of full attention. The text is read again, whether or not the prompt was read before."""
    model = make_model(attention="full")
    prompt, tokens, room = [1, 2], [3], 1000
    beyond = SimpleNamespace(state=SimpleNamespace(position=[4]))
    whole = models.read(model, prompt, None, room=room)
    assert (whole.capacity or 0) >= len(prompt) + room
    for start, unread in ((None, prompt), (whole, [])):
        after = models.state_after(model, start, unread, tokens, beyond, room)
        assert after.capacity == whole.capacity and int(after.position[0]) == 3
