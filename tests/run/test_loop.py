"""Runs, and that they are the same however they are interrupted."""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import CONFIG, START, TOKENS, raw, replace
from transformer_vq import Model
from transformer_vq.config import TrainConfig
from transformer_vq.data import ByteTokenizer, DataError, as_source
from transformer_vq.io.checkpoint import CheckpointError, Checkpoints
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.train import make_train_step
from transformer_vq.run import loop, samples
from transformer_vq.run.folder import DataSource, RunError, load_info, load_run
from transformer_vq.run.log import LogError, read_metrics
from transformer_vq.run.observer import Observer
from transformer_vq.sharding import data_mesh

TRAIN = TrainConfig(
    batch_size=2,
    sequence_len=16,
    update_len=8,
    steps=20,
    warmup_steps=4,
    learning_rate=0.02,
    log_every=2,
    evaluate_every=8,
    evaluate_tokens=64,
    checkpoint_every=4,
    keep_checkpoints=9,
)
DROPOUT = CONFIG.replace(dropout_residual=0.1, dropout_sinusoid=0.1, dropout_layer=0.1)


def train(folder, config=DROPOUT, train=TRAIN, tokens=TOKENS[:540], **options):
    mesh = data_mesh(jax.devices()[:1])
    options = {"data": DataSource.of("walk", TOKENS), "mesh": mesh, **options}
    return loop.train(config, train, tokens, TOKENS[540:], folder, **options)


class Told(Observer):
    """What a run tells, as lists; `on_record` gets each record as it comes."""

    def __init__(self, on_record=lambda record: None):
        self.records, self.said, self.steps, self.on_record = [], [], [], on_record

    def record(self, record, logged):
        self.records.append(record)
        self.on_record(record)

    def saved(self, step):
        self.steps.append(step)

    def say(self, text):
        self.said.append(text)


