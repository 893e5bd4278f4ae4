"""Scripts in benchmarks/: what `recall.py` trains, asks and prints; what `peers.py` and `serve.py`
compare."""

import argparse
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT, make_run
from transformer_vq.errors import UserError
from transformer_vq.measure.reading import Reading


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recall, peers = script("recall"), script("peers")

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


def test_each_task_has_its_recipe():
    recipes = [
        recall.recipe(name, 90, 0, recall.Options(updates=updates))
        for name, updates in (("copy", None), ("reading", None), ("reading", 7))
    ]
    assert [recipe.steps for recipe in recipes] == [800, 600, 7]
    assert [recipe.optimizer for recipe in recipes] == ["muon", "adamw", "adamw"]
    with pytest.raises(UserError, match="steps is 0"):
        recall.recipe("copy", 90, 0, recall.Options(updates=0))


def test_training_tells_amid_the_filler_and_asking_before_all_of_it(monkeypatch):
    trained, asked = [], []
    monkeypatch.setattr(recall, "train_on", lambda config, train, source: trained.append(source))
    monkeypatch.setattr(recall, "share_right", lambda model, task, **_: asked.append(task))
    for name in ("far", "copy", "passkey"):
        list(recall.recall(name, "vq", 0, recall.Options(lengths="1,16", filler=20)))
    assert all("filler=20,nearest=0," in source.path for source in trained)
    assert [(task.filler, task.least_between) for task in asked] == [
        *[(20, 20), (320, 320)] * 2, (20, 20), (320, 300)]  # fmt: skip


def test_asking_160_times_as_far_as_in_training(monkeypatch):
    """As many episodes of that length as are trained on would be too many."""
    asked = []
    monkeypatch.setattr(recall, "train_on", lambda *_: None)
    monkeypatch.setattr(recall, "share_right", lambda _, task, **more: asked.append((task, more)))
    list(recall.recall("far", "vq", 0, recall.Options(lengths="160", filler=100)))
    [(task, more)] = asked
    assert task.filler == 16_000 and more == {"episodes": 2**20 // 16_124}


def test_a_passage_begins_as_the_episodes_of_training(monkeypatch):
    read, given = Reading(3.0, 2.0), []
    monkeypatch.setattr(recall, "train_on", lambda *_: None)
    monkeypatch.setattr(recall, "second_reading", lambda *_, **more: given.append(more) or read)
    list(recall.reading("reading", "vq", 0, recall.Options(lengths="1")))
    task = recall.TASKS["reading"].source()
    assert [more["start"] for more in given] == [task.tokens[task.starts[0]]]


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


def test_a_figure_has_what_was_asked(tmp_path):
    """Not every model is asked about every length of every task."""
    asked = [("far", "vq", 32, 1.0), ("far", "vq", 64, 0.9), ("far", "full", 32, 0.8),
             ("copy", "vq", 8, 0.7)]  # fmt: skip
    names = ("task", "model", "filler", "accuracy")
    recall.draw([dict(zip(names, row, strict=True)) for row in asked], tmp_path / "recall.svg")
    assert (tmp_path / "recall.svg").stat().st_size > 5000


def test_parts_of_a_run_are_put_together(tmp_path):
    """Rows of earlier runs make one table, with a gap where a model was not asked."""
    parts = [
        {"llama": {"seconds": [2.0]}, "transformer-vq": {"seconds": [1.0], "state_bytes": 10**6}},
        {"transformer-vq": {"seconds": [4.0]}},
    ]
    files = [tmp_path / "first", tmp_path / "second"]
    for file, results, what in zip(files, parts, ("decode", "train"), strict=True):
        row = {"what": what, "length": 64, "tokens": 32, "rows": 1, "results": results}
        file.write_text(f"a line that is no row\n{json.dumps(row)}\n")
    nothing = ["--peers", "--contexts", "--prompts", "--texts", "--lengths"]
    command = [sys.executable, ROOT / "benchmarks/peers.py", *nothing, "--rows", *files]
    command += ["--figure", tmp_path / "peers.svg"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| 64 | 32 | 16 (2.00) |" in printed and "| 8.0 |  |" in printed, printed
    assert (tmp_path / "peers.svg").stat().st_size > 5000


@pytest.mark.slow
def test_models_are_trained_and_asked(capsys, monkeypatch):
    """A handful of updates teach nothing; each model is asked at each length, far beyond the first
    too, and the second reading of a text is there."""
    monkeypatch.setattr(recall, "ASKED", 16)
    monkeypatch.setattr(recall, "PASSAGES", 4)
    train = {"batch_size": 2}
    options = recall.Options(tasks="far,reading", updates=2, lengths="1,16", json=True,
                             pairs=2, filler=9, config=TINY, train=train)  # fmt: skip
    recall.measured(options)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["task"], r["model"], r["filler"]) for r in rows] == [
        (task, model, filler * times)
        for task, filler in (("far", 9), ("reading", 9))
        for model in ("vq", "no-cache", "full")
        for times in (1, 16)
    ]
    assert all(0 <= r["accuracy"] <= 1 for r in rows[:6])
    assert all(r["gain"] == r["first"] - r["second"] for r in rows[6:])
    assert [r["far"] is None for r in rows[6:]] == [False] * 2 + [True] * 4


