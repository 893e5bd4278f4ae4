"""Runs: what they leave, and that a resume goes on with the same one."""

import dataclasses
import json
import os
import signal
import types

import jax
import numpy as np
import pytest

from tests.helpers import CONFIG, START, TOKENS, raw, replace
from tests.run.runs import DROPOUT, TRAIN, history, train, weights
from transformer_vq import Model
from transformer_vq.data import ByteTokenizer, DataError, as_source
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.run import loop, samples
from transformer_vq.run.folder import DataSource, RunError, load_info, load_run
from transformer_vq.run.log import read_metrics
from transformer_vq.sharding import data_mesh


def test_a_run_leaves_its_metrics(run):
    folder, result, records = run
    lines = read_metrics(folder / "metrics.jsonl")
    assert (result.status, result.step) == ("done", 20)
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(2, 21, 2))
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [8, 16, 20]
    assert result.validation_loss == validations[-1]["validation_loss"]
    assert validations[0]["validation_tokens"] == 59
    for line in losses:
        assert line["bpb"] == pytest.approx(line["loss"] / np.log(2))
        for name in ("tokens_per_second", "seconds", "grad_norm", "codebook_perplexity"):
            assert line[name] > 0
        assert 0 < line["codebook_used"] <= 1
    assert validations[-1]["validation_loss"] < validations[0]["validation_loss"]
    assert records == lines  # here every batch is logged
    assert Checkpoints(folder / "checkpoints").steps() == [4, 8, 12, 16, 20]


def test_a_run_can_be_loaded(run):
    folder, result, _ = run
    model, info = load_run(folder)
    assert (info.step, info.config, info.train, info.tokenizer) == (20, DROPOUT, TRAIN, "bytes")
    assert info.data == DataSource.of("walk", TOKENS) and info.seconds > 0
    state, _ = Checkpoints(folder / "checkpoints").restore(20, START(DROPOUT, TRAIN))
    assert raw(model) == raw(Model(state.params, state.codebook, DROPOUT))
    assert load_info(folder, 8).step == 8
    content = json.loads((folder / "config.json").read_text())
    assert content["config"] == DROPOUT.to_dict() and content["data"]["path"] == "walk"


@pytest.mark.slow
def test_samples_change_nothing_else(run, tmp_path, monkeypatch):
    """Samples at each validation, interrupted within one: the run is as one without samples."""
    plan = replace(TRAIN, sample_tokens=12)
    options = dict(train=plan, decode=lambda tokens: " ".join(map(str, tokens)))
    with monkeypatch.context() as patch:
        patch.setattr(samples, "stream", lambda *_: (os.kill(os.getpid(), signal.SIGINT), [1])[1])
        stopped = train(tmp_path / "run", **options)
    assert (stopped.status, stopped.step) == ("interrupted", 8)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""
    with open(tmp_path / "run" / "samples.jsonl", "a") as file:  # a future that never came
        file.write('{"step": 16, "text": "1"}\n')
    assert train(tmp_path / "run", resume=True, **options).status == "done"
    lines = read_metrics(tmp_path / "run" / "samples.jsonl")
    assert [line["step"] for line in lines] == [8, 16, 20]
    assert {line["prompt"] for line in lines} == {" ".join(map(str, TOKENS[540:556]))}
    assert all(len(line["text"].split()) == 12 for line in lines)
    assert len({line["text"] for line in lines}) > 1  # the model learns
    assert history(tmp_path / "run") == history(run[0])
    assert weights(tmp_path / "run") == weights(run[0])


class OtherWords(ByteTokenizer):
    def __init__(self):
        super().__init__()
        object.__setattr__(self, "name", "other")


def test_resume_refuses_another_run(run):
    folder, *_ = run
    other_words = dataclasses.replace(as_source(TOKENS[:540]), tokenizer=OtherWords())
    others = [
        (dict(config=DROPOUT.replace(d_model=32)), "has d_model 16, not 32"),
        (dict(config=CONFIG), "has dropout_sinusoid 0.1, not 0.0"),
        (dict(train=replace(TRAIN, batch_size=4)), "has batch_size 2, not 4"),
        (dict(train=replace(TRAIN, seed=3)), "has seed 0, not 3"),
        (dict(tokens=other_words), "has tokenizer bytes, not other"),
        (dict(data=DataSource.of("moby", TOKENS[:-1])), r"was trained on other data \(walk, 600"),
    ]
    before = sorted(folder.rglob("*"))
    for options, message in others:
        with pytest.raises(RunError, match=message):
            train(folder, resume=True, **options)
    with pytest.raises(RunError, match="already holds a run, at step 20: resume it"):
        train(folder)
    assert sorted(folder.rglob("*")) == before


def test_errors_are_a_sentence(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match=r"no run folder .*missing to resume"):
        train(missing, resume=True)
    with pytest.raises(RunError, match=r"there is no run folder .*missing"):
        load_run(missing)
    with pytest.raises(RunError, match="empty has no checkpoint"):
        load_run(empty)
    with pytest.raises(DataError, match="has 1 of the 17 tokens"):
        train(missing, tokens=TOKENS[:1])
    with pytest.raises(ValueError, match="token 99 at position 2 is outside"):
        train(missing, tokens=np.where(np.arange(100) == 2, 99, 0))
    with pytest.raises(ValueError, match="batch_size is 2: it must be a multiple of the 8 devices"):
        train(missing, mesh=data_mesh(jax.devices()[:8]))
    assert not missing.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make the run folder"):
        train(tmp_path / "file" / "run")


def test_speed_is_that_of_the_work_done(monkeypatch):
    """Where batch 2 is done when batch 1 is read, both count; and nothing is left for batch 2."""
    now = 0.0
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now))

    class Metric:
        def __init__(self, ready):
            self.is_ready = lambda: ready

    session = object.__new__(loop._Training)
    session.train, batch = TRAIN, 2 * 8 * 2  # tokens of a batch, which is 2 updates
    session.mark(0)
    for done, speed in ((True, 2 * batch / 8.0), (False, batch / 8.0)):
        now += 8.0
        session.pending = loop.Pending(4 if done else 8, {"loss": Metric(done)}, None)
        assert session.speed(2 if done else 6, mark=True) == speed
    now += 1e-6
    session.mark(6)
    session.pending = None
    now += 1e-6
    assert session.speed(6, mark=True) == batch / 8.0  # and not a millionth of the time
