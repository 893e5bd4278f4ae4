"""Scripts in benchmarks/: what `recall.py` trains, asks and prints."""

import importlib.util
import json

import pytest

from tests.helpers import ROOT
from transformer_vq.errors import UserError

spec = importlib.util.spec_from_file_location("recall", ROOT / "benchmarks/recall.py")
recall = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recall)

TINY = {"d_model": 8, "d_k": 4, "codebook_size": 8}


def test_fields_that_a_kind_of_model_does_not_have_are_left_out(capsys):
    options = recall.Options(config={**TINY, "far_cap": 9})
    vq, near, full = (recall.configured(recall.CONFIG, name, options) for name in recall.MODELS)
    assert (vq.d_v, vq.far_cap, vq.use_cache, near.use_cache) == (16, 9, True, False)
    assert (full.attention, full.far_cap, full.d_model) == ("full", 0, 8)
    assert "full without far_cap: far_cap is 9" in capsys.readouterr().err
    with pytest.raises(UserError, match="d_model is 7"):
        recall.configured(recall.CONFIG, "full", recall.Options(config={"d_model": 7}))
    with pytest.raises(UserError, match="no task 'riddle': there are far, updates, copy, pass"):
        recall.measured(recall.Options(tasks="riddle"))


def test_each_task_has_its_number_of_updates():
    steps = [
        recall.recipe(name, 90, 0, recall.Options(updates=updates)).steps
        for name, updates in (("far", None), ("copy", None), ("copy", 7))
    ]
    assert steps == [1000, 2500, 7]
    with pytest.raises(UserError, match="steps is 0"):
        recall.recipe("copy", 90, 0, recall.Options(updates=0))


def test_a_table_and_a_figure_of_rows(tmp_path):
    rows = [
        {"task": "far", "model": model, "seed": seed, "filler": filler, "accuracy": seed / filler}
        for model in ("vq", "full")
        for seed in (0, 1)
        for filler in (2, 4)
    ]
    assert list(recall.table(rows)) == [
        "| task | model | filler: right | filler: right |",
        "|---|---|---|---|",
        "| far | vq | 2: 0.25 (least 0.00) | 4: 0.12 (least 0.00) |",
        "| far | full | 2: 0.25 (least 0.00) | 4: 0.12 (least 0.00) |",
    ]
    recall.draw(rows, tmp_path / "recall.svg")
    assert (tmp_path / "recall.svg").read_text().count("<svg") == 1


@pytest.mark.slow
def test_models_are_trained_and_asked(capsys, monkeypatch):
    """A handful of updates teach nothing; each model is asked at each length, far beyond the first
    too, and the second reading of a text is there."""
    monkeypatch.setattr(recall, "ASKED", 16)
    monkeypatch.setattr(recall, "PASSAGE", 100)
    train = {"batch_size": 2}
    options = recall.Options(tasks="far,reading", updates=2, lengths="1,16", json=True,
                             pairs=2, filler=9, config=TINY, train=train)  # fmt: skip
    recall.measured(options)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["task"], r["model"], r["filler"]) for r in rows] == [
        (task, model, filler * times)
        for task, filler in (("far", 9), ("reading", 100))
        for model in ("vq", "no-cache", "full")
        for times in (1, 16)
    ]
    assert all(0 <= r["accuracy"] <= 1 for r in rows[:6])
    assert all(r["gain"] == r["first"] - r["second"] for r in rows[6:])
