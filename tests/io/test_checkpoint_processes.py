"""Checkpoints of real processes: killed at any moment, two together, and quiet."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import ROOT
from transformer_vq.io.checkpoint import Checkpoints

SAVE_FOREVER = """
import sys
import numpy as np
from transformer_vq.io.checkpoint import Checkpoints

with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    step = 0
    like = {"w": np.zeros((4, 1 << 16)), "step": 0}
    if checkpoints.latest() is not None:
        tree, metadata = checkpoints.restore(None, like)
        step = metadata["step"]
        assert tree["step"] == step and (tree["w"] == step).all(), (tree, metadata)
    while True:
        step += 1
        tree = {"w": np.full((4, 1 << 16), float(step)), "step": step}
        checkpoints.save(step, tree, {"step": step}, metrics={"validation_loss": -step})
        print(step, flush=True)
"""


def run_python(code: str, *args: str, env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**env, "PYTHONPATH": str(ROOT / "src"), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path):
    env = {**os.environ, "XLA_FLAGS": ""}
    rng, last, kills = random.Random(), 0, 0
    while kills < 3 or last == 0:  # on a slow disk all of them may hit the first save
        kills += 1
        process = run_python(SAVE_FOREVER, str(tmp_path), env=env)
        process.stdout.readline()  # the first save is under way
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert errors == ""  # and nothing of orbax's log has reached the terminal

        checkpoints = Checkpoints(tmp_path)
        step = checkpoints.latest()
        if step is None and last == 0:
            continue  # killed within the very first save
        assert step >= last  # what was complete stays
        for each in checkpoints.steps():
            tree, metadata = checkpoints.restore(each, {"w": np.zeros((4, 1 << 16)), "step": 0})
            assert metadata == {"step": each} and tree["step"] == each
            assert (tree["w"] == each).all()
        assert len(checkpoints.steps()) <= 3  # kept ones, and one not yet deleted
        last = step


SAVE_TOGETHER = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
from transformer_vq.io.checkpoint import Checkpoints

sharding = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
values = np.arange(32.0, dtype=np.float32).reshape(8, 4)
state = {
    "w": jax.make_array_from_callback((8, 4), sharding, lambda index: values[index]),
    "count": jax.numpy.int32(5),
    "key": jax.random.key(1),
    "host": np.arange(3),
    "step": 7,
}
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state, {"step": step})
    checkpoints.wait()
    assert checkpoints.latest() == 3
    restored, metadata = checkpoints.restore(None, state)
assert metadata == {"step": 3} and restored["w"].sharding == sharding
for shard in restored["w"].addressable_shards:
    assert (np.asarray(shard.data) == values[shard.index]).all()
assert restored["count"] == 5 and restored["step"] == 7 and list(restored["host"]) == [0, 1, 2]
assert (jax.random.key_data(restored["key"]) == jax.random.key_data(state["key"])).all()
"""


@pytest.mark.slow
def test_two_processes_save_and_one_restores(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        run_python(SAVE_TOGETHER, str(tmp_path), address, str(i), env=env) for i in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:  # one that fails leaves the other waiting
            process.kill()
            process.communicate()
    assert Checkpoints(tmp_path).steps() == [2, 3]
    like = {"w": jnp.zeros((8, 4)), "count": jnp.int32(0)}
    restored, metadata = Checkpoints(tmp_path).restore_subtree(None, like)
    assert metadata == {"step": 3} and restored["count"] == 5
    np.testing.assert_array_equal(restored["w"], np.arange(32.0).reshape(8, 4))


def test_nothing_reaches_the_terminal(tmp_path):
    code = """
import sys, warnings
warnings.simplefilter("always")
import jax, numpy as np
from transformer_vq.io import checkpoint, checksums
with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
    tree = {"w": jax.numpy.ones((2, 3)), "k": jax.random.key(0), "n": np.ones(2), "s": 1}
    for step in range(3):
        checkpoints.save(step, tree)
    checkpoints.restore(None, tree)
    checkpoints.restore_subtree(None, {"w": tree["w"]})
    checksums.seal = lambda path: 1 / 0
    try:
        checkpoints.save(4, tree, wait=True)
    except checkpoint.CheckpointError as error:
        assert "division by zero" in str(error)
    else:
        raise AssertionError
"""
    process = run_python(code, str(tmp_path), env={**os.environ, "XLA_FLAGS": ""})
    out, errors = process.communicate(timeout=300)
    assert (process.returncode, out, errors) == (0, "", "")


NO_FOLDER = """
import os, sys
import numpy as np
from transformer_vq.io import checkpoint, checksums

mkdir = os.mkdir

def refuse(path, *arguments, **options):
    if "tmp" in os.path.basename(path):
        raise OSError(30, "Read-only file system", str(path))
    mkdir(path, *arguments, **options)

os.mkdir = refuse
with checkpoint.Checkpoints(sys.argv[1] + "/run") as checkpoints:
    try:
        checkpoints.save(1, {"w": np.ones(3)}, wait=True)
    except checkpoint.CheckpointError as error:
        print(error)
"""


def test_a_folder_that_cannot_be_made_holds_nobody_up(tmp_path):
    """Threads of orbax that waited for it would keep the process for five minutes."""
    process = run_python(NO_FOLDER, str(tmp_path), env={**os.environ, "XLA_FLAGS": ""})
    try:
        out, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert "step 1 could not be saved" in out and "Read-only file system" in out
    assert errors == "" and os.listdir(tmp_path / "run") == []