def timed(*seconds, **more):
    return {"seconds": list(seconds), **more}


PEERS = [
    {
        "what": "decode",
        "length": length,
        "tokens": 60,
        "results": {
            "transformer-vq": timed(1, 2, 3, state_bytes=8_500_000),
            "llama": timed(4, 4, 4, state_bytes=10_000 * length),
            "mamba": timed(1) if length == 512 else {"error": "MemoryError: "},
        },
    }
    for length in (512, 8192)
]


def test_a_table_and_a_figure_of_peers(tmp_path):
    """Medians, and in parentheses the median of the ratios of each turn (4, 2 and 1.33)."""
    assert list(peers.table(PEERS, ["transformer-vq", "llama", "mamba"])) == [
        "| tokens/s | tokens | Transformer-VQ | Llama | Mamba |",
        "|---|---|---|---|---|",
        "| decoding | 512 | 30 | 15 (2.00) | 60 (1.00) |",
        "| decoding | 8,192 | 30 | 15 (2.00) | failed: MemoryError:  |",
        "| state, MB | 512 | 8.5 | 5.1 |  |",
        "| state, MB | 8,192 | 8.5 | 81.9 |  |",
    ]
    peers.draw(PEERS, ["transformer-vq", "llama", "mamba"], str(tmp_path / "peers.svg"))
    assert (tmp_path / "peers.svg").read_text().count("<svg") == 1


class Clock:
    """A peer whose calls take these seconds."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def ask(self, question):
        return {"seconds": self.seconds.pop(0)}


def test_the_first_call_of_a_peer_warms_up():
    """However long it was; a long call is not made again."""
    args = argparse.Namespace(turns=3, long=6.0)
    quick, slow = Clock(100, 1, 2, 3), Clock(100, 50)
    row = peers.measured({"quick": quick, "slow": slow}, {"what": "decode"}, args)
    assert row["results"] == {"quick": {"seconds": [1, 2, 3]}, "slow": {"seconds": [50]}}
    assert quick.seconds == slow.seconds == []


def test_peers_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"torch and transformers. Install .* pip install -e '.\[pe"
    ):
        peers.complain(["transformer-vq", "llama"], None)
    with pytest.raises(SystemExit, match=r"there is no src/transformer_vq/ops/sample.py in it"):
        peers.complain(["transformer-vq", "reference"], str(tmp_path))
    peers.complain(["transformer-vq"], None)


@pytest.mark.slow
@pytest.mark.parametrize("names", [(), ("llama", "mamba")])
def test_peers_are_timed(names, user_env):
    """Tiny models of all kinds answer every question, in processes of their own."""
    for module in ("torch", "transformers") if names else ():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"NOT TESTED: {module} is not installed (the extra peers)")
    options = (
        "--smoke --contexts 40 --prompts 40 --texts 40 --lengths 64 --turns 2 --rounds 1 --json"
    )
    command = [sys.executable, ROOT / "benchmarks/peers.py", *options.split(), "--peers", *names]
    done = subprocess.run(command, capture_output=True, text=True, env=user_env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [row["what"] for row in rows] == ["decode", "prompt", "score", "train"]
    for row in rows:
        assert list(row["results"]) == ["transformer-vq", *names]
        assert all(len(result["seconds"]) == 2 for result in row["results"].values()), row
    assert done.stdout.splitlines()[-1].startswith("| state, MB | 40 | ")


@pytest.mark.slow
def test_a_server_is_measured(tmp_path, user_env):
    """A tiny model, once: all rows, with numbers; a second turn knows the whole first one."""
    pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")
    run = make_run(tmp_path / "run")
    options = "--slots 2 --turns 1 --tokens 64 --prompt 2000"
    command = [sys.executable, ROOT / "benchmarks/serve.py", "--run", run, *options.split()]
    quickly = f"{user_env['XLA_FLAGS']} --xla_backend_optimization_level=0"
    env = user_env | {"XLA_FLAGS": quickly}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert head == ["what", "reached", "to compare with", "ratio"]
    assert [row[0].split(",")[0] for row in rows] == [
        "2 streams",
        "1 stream",
        "`tvq batch`",
        "first token",
        "longest pause of a stream while 2",
        "tokens known in a second turn",
    ]
    assert all(np.isfinite(float(row[-1])) for row in rows)
    assert rows[5][1:] == ["4,000", "4,000", "1.00"]
