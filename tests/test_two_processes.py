"""Two real processes on loopback, with virtual devices each, do what one process does."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import tests.ops.test_sample as test_sample
from tests.helpers import ROOT
from transformer_vq import cli, generate
from transformer_vq.engine.batch import Session
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.run.log import read_metrics

PROGRAM = """
    import faulthandler, json, sys
    faulthandler.dump_traceback_later(500, exit=True)  # where it hangs, if it does
    import jax
    index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)

    sys.path.insert(0, folder)
    import tests.ops.test_sample as t
    from jax.experimental.multihost_utils import process_allgather

    out = {"rows": []}
    for name, key in (("number", t.KEY), ("key", jax.random.key(t.KEY + 1))):
        tokens = t.sample_op(t.SampleConfig(t.BATCH, t.LENGTH, 0.8), t.EOS, t.MODEL, key)
        assert not tokens.is_fully_addressable
        local = [shard.index[0].indices(t.BATCH)[:2] for shard in tokens.addressable_shards]
        out["rows"].append([min(local)[0], max(local)[1]])
        out[name] = process_allgather(tokens, tiled=True).tolist()
    from transformer_vq.engine.batch import Session
    from transformer_vq.sharding import data_mesh
    session = Session(t.MODEL, t.PROMPTS, t.REQUESTS, mesh=data_mesh())
    out["requests"] = [[token.row, int(token)] for token in session]
    out["position"] = session.state.position.tolist()
    again = t.generate(t.MODEL, t.PROMPTS, t.REQUESTS, session.state, mesh=data_mesh())
    out["again"] = again
    try:
        t.sample_op(t.SampleConfig(4, t.LENGTH), t.EOS, t.MODEL, 0)
    except ValueError as error:
        out["error"] = str(error)
    print(json.dumps(out))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def two_processes(env, devices, *arguments):
    """Two of `python ARGUMENTS`, with so many devices each; INDEX and PORT are filled in."""
    flags = f"{env['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0"
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                *(a.replace("INDEX", str(index)).replace("PORT", port) for a in arguments),
            ],
            env={**env, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def outputs(processes, status=0):
    """What both print, when they have ended with this status."""
    done = [process.communicate(timeout=600) for process in processes]
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == status, errors[-3000:]
    return [output for output, _ in done]


# What the library between the processes prints of itself, from threads that break into each
# other's lines.
GLOO = "[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"


def quiet(output):
    """Whether this output holds nothing but words of `GLOO`."""
    found, known = (set(re.findall(r"[^\W\d]+", text)) for text in (output, GLOO))
    return found <= known


def run_two(env):
    """What both processes print of sampling."""
    program, folder = textwrap.dedent(PROGRAM), str(ROOT)
    # One must not find what the other has half written.
    env = {**env, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with two_processes(env, 4, "-c", program, "INDEX", "PORT", folder) as processes:
        return [json.loads(output.splitlines()[-1]) for output in outputs(processes)]


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(user_env):
    first, second = run_two(user_env)
    half = test_sample.BATCH // 2
    assert first.pop("rows") == [[0, half]] * 2  # each holds its own half of the rows
    assert second.pop("rows") == [[half, 2 * half]] * 2
    assert first == second
    assert "multiple of the 8 devices" in first["error"]
    one = test_sample.draw_sequences(0.8)
    np.testing.assert_array_equal(first["number"], one)
    other = test_sample.draw_sequences(0.8, test_sample.KEY + 1)
    np.testing.assert_array_equal(first["key"], other)
    assert not np.array_equal(one[:half], one[half:])  # control: the halves differ

    session = Session(test_sample.MODEL, test_sample.PROMPTS, test_sample.REQUESTS)
    assert first["requests"] == [[token.row, int(token)] for token in session]
    assert first["position"] == session.state.position.tolist()
    arguments = (test_sample.MODEL, test_sample.PROMPTS, test_sample.REQUESTS)
    assert first["again"] == generate(*arguments, session.state)
    assert first["again"] != generate(*arguments)  # control


# Training

OPTIONS = """
    train --data {data} --out {out} --config.d-model 16 --config.d-k 8 --config.codebook-size 8
    --config.num-layers 1 --config.block-len 16 --config.window-len 8 --train.batch-size 8
    --train.sequence-len 32 --train.update-len 16 --train.warmup-steps 0
    --train.final-learning-rate 1 --train.log-every 2 --train.checkpoint-every 1000
    --train.evaluate-every 0 --train.evaluate-tokens 100
"""
TOGETHER = "--coordinator 127.0.0.1:PORT --num-processes 2 --process-id INDEX"


def losses(folder):
    """By step, of training and of validation."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [
        {line["step"]: line[name] for line in lines if name in line}
        for name in ("loss", "validation_loss")
    ]


@pytest.mark.slow
def test_train_stop_and_resume_on_other_devices(tmp_path, user_env, monkeypatch):
    """2 processes of 2 devices, one of them told to stop; 1 of 8; 2 of 2: one unbroken run."""
    monkeypatch.setenv("TVQ_CACHE", "")
    data = tmp_path / "text"
    data.write_bytes(bytes(np.random.default_rng(0).integers(0, 8, 4000).cumsum() % 64 + 32))

    def options(out, *others):
        return [*OPTIONS.format(data=data, out=tmp_path / out).split(), *others]

    def together(*others):
        arguments = options("run", *TOGETHER.split(), *others)
        program = "import sys; from transformer_vq.cli import main; sys.exit(main())"
        return two_processes({**user_env, "TVQ_CACHE": ""}, 2, "-c", program, *arguments)

    def alone(out, *others):
        assert cli.main(options(out, *others)) == 0

    with together("--steps", "100000", "--mesh.fsdp", "2") as processes:
        while processes[0].poll() is None and len(losses(tmp_path / "run")[0]) < 3:
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)
        said, nothing = outputs(processes, status=130)
    step = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert f"interrupted and saved at step {step}." in said and quiet(nothing)
    assert not quiet(said)  # control
    alone("run", "--resume", "--steps", str(step + 6))
    with together("--resume", "--steps", str(step + 12), "--mesh.tensor", "4") as processes:
        said, nothing = outputs(processes)
    assert f"resuming at step {step + 6}" in said and quiet(nothing)
    alone("whole", "--steps", str(step + 12))
    parts, whole = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert list(parts[0]) == list(whole[0]) == list(range(2, step + 13, 2))
    np.testing.assert_allclose(list(parts[0].values()), list(whole[0].values()), rtol=1e-4)
    assert list(parts[1]) == [step + 6, step + 12]
    assert parts[1][step + 12] == pytest.approx(whole[1][step + 12], rel=1e-4)
    assert np.ptp(list(whole[0].values())) > 1e-2  # control: there was something to learn