def history(folder):
    """The lines of metrics.jsonl, without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "gflops", "mfu")
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def weights(folder, step=None):
    state = START(DROPOUT, TRAIN)
    return raw(Checkpoints(folder / "checkpoints").restore(step, state)[0])


class Compiled:
    """A train step that is compiled once for all runs in here, and may be told to go wrong."""

    bad_step, bad_loss = None, jnp.nan

    def __init__(self, *arguments):
        self.step = make_train_step(*arguments)

    def lower(self, *_):
        return self

    def compile(self):
        return self

    def __call__(self, state, batch):
        state, metrics = self.step(state, batch)
        if state.step == self.bad_step:
            metrics |= {"loss": jnp.float32(self.bad_loss)}
        return state, metrics


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", functools.cache(Compiled))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 updates, and what it told on its way."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    told = Told()
    result = train(folder, observers=[told])
    return folder, result, told.records


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


def test_interrupted_and_resumed_is_unbroken(run, tmp_path):
    """Ctrl-C after 6 updates, then a resume: the same lines and the same weights, bit for bit."""
    whole, *_ = run

    def interrupt(record):
        if record["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)

    told = Told(interrupt)
    said = told.said
    stopped = train(tmp_path / "run", observers=[told])
    # The batch of 8 was under way when 6 was read; its validation waits for the resume.
    assert (stopped.status, stopped.step) == ("interrupted", 8)
    assert f"saved step 8 in {tmp_path}/run/checkpoints" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert history(tmp_path / "run") == history(whole)[:4]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:  # a future that never came
        file.write('{"step": 10, "loss": 1.0}\n{"step": 12, "lo')
    resumed = train(tmp_path / "run", resume=True, observers=[told])
    assert (resumed.status, resumed.step) == ("done", 20)
    assert "resuming at step 8" in said
    assert history(tmp_path / "run") == history(whole)
    assert weights(tmp_path / "run") == weights(whole)
    assert weights(whole) != weights(whole, 16)  # control
    again = train(tmp_path / "run", resume=True, observers=[told])
    assert again.status == "done" and said[-1] == "resuming at step 20"  # nothing was compiled


def test_time_limit(run, tmp_path):
    """It stops after a batch at least; the schedule and all else is as without a limit."""
    result = train(tmp_path / "run", max_seconds=0.0)
    assert (result.status, result.step) == ("out of time", 2)
    assert load_info(tmp_path / "run").step == 2
    first, validation = history(tmp_path / "run")
    assert first == history(run[0])[0]
    assert validation["validation_loss"] == result.validation_loss


def test_divergence_names_the_last_good_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Compiled, "bad_step", 8)
    with pytest.raises(
        RunError, match=r"loss is nan at step 8, and step 4 in .*checkpoints is the"
    ):
        train(tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]
    assert history(tmp_path / "run")[-1]["step"] == 6
    monkeypatch.setattr(Compiled, "bad_step", 2)
    with pytest.raises(RunError, match="loss is nan at step 2, and nothing was saved before"):
        train(tmp_path / "other")


def test_a_loss_spike_names_the_last_good_step(run, tmp_path, monkeypatch):
    usual = np.median([line["loss"] for line in history(run[0]) if "loss" in line][:8])
    monkeypatch.setattr(Compiled, "bad_step", 18)
    monkeypatch.setattr(Compiled, "bad_loss", usual + 3.1)
    with pytest.raises(
        RunError, match=rf"max_loss_spike \(3\) above the {usual:.4f} of .*step 16 "
    ):
        train(tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 16
    off = replace(TRAIN, max_loss_spike=0.0)
    assert train(tmp_path / "run", train=off, resume=True).status == "done"
    monkeypatch.setattr(Compiled, "bad_loss", usual + 2.9)  # control
    assert train(tmp_path / "other").status == "done"


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


def test_a_disk_that_fills_up(tmp_path):
    """Between checkpoints, where a line of metrics.jsonl is what finds no room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED: needs the right to mount a small tmpfs")
    filler, full = disk / "filler", "the disk of .* is full, and step 2 in .*: free some space"

    def fill(record):
        if not filler.exists():
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(2 << 20))

    try:
        train(disk / "run", max_seconds=0.0)
        long = replace(TRAIN, steps=60, checkpoint_every=1000, evaluate_every=0)
        with pytest.raises(RunError, match=full):
            train(disk / "run", train=long, resume=True, observers=[Told(fill)])
        torn = (disk / "run" / "metrics.jsonl").read_bytes()
        assert len(torn) % 4096 == 0  # a line that was cut is left out, and goes at the resume
        assert 2 < read_metrics(disk / "run" / "metrics.jsonl")[-1]["step"] < 60
        with pytest.raises(RunError, match=r"cannot write .*config\.json: No space left"):
            train(disk / "run", train=long, resume=True)
        assert load_run(disk / "run")[1].step == 2
        assert not list((disk / "run").glob(".*"))  # drafts
        filler.unlink()
        assert train(disk / "run", train=long, resume=True).step == 60
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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


# Averages

PLAIN = TrainConfig(
    batch_size=4, sequence_len=16, update_len=8, steps=20, warmup_steps=0, learning_rate=0.02
)


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    train = replace(PLAIN, ema_decay=0.6, sequence_len=8, steps=6, log_every=2)
    train = replace(train, evaluate_tokens=50, checkpoint_every=1, keep_checkpoints=9)
    mesh = data_mesh(jax.devices()[:1])
    result = loop.train(CONFIG, train, TOKENS[:540], TOKENS[540:], folder, mesh=mesh)
    return folder, train, result


