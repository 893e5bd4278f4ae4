"""Checkpoints: bit for bit, atomic under kill -9, verified, and clear when something is wrong."""

import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.helpers import ROOT
from transformer_vq.io import checkpoint
from transformer_vq.io.checkpoint import CheckpointError, Checkpoints

SOURCE = ROOT / "src"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    params: dict
    codebook: tuple
    opt_state: list
    key: jax.Array
    step: int


def train_state(step: int = 0, width: int = 8) -> TrainState:
    return TrainState(
        params={"embed": jnp.full((4, width), step, jnp.bfloat16), "scale": jnp.float32(step)},
        codebook=(jnp.full((3, width), step, jnp.float32), None),
        opt_state=[np.full((4, width), step), ()],
        key=jax.random.key(step),
        step=step,
    )


def raw(leaf) -> tuple:
    """Kind, dtype, shape and bytes: equal for leaves that are the same in every bit."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), raw(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    kind = jax.Array if isinstance(leaf, jax.Array) else type(leaf)
    return kind, array.dtype, array.shape, array.tobytes()


def assert_same(tree, other) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, other_leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert raw(leaf) == raw(other_leaf)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three checkpoints, of steps 10, 20 and 30."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, train_state(step), {"position": step * 512})
    return tmp_path / "checkpoints"


# Round trips


def test_every_kind_of_leaf_returns_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 256, 64, dtype=np.uint8)
    dtypes = "float32 float64 float16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 complex64"
    tree = {
        "numpy": {dtype: bits.view(dtype) for dtype in dtypes.split()},  # NaNs included
        "bfloat16": bits.view(ml_dtypes.bfloat16),
        "bool": bits > 99,
        "jax": {
            "bfloat16": jnp.asarray(bits.view(ml_dtypes.bfloat16)),
            "int32": jnp.arange(6).reshape(2, 3),
            "empty": jnp.zeros((0, 5), jnp.bfloat16),
            "scalar": jnp.float32(-0.0),
        },
        "keys": [jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 3)],
        "raw key": jax.random.PRNGKey(3),
        "numbers": (7, -(2**40), 0.1, True, 1e-320, np.float32(0.1), 2 + 3j),
        "nothing": [None, (), {}],
        "empty": np.zeros((3, 0)),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {"position": 7, "nested": {"list": [1, 2.5, None, "ü"]}})
        restored, metadata = checkpoints.restore(None, like=tree)
    assert_same(restored, tree)
    assert metadata == {"position": 7, "nested": {"list": [1, 2.5, None, "ü"]}}


def test_a_bare_array_is_a_tree(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, np.arange(3))
        assert_same(checkpoints.restore(1, np.zeros(3, int)), (np.arange(3), {}))


def test_restores_into_shapes_without_arrays(folder):
    like = jax.eval_shape(lambda: dataclasses.replace(train_state(), step=0, opt_state=[]))
    like = dataclasses.replace(like, step=0, opt_state=train_state().opt_state)
    restored, _ = Checkpoints(folder).restore(20, like)
    assert_same(restored, train_state(20))
    assert not restored.params["embed"].committed  # free to join whatever mesh comes


def test_saving_takes_the_values_of_the_moment(tmp_path):
    """What follows a save may donate and overwrite everything, as a train step does."""
    on_device, on_host = jnp.arange(1 << 20), np.arange(1 << 20)
    wanted = {"device": np.array(on_device), "host": on_host.copy()}
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    overwrite(on_device + 0).block_until_ready()  # compiled before, to be quick after
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"device": on_device, "host": on_host})
        overwrite(on_device).block_until_ready()
        on_host[:] = -1
        restored, _ = checkpoints.restore(1, wanted)
    assert_same(restored, wanted)


def test_restores_a_part_without_knowing_the_rest(folder):
    state = train_state(30)
    part = {"params": state.params, "codebook": state.codebook}
    like = jax.tree.map(jnp.zeros_like, part)
    restored, metadata = Checkpoints(folder).restore_subtree(None, like)
    assert_same(restored, part)
    assert metadata == {"position": 30 * 512}


def test_restores_onto_other_devices(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("NOT TESTED: needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    devices = np.array(jax.devices())
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    keys = jax.random.split(jax.random.key(0), 8)

    def placed(mesh: Mesh, spec: PartitionSpec) -> dict:
        sharding = NamedSharding(mesh, spec)
        return {"w": jax.device_put(values, sharding), "keys": jax.device_put(keys, sharding)}

    rows = placed(Mesh(devices, "data"), PartitionSpec("data"))
    pairs = placed(Mesh(devices[:4].reshape(2, 2), ("data", "model")), PartitionSpec("model"))
    single = jax.device_put({"w": values, "keys": keys}, devices[5])
    with Checkpoints(tmp_path) as checkpoints:
        for step, saved in enumerate([rows, pairs, single]):
            checkpoints.save(step, saved)
            for wanted in [rows, pairs, single, {"w": values, "keys": keys}]:
                restored, _ = checkpoints.restore(step, wanted)
                assert_same(restored, wanted)
                for name in ("w", "keys"):
                    sharding = getattr(wanted[name], "sharding", None)
                    assert getattr(restored[name], "sharding", None) == sharding
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), rows
            )
            restored, _ = checkpoints.restore(step, abstract)
            assert_same(restored, rows)
            assert restored["w"].sharding == rows["w"].sharding


# What is kept


def test_keeps_the_last_ones(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
        for step in (2, 9, 10, 11):  # 9 and 10 sort differently as text
            checkpoints.save(step, train_state(step))
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.latest()) == ([10, 11], 11)
    assert sorted(os.listdir(tmp_path)) == ["10", "11"]


def test_keeps_the_best_one(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best() is None
        losses = [float("nan"), 3.0, 1.0, 2.0, None, 1.5]
        for step, loss in enumerate(losses):
            metrics = None if loss is None else {"validation_loss": jnp.float32(loss)}
            checkpoints.save(step, train_state(step), metrics=metrics)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best()) == ([2, 5], 2)
        restored, _ = checkpoints.restore(checkpoints.best(), train_state())
        assert_same(restored, train_state(2))


def test_clears_the_remains_of_a_killed_save_only_when_writing(folder):
    for remains in ("31.orbax-checkpoint-tmp", "5.deleted", "20.backup"):
        (folder / remains).mkdir()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]
        checkpoints.restore(None, train_state())
        assert (folder / "31.orbax-checkpoint-tmp").exists()  # another process may be writing it
        checkpoints.save(31, train_state(31))
    assert sorted(os.listdir(folder)) == ["20", "20.backup", "30", "31"]


# Errors


def refused(call, *args, **kwargs) -> str:
    """The message of the `CheckpointError`: one sentence, one line."""
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


def test_nothing_to_restore(tmp_path):
    empty = refused(Checkpoints(tmp_path).restore, None, train_state())
    assert empty.startswith(f"there is no complete checkpoint in {tmp_path}")
    missing = refused(Checkpoints(tmp_path / "no").restore, None, train_state())
    assert missing.startswith(f"there is no folder {tmp_path / 'no'}")
    assert not (tmp_path / "no").exists()


def test_a_step_that_is_not_there(folder):
    message = refused(Checkpoints(folder).restore, 25, train_state())
    assert "no checkpoint of step 25" in message and "10, 20, 30" in message


def test_another_tree(folder):
    restore = Checkpoints(folder).restore
    message = refused(restore, None, train_state(width=16))
    assert f"params/embed is bfloat16[4,8] in {folder / '30'} and bfloat16[4,16] here" in message
    state = train_state()
    message = refused(restore, None, dataclasses.replace(state, params={"embedding": jnp.ones(2)}))
    assert f"params/embedding is missing in {folder / '30'} and float32[2] here" in message
    message = refused(restore, None, dataclasses.replace(state, opt_state=[]))
    assert f"opt_state/0 is int64[4,8] in {folder / '30'} and missing here" in message
    message = refused(restore, None, dataclasses.replace(state, step=1.0))
    assert "step is int64[]" in message and "float64[] here" in message
    message = refused(Checkpoints(folder).restore_subtree, None, {"ema": jnp.ones(2)})
    assert "ema is missing" in message


def test_what_cannot_be_saved(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert "a/b is of type str" in refused(checkpoints.save, 1, {"a": {"b": "text"}})
        assert "not JSON" in refused(checkpoints.save, 1, {}, {"a": object()})
        assert "slash" in refused(checkpoints.save, 1, {"a/b": 1, "a": {"b": 2}})
        assert not (tmp_path / "run").exists()
    assert "keep is 0" in refused(Checkpoints, tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file") as checkpoints:
        assert str(tmp_path / "file") in refused(checkpoints.save, 1, {"a": 1})


def test_an_old_step_does_not_replace_a_newer_one(folder):
    with Checkpoints(folder) as checkpoints:
        for step in (30, 25):
            message = refused(checkpoints.save, step, train_state(step))
            assert f"step {step} cannot be saved" in message and "already has step 30" in message
    assert Checkpoints(folder).steps() == [10, 20, 30]


# Damage


def files_of(checkpoint: Path) -> list[Path]:
    """Every file that a restore depends on."""
    unused = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    files = (f for f in sorted(checkpoint.rglob("*")) if f.is_file() and f.name not in unused)
    return [f for f in files if f.stat().st_size > 0]


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_any_flipped_bit_and_any_cut_is_found(folder):
    checkpoints, rng = Checkpoints(folder), random.Random(0)
    files = files_of(folder / "30")
    assert len(files) > 5 and {"metadata.json", "SHA256SUMS"} < {f.name for f in files}
    for file in files:
        whole = file.read_bytes()
        for position in (0, len(whole) - 2, *rng.sample(range(len(whole)), 3)):
            for damaged in (flipped(whole, position), whole[:position]):
                file.write_bytes(damaged)
                assert "is damaged" in refused(checkpoints.restore, None, train_state())
        file.unlink()
        assert "is damaged" in refused(checkpoints.restore, None, train_state())
        file.write_bytes(whole)
    assert_same(checkpoints.restore(None, train_state())[0], train_state(30))


def test_damage_names_the_newest_intact_step_before(folder):
    checkpoints = Checkpoints(folder)
    data = next((folder / "30").glob("ocdbt.process_0/d/*"))
    data.write_bytes(flipped(data.read_bytes(), 100))
    for read in (checkpoints.restore, checkpoints.restore_subtree):
        message = refused(read, None, train_state())
        assert f"{folder / '30'} is damaged ({data.relative_to(folder / '30')} " in message
        assert f"step 20 is intact: delete {folder / '30'}" in message
    assert "is damaged" in refused(checkpoints.metadata)
    assert_same(checkpoints.restore(20, train_state())[0], train_state(20))

    (folder / "20" / "metadata.json").write_text("{")
    assert "step 10 is intact" in refused(checkpoints.restore, None, train_state())
    shutil.rmtree(folder / "10" / "d")
    assert "no earlier one is intact" in refused(checkpoints.restore, None, train_state())


def test_after_deleting_the_damaged_one_the_run_goes_on(folder):
    (folder / "30" / "SHA256SUMS").write_text("")
    with Checkpoints(folder) as checkpoints:
        refused(checkpoints.restore, None, train_state())
        shutil.rmtree(folder / "30")
        assert checkpoints.restore(None, train_state())[1] == {"position": 20 * 512}
        assert checkpoints.metadata() == {"position": 20 * 512}
        checkpoints.save(30, train_state(30), wait=True)
        assert_same(checkpoints.restore(30, train_state())[0], train_state(30))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED: needs the right to mount a small tmpfs")
    try:
        with Checkpoints(disk) as checkpoints:
            checkpoints.save(1, {"w": np.ones(1000)}, wait=True)
            message = refused(checkpoints.save, 2, {"w": np.random.rand(1 << 20)}, wait=True)
            assert f"step 2 could not be saved in {disk} (step 1 is intact)" in message
            assert "the disk is full" in message
            assert os.listdir(disk) == ["1"]  # and what failed takes no room
            filler = disk / "filler"
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(4 << 20))
            message = refused(checkpoints.save, 2, {"w": np.ones(1000)}, wait=True)
            assert "the disk is full" in message
            assert_same(checkpoints.restore(None, {"w": np.zeros(1000)})[0], {"w": np.ones(1000)})
            filler.unlink()
            checkpoints.save(2, {"w": np.ones(1000)}, wait=True)
            assert checkpoints.steps() == [1, 2]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """While a slow disk takes the last file, the program goes on; leaving waits for it."""
    disk, sha256 = threading.Event(), checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: disk.wait(60) and sha256(path))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, train_state(1))
        assert checkpoints.steps() == []
        disk.set()
    assert Checkpoints(tmp_path).steps() == [1]


def test_a_failed_save_in_the_background_is_told_at_the_next(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": np.ones(3)}, wait=True)

    def fail(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformer_vq.io.checkpoint._sha256", fail)
        checkpoints.save(2, {"w": np.ones(3)})
        assert "step 2 could not be saved" in refused(checkpoints.save, 3, {"w": np.ones(3)})
    checkpoints.save(3, {"w": np.ones(3)})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


# Processes of their own

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
        env={**env, "PYTHONPATH": str(SOURCE), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_9_at_any_moment(tmp_path):
    env = {**os.environ, "XLA_FLAGS": ""}
    rng, last = random.Random(), 0
    for _ in range(6):
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
    assert last > 0


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
from transformer_vq.io import checkpoint
with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
    tree = {"w": jax.numpy.ones((2, 3)), "k": jax.random.key(0), "n": np.ones(2), "s": 1}
    for step in range(3):
        checkpoints.save(step, tree)
    checkpoints.restore(None, tree)
    checkpoints.restore_subtree(None, {"w": tree["w"]})
    checkpoint._sha256 = lambda path: 1 / 0
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
