"""Runs are the same however they are interrupted: by people, by a full disk, by kill -9."""

import dataclasses
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from tests.helpers import CONFIG, replace
from tests.run.runs import TRAIN, Told, history, train, weights
from transformer_vq.data import Task
from transformer_vq.io.checkpoint import CheckpointError
from transformer_vq.run import loop
from transformer_vq.run.folder import RunError, load_info, load_run
from transformer_vq.run.log import LogError, read_metrics
from transformer_vq.sharding import data_mesh


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


@pytest.mark.slow
def test_a_task_resumes_as_if_unbroken(tmp_path):
    """Its episodes are made anew, the same; a validation says how many answers are right."""
    task = Task(pairs=2, letters=4, filler=3, episodes=40)
    config = CONFIG.replace(vocab_size=256)
    recipe = replace(TRAIN, sequence_len=task.length, update_len=task.length, steps=4,
                     evaluate_every=2, evaluate_tokens=0)  # fmt: skip

    def session(folder, **options):
        source = task.source()
        return loop.train(config, recipe, source.split("train"), source.split("validation"),
                          folder, mesh=data_mesh(jax.devices()[:1]), **options)  # fmt: skip

    session(tmp_path / "whole")
    assert session(tmp_path / "parts", max_seconds=0).status == "out of time"
    session(tmp_path / "parts", resume=True)
    whole, parts = (history(tmp_path / name) for name in ("whole", "parts"))
    validations = [line for line in whole if "validation_loss" in line]
    assert [line["validation_tokens"] for line in validations] == [4, 4]  # of two episodes
    assert all(line["validation_accuracy"] in (0, 0.25, 0.5, 0.75, 1) for line in validations)
    assert [line for line in parts if line["step"] > 1] == whole
    with pytest.raises(RunError, match="trained on other data"):
        task = dataclasses.replace(task, seed=1)
        session(tmp_path / "parts", resume=True)


def test_time_limit(run, tmp_path):
    """It stops after a batch at least; the schedule and all else is as without a limit."""
    result = train(tmp_path / "run", max_seconds=0.0)
    assert (result.status, result.step) == ("out of time", 2)
    assert load_info(tmp_path / "run").step == 2
    first, validation = history(tmp_path / "run")
    assert first == history(run[0])[0]
    assert validation["validation_loss"] == result.validation_loss


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


# Orbax's threads may still be writing when the run has ended, and then say so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_that_is_moved_ends_the_run(tmp_path):
    folder = tmp_path / "run"

    def move(record):
        if record["step"] == 6:
            folder.rename(tmp_path / "moved")

    with pytest.raises((LogError, CheckpointError), match="has been removed"):
        train(folder, observers=[Told(move)])
    assert not folder.exists()
    gc.collect()  # what those threads left, now and not in another test


def test_damaged_lines_do_not_stop_a_resume(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\x00\n")
    told = Told()
    assert train(folder, resume=True, observers=[told]).status == "done"
    assert history(folder) == history(run[0])
    assert any("is damaged: put aside in metrics.jsonl.damaged" in text for text in told.said)


@pytest.mark.slow
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
