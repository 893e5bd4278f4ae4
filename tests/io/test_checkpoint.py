"""Checkpoints: bit for bit, kept as asked, and clear when something is wrong."""

import dataclasses
import errno
import os
import shutil
import subprocess
import threading
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.io.trees import assert_same, refused, train_state
from transformer_vq.io import arrays, checkpoint, checksums
from transformer_vq.io.checkpoint import Checkpoints

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
    assert "use the configuration" in message
    message = refused(restore, None, dataclasses.replace(state, step=np.int32(1)))
    assert "int32[] here: JAX_ENABLE_X64 is off: set it as it was" in message
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


def test_a_limit_of_files_is_named(tmp_path):
    """And not the page that the library makes of it, which begins with a file and ends with why."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            message = refused(checkpoints.save, 2, {"w": np.random.rand(1 << 14)}, wait=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "(step 1 is intact): a file may not be as large here" in message
        assert "ulimit -f" in message and len(message) < 300
        checkpoints.save(2, {"w": np.ones(3)}, wait=True)


def test_a_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """While a slow disk takes the last file, the program goes on; leaving waits for it."""
    disk, sha256 = threading.Event(), checksums.sha256
    monkeypatch.setattr(checksums, "sha256", lambda path: disk.wait(60) and sha256(path))
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
        patch.setattr("transformer_vq.io.checksums.seal", fail)
        checkpoints.save(2, {"w": np.ones(3)})
        assert "step 2 could not be saved" in refused(checkpoints.save, 3, {"w": np.ones(3)})
    checkpoints.save(3, {"w": np.ones(3)})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


# Folders that are not as they were


def test_a_folder_that_went_is_not_made_again(tmp_path):
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(1, {"w": 1}, wait=True)
    shutil.rmtree(run)
    message = refused(checkpoints.save, 2, {"w": 1})
    assert "step 2 could not be saved" in message and "removed or moved" in message
    assert not run.exists()


def test_a_checkpoint_that_is_deleted_while_it_is_read(folder, monkeypatch):
    """Renamed, as by a training that goes on: it is refused, and zeros are never taken for it."""
    state, path = train_state(30), folder / "30"
    part = {"params": state.params, "codebook": state.codebook}
    real_open, real_look = arrays.tensorstore.open, checkpoint._damage

    def delete():
        if path.exists():
            path.rename(path.with_suffix(".deleted"))

    def opened(*args, **options):
        found = real_open(*args, **options).result()
        return types.SimpleNamespace(result=lambda: (delete(), found)[1])  # when all are open

    def looked(*args):
        found = real_look(*args)
        delete()
        return found

    def gone(*args):
        delete()
        return real_look(*args)

    for module, name, new in (
        (arrays.tensorstore, "open", opened),
        (checkpoint, "_damage", looked),
        (checkpoint, "_damage", gone),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, new)
            said = refused(Checkpoints(folder).restore_subtree, 30, part)
        assert said.startswith(f"the checkpoint {path} has just been deleted"), new
        assert "of 10, 20, or" in said
        path.with_suffix(".deleted").rename(path)
    restored, _ = Checkpoints(folder).restore_subtree(30, part)  # control
    assert_same(restored, part)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(folder, monkeypatch, number):
    """Else a good one would be deleted, by the advice for damage."""
    newest, real = folder / "30", checksums.sha256

    def unreadable(path):
        if newest in path.parents:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(checksums, "sha256", unreadable)
    for said in (
        refused(Checkpoints(folder).metadata),
        refused(Checkpoints(folder, best_metric="x").best),
    ):
        assert said.startswith(f"the checkpoint {newest} cannot be read (")
        assert os.strerror(number) in said and "delete" not in said and "damaged" not in said
    assert Checkpoints(folder).metadata(20)  # control
    (folder / "10" / "metadata.json").unlink()
    assert "10 is damaged" in refused(Checkpoints(folder).metadata, 10)


def test_withdrawn_checkpoints_are_put_aside(tmp_path):
    """And nothing is deleted for them, however few are kept."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"w": 1})
        checkpoints.save(2, {"w": 2})
        checkpoints.withdraw([2])
        assert checkpoints.steps() == [1]
        checkpoints.save(2, {"w": 3})
        checkpoints.withdraw([2])
    assert sorted(os.listdir(tmp_path)) == ["1", "2.diverged"]
    assert (tmp_path / "2.diverged" / "metadata.json").exists()


def test_a_path_that_is_not_utf_8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert r"/\xff is not UTF-8" in refused(Checkpoints, folder)