def test_average_by_hand(averaged_run):
    """Of the weights after every update, against numpy."""
    folder, train, _ = averaged_run
    state = START(CONFIG, train)
    expected = jax.tree.map(np.asarray, {"params": state.params, "codebook": state.codebook})
    for i in range(train.steps):
        state, _ = Checkpoints(folder / "checkpoints").restore(i + 1, state)
        now = {"params": state.params, "codebook": state.codebook}
        d = min(0.6, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda old, new, d=d: d * old + (1 - d) * new, expected, now)
        for a, b in zip(*map(jax.tree.leaves, (state.average, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert raw(state.average["params"]) != raw(state.params)


def test_the_average_is_what_is_evaluated_and_loaded(averaged_run):
    folder, train, result = averaged_run
    model, info = load_run(folder)
    latest, _ = load_run(folder, average=False)
    state, _ = Checkpoints(folder / "checkpoints").restore(None, START(CONFIG, train))
    assert info.train.ema_decay == 0.6
    assert raw((model.codebook, model.params)) == raw(state.average)
    assert raw(latest.params) == raw(state.params)
    assert raw(model) != raw(latest)
    scored = [
        evaluate(x, TOKENS[540:], max_tokens=train.evaluate_tokens).loss for x in (model, latest)
    ]
    assert scored[0] == pytest.approx(result.validation_loss, abs=1e-6)
    assert abs(scored[1] - result.validation_loss) > 1e-4


def test_without_an_average_a_checkpoint_is_as_before(averaged_run):
    folder, train, _ = averaged_run

    def names(state):
        return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)}

    with_average = names(START(CONFIG, train))
    without = names(START(CONFIG, PLAIN))
    assert without < with_average
    assert {name.split("[")[0].split(".")[1] for name in without} == {
        "step",
        "params",
        "codebook",
        "opt_state",
    }
    for changes, message in (
        (dict(ema_decay=0), "has ema_decay 0.6, not 0"),
        (dict(optimizer="lion"), "has optimizer adamw, not lion"),
    ):
        with pytest.raises(RunError, match=message):
            other = replace(train, **changes)
            loop.train(
                CONFIG, other, TOKENS, None, folder, resume=True, mesh=data_mesh(jax.devices()[:1])
            )
    assert isinstance(load_run(folder)[0], Model)


# Killed

# What is saved was looked at


HOT = replace(TRAIN, learning_rate=1e30, warmup_steps=0, grad_clip=0.0, steps=2, log_every=1)


@pytest.mark.parametrize("held_out", [TOKENS[540:], None])
def test_a_lost_model_is_not_done(tmp_path, held_out):
    """The update that loses it is the last: no batch follows that would show it."""
    mesh = data_mesh(jax.devices()[:1])
    options = dict(data=DataSource.of("walk", TOKENS), mesh=mesh)
    with pytest.raises(RunError, match="nothing was saved before: use a lower learning rate"):
        loop.train(CONFIG, HOT, TOKENS[:540], held_out, tmp_path / "run", **options)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == []
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_checkpoint_of_a_lost_model_is_not_the_last_good_one(tmp_path, monkeypatch):
    """It was saved before a batch showed what it is. Resumed from the good one, the run goes on."""
    folder, saved = tmp_path / "run", Checkpoints.save

    def spoil(self, step, state, *arguments, **options):
        if step == 8:
            state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * 1e4, state.params))
        saved(self, step, state, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", spoil)
        patch.setattr(Compiled, "bad_step", 10)
        with pytest.raises(RunError, match=r"loss is nan at step 10, and step 4 in .* last good"):
            train(folder)
    checkpoints = folder / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["4", "8.diverged"]
    assert train(folder, resume=True).status == "done"


def test_learning_by_heart_is_not_divergence(tmp_path):
    """A high validation loss alone stops no run: the training text is still known."""
    options = dict(data=DataSource.of("walk", TOKENS), mesh=data_mesh(jax.devices()[:1]))
    plan = replace(TRAIN, steps=16, evaluate_every=0, max_loss_spike=0.5)
    constant = np.zeros(540, np.uint8)
    backwards = np.tile(np.arange(31, 0, -1), 2).astype(np.uint8)
    result = loop.train(CONFIG, plan, constant, backwards, tmp_path / "run", **options)
    usual = np.median([r["loss"] for r in history(tmp_path / "run") if "loss" in r])
    assert result.status == "done" and result.validation_loss > usual + 0.5  # control


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def spoil(self, state, batch):
        state, metrics = self.step(state, batch)
        if state.step == 4:
            state.params["output_bias"] = state.params["output_bias"].at[0].set(jnp.inf)
        return state, metrics

    monkeypatch.setattr(Compiled, "__call__", spoil)
    with pytest.raises(RunError, match="weights are not finite after step 4, and nothing was sav"):
        train(tmp_path / "run")


# One writer, readers that go, folders that go


def test_two_trainings_at_once(run, tmp_path):
    """The second is refused, whatever it asks for, and the first is as if alone."""
    refused = []

    def second(record):
        if record["step"] == 6:
            for resume in (True, False):
                thread = threading.Thread(target=try_it, args=(resume,))
                thread.start()
                thread.join()

    def try_it(resume):
        with pytest.raises(RunError) as caught:
            train(tmp_path / "run", resume=resume)
        refused.append(str(caught.value))

    assert train(tmp_path / "run", observers=[Told(second)]).status == "done"
    assert len(refused) == 2 and all(f"process {os.getpid()} on " in text for text in refused)
    assert history(tmp_path / "run") == history(run[0])
    assert weights(tmp_path / "run") == weights(run[0])


def test_a_reader_that_goes_ends_the_run_as_ctrl_c_does(run, tmp_path):
    def leave(record):
        if record["step"] == 6:
            raise BrokenPipeError

    stays = Told()
    stopped = train(tmp_path / "run", observers=[Told(leave), stays])
    assert (stopped.status, stopped.step) == ("interrupted", 8)
    assert stays.steps == [4, 8]  # the other one is told all
    assert train(tmp_path / "run", resume=True).status == "done"
    assert history(tmp_path / "run") == history(run[0])


def test_a_folder_that_is_moved_ends_the_run(tmp_path):
    folder = tmp_path / "run"

    def move(record):
        if record["step"] == 6:
            folder.rename(tmp_path / "moved")

    with pytest.raises((LogError, CheckpointError), match="has been removed"):
        train(folder, observers=[Told(move)])
    assert not folder.exists()


def test_damaged_lines_do_not_stop_a_resume(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\x00\n")
    told = Told()
    assert train(folder, resume=True, observers=[told]).status == "done"
    assert history(folder) == history(run[0])
    assert any("is damaged: put aside in metrics.jsonl.damaged" in text for text in told.said)


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


SCRIPT = """
import sys
import numpy as np
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.run.loop import train
from transformer_vq.run.observer import Observer

tokens = (np.random.default_rng(0).integers(0, 8, 600).cumsum() % 32).astype(np.uint8)
config = ModelConfig(vocab_size=32, d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=8,
                     window_len=5, dropout_residual=0.1)
plan = TrainConfig(batch_size=2, sequence_len=16, update_len=8, steps=2000, log_every=2,
                   evaluate_every=100, checkpoint_every=20)

class Printer(Observer):
    def say(self, text):
        print(text, flush=True)

result = train(config, plan, tokens[:540], tokens[540:], sys.argv[1], resume="resume" in sys.argv,
               observers=[Printer()])
print(result.status)
sys.exit(130 if result.status == "interrupted" else 0)
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_unbroken(tmp_path, user_env):
    """Processes, kill -9 and SIGTERM among them: two runs from start to end read the same."""

    def start(name, *options):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), *options]
        return subprocess.Popen(command, env=user_env, stdout=subprocess.PIPE, text=True)

    def lines(name):
        return len(read_metrics(tmp_path / name / "metrics.jsonl"))

    def stop_at(name, count, number, *options):
        process = start(name, *options)
        while lines(name) < count:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))  # in an update, a validation, a save
        process.send_signal(number)
        return process.communicate()[0], process.returncode

    whole = start("whole")
    assert stop_at("killed", 150, signal.SIGKILL)[1] == -signal.SIGKILL
    for count in (300, 450, 600):
        stop_at("killed", count, signal.SIGKILL, "resume")
    said, code = stop_at("killed", 750, signal.SIGTERM, "resume")
    assert code == 130 and "saved step" in said
    out, _ = start("killed", "resume").communicate()
    assert out.endswith("done\n")
    assert whole.communicate()[0].endswith("done\n")
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == 1000 + 20
