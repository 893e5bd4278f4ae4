"""What rounding costs: kept beside the checkpoints, and refused above a limit."""

import dataclasses

import pytest

from tests.helpers import CONFIG, TOKENS
from transformer_vq import TrainConfig, init_model
from transformer_vq.errors import UserError
from transformer_vq.nn.weights import round_weights
from transformer_vq.run import weights
from transformer_vq.run.folder import DataSource, RunInfo
from transformer_vq.run.weights import Cost, load_cost, measure_cost, require_small, save_cost

INFO = RunInfo(CONFIG, TrainConfig(), DataSource("text", 1, ""), step=7, seconds=2.5)
COST = Cost(7, 2.5, 1.5, 1.502, 100)


def test_what_was_measured_is_kept_of_this_checkpoint(tmp_path):
    assert load_cost(tmp_path, INFO, "int8") is None
    save_cost(tmp_path, "int8", COST)
    other = dataclasses.replace(COST, rounded_bpb=1.6)
    save_cost(tmp_path, "bfloat16", other)
    assert load_cost(tmp_path, INFO, "int8") == COST
    assert load_cost(tmp_path, INFO, "bfloat16") == other
    for change in (dict(step=8), dict(seconds=2.6)):  # another checkpoint, another run
        assert load_cost(tmp_path, dataclasses.replace(INFO, **change), "int8") is None


@pytest.mark.parametrize("content", ["", "[]", '{"int8": 3}', '{"int8": {"step": 7}}', "\xff{"])
def test_a_damaged_file_is_as_none(tmp_path, content):
    save_cost(tmp_path, "int8", COST)
    (tmp_path / weights.FILE).write_bytes(content.encode("latin1"))
    assert load_cost(tmp_path, INFO, "int8") is None
    save_cost(tmp_path, "int8", COST)
    assert load_cost(tmp_path, INFO, "int8") == COST


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path):
    assert not save_cost(tmp_path / "gone", "int8", COST)
    assert save_cost(tmp_path, "int8", COST)


def test_too_much_is_refused():
    require_small(COST, "int8")
    for worse in (1.5101, float("nan")):
        cost = dataclasses.replace(COST, rounded_bpb=worse)
        with pytest.raises(UserError, match=r"bits per byte \(100 tokens .*--weights bf"):
            require_small(cost, "int8")
    with pytest.raises(UserError, match=r"at most 0\.01 is allowed: use the weights as saved"):
        require_small(cost, "bfloat16")


def test_the_same_text_is_scored_with_both(monkeypatch):
    monkeypatch.setattr(weights, "TOKENS", 50)
    model = init_model(CONFIG, 0)
    cost = measure_cost(model, round_weights(model, "int8"), INFO, TOKENS)
    assert cost.tokens == 50 and 0 < abs(cost.difference) < 0.05
    assert measure_cost(model, model, INFO, TOKENS).difference == 0
