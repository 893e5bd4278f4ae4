"""State files: exact, tied to their model, refused when anything is wrong, whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from tests.helpers import ROOT
from tests.io.models import SIZES, make_model
from transformer_vq import ModelConfig, StateError, init_state, load_state, save_state
from transformer_vq.io import state as state_io


def make_state(config, batch=2, capacity=None, seed=0):
    """A state with a random number in every place."""
    rng = np.random.default_rng(seed)

    def numbers(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 1000, x.shape), x.dtype)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(numbers, init_state(config, batch, capacity=capacity))


def assert_equal(actual, expected):
    """Structure, shapes, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert (a.shape, a.dtype, type(a)) == (b.shape, b.dtype, type(b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def refused(path, model, *words):
    """Loading raises `StateError`, in one sentence that names the file."""
    with pytest.raises(StateError) as caught:
        load_state(path, model)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    for word in words:
        assert word in sentence
    return True


MODEL = make_model()
STATE = make_state(MODEL.config)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("good") / "state"
    save_state(path, STATE, MODEL)
    return path.read_bytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("state") / "file"


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("attention", ["vq", "full"])
def test_round_trip(tmp_path, attention, dtype):
    with jax.enable_x64(dtype == "float64"):
        compute = "float64" if dtype == "float64" else "float32"
        model = make_model(attention=attention, state_dtype=dtype, compute_dtype=compute)
        for batch in (1, 3):
            capacity = 11 * batch if attention == "full" else None
            state = make_state(model.config, batch, capacity)
            path = tmp_path / f"state-{batch}"
            save_state(path, state, model)
            assert_equal(load_state(str(path), model), state)
        assert {p.name for p in tmp_path.iterdir()} == {"state-1", "state-3"}  # nothing else


def test_dtype_of_the_state_is_kept(tmp_path):
    """Also where it is not that of the configuration."""
    state = init_state(MODEL.config, 2, "bfloat16")
    save_state(tmp_path / "state", state, MODEL)
    assert_equal(load_state(tmp_path / "state", MODEL), state)


def test_a_newer_state_takes_the_place_of_the_older(tmp_path):
    newer = make_state(MODEL.config, batch=1, seed=1)
    save_state(tmp_path / "state", STATE, MODEL)
    save_state(tmp_path / "state", newer, MODEL)
    assert_equal(load_state(tmp_path / "state", MODEL), newer)


def test_notes_go_with_a_state(good):
    """Texts beside the arrays; who reads the state alone does not meet them."""
    notes = {"seen": "[1, 2]", "é": "x" * 1000}
    data = state_io.pack_state(STATE, MODEL, notes=notes)
    state, found = state_io.unpack_state(data, MODEL)
    assert_equal(state, STATE)
    assert found == notes and state_io.unpack_state(good, MODEL)[1] == {}
    changed = data.replace(b"[1, 2]", b"[1, 3]")
    with pytest.raises(StateError, match="the file is damaged"):
        state_io.unpack_state(changed, MODEL, name="the file")
    with pytest.raises(state_io.OtherModel, match="the state is the state of another model"):
        state_io.unpack_state(data, make_model(seed=1))
    with pytest.raises(state_io.OtherModel, match="made with far_decay 0 and far_cap 0, and here"):
        state_io.unpack_state(data, make_model(far_cap=9))


# ---------------------------------------------------------------- another model


def test_one_changed_number_makes_another_model(good, file):
    file.write_bytes(good)
    assert_equal(load_state(file, MODEL), STATE)
    arrays = (MODEL.params, MODEL.codebook)
    leaves, tree = jax.tree.flatten(arrays)
    for i, leaf in enumerate(leaves):
        changed = np.array(leaf)
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(np.inf))
        params, codebook = jax.tree.unflatten(tree, [*leaves[:i], changed, *leaves[i + 1 :]])
        assert refused(file, replace(MODEL, params=params, codebook=codebook), "another model")
    scaled = replace(MODEL, config=MODEL.config.replace(logit_scale=0.5))
    assert refused(file, scaled, "another model")


@pytest.mark.parametrize(
    "fields",
    [
        {"window_len": 6},
        {"codebook_size": 7},
        {"vocab_size": 18},
        {"num_layers": 2},
        {"num_heads": 2},
        {"attention": "full"},
    ],
)
def test_a_state_is_saved_with_its_own_model_only(tmp_path, fields):
    with pytest.raises(StateError, match="another model"):
        save_state(tmp_path / "state", make_state(ModelConfig(**{**SIZES, **fields})), MODEL)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- damage


def flipped(data, position, bit):
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


@settings(max_examples=300)
@given(where=st.floats(0, 1, exclude_max=True), header=st.booleans(), bit=st.integers(0, 7))
def test_one_flipped_bit(good, file, where, header, bit):
    size = 8 + int.from_bytes(good[:8], "little") if header else len(good)
    file.write_bytes(flipped(good, int(where * size), bit))
    assert refused(file, MODEL)


@pytest.mark.slow
def test_every_flipped_bit_of_the_header(good, file, monkeypatch):
    true = state_io.model_hash(MODEL)
    monkeypatch.setattr(state_io, "model_hash", lambda model: true)
    for position in range(8 + int.from_bytes(good[:8], "little")):
        for bit in range(8):
            file.write_bytes(flipped(good, position, bit))
            assert refused(file, MODEL)


@given(where=st.floats(0, 1, exclude_max=True))
def test_truncated(good, file, where):
    file.write_bytes(good[: int(where * len(good))])
    assert refused(file, MODEL, "damaged")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, -1])
def test_truncated_at_the_edges(good, file, size):
    file.write_bytes(good[:size])
    assert refused(file, MODEL, "damaged")


def test_bytes_after_the_end(good, file):
    file.write_bytes(good + b"\0")
    assert refused(file, MODEL, "damaged")


FOREIGN = {
    "text": b"It was the best of times, it was the worst of times.\n" * 20,
    "json": b'{"__metadata__": {"format": "transformer-vq state"}}',
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "numbers": np.random.default_rng(0).bytes(5000),
    "deep": b"\x40\x42\x0f\0\0\0\0\0" + b"[" * 1_000_000,
    "tensors": save({"w": np.zeros(3, np.float32)}),
    "other tensors": save({"w": np.zeros(3, np.float32)}, metadata={"format": "pt"}),
    "no arrays": save({}, metadata={"format": state_io.FORMAT, "version": str(state_io.VERSION)}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(file, name):
    file.write_bytes(FOREIGN[name])
    assert refused(file, MODEL, "damaged or not a state file")


def header_of(data):
    import json

    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_another_version(good, file):
    header = header_of(good)
    file.write_bytes(save(load(good), metadata=header))
    assert_equal(load_state(file, MODEL), STATE)  # control: written again as it was
    file.write_bytes(save(load(good), metadata={**header, "version": "3"}))
    assert refused(file, MODEL, "version 3", "version 2")


def test_renamed_and_missing_arrays(good, file):
    for change in (
        lambda arrays: {name.upper(): array for name, array in arrays.items()},
        lambda arrays: dict(list(arrays.items())[1:]),
        lambda arrays: {**arrays, "more": np.zeros(2)},
        lambda arrays: {name: array[:1] for name, array in arrays.items()},
    ):
        file.write_bytes(save(change(load(good)), metadata=header_of(good)))
        assert refused(file, MODEL, "damaged")


# ---------------------------------------------------------------- paths


def test_paths_that_cannot_be_read(tmp_path):
    assert refused(tmp_path / "nothing", MODEL, "cannot read", "No such file")
    assert refused(tmp_path / "no" / "folder", MODEL, "cannot read", "No such file")
    assert refused(tmp_path, MODEL, "cannot read", "directory")


def test_files_without_an_end(tmp_path):
    """Neither read until memory is gone nor waited for."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        assert refused(path, MODEL, "cannot read", "a pipe or a device")


def test_no_more_is_read_than_a_state_has(good, file):
    """A header larger than any, and a large file that begins like a state (holes take no disk)."""
    file.write_bytes((1 << 40).to_bytes(8, "little") + good[8:])
    os.truncate(file, 1 << 41)
    assert refused(file, MODEL, "is damaged or not a state file")
    file.write_bytes(good)
    os.truncate(file, 1 << 41)
    assert refused(file, MODEL, "is damaged or not a state file")


def not_written(path, *words):
    with pytest.raises(StateError) as caught:
        save_state(path, STATE, MODEL)
    sentence = str(caught.value)
    assert "cannot write" in sentence and str(path) in sentence and "\n" not in sentence
    for word in words:
        assert word in sentence


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    not_written(tmp_path / "no" / "folder", "No such file")
    not_written(tmp_path / "file" / "state", "Not a directory")
    not_written(tmp_path / ("x" * 300), "too long")
    not_written(tmp_path, "directory")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_files_are_written(tmp_path, monkeypatch):
    """A pipe or a device is not replaced by a file, and no name is no file."""
    os.mkfifo(tmp_path / "pipe")
    not_written(tmp_path / "pipe", "give the name of a file")
    assert (tmp_path / "pipe").is_fifo()
    monkeypatch.chdir(tmp_path)
    for name in ("", "."):
        with pytest.raises(StateError, match="give the name of a file"):
            save_state(name, STATE, MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / ("x" * 250)  # legal, but nothing may be added to it
    save_state(path, STATE, MODEL)
    assert_equal(load_state(path, MODEL), STATE)


def test_a_folder_without_permission(tmp_path):
    if os.geteuid() == 0:
        folder = "/proc/self"  # the superuser may write anywhere else
        if not os.path.isdir(folder):
            pytest.skip("NOT TESTED: the superuser may write everywhere")
        not_written(f"{folder}/state")
    else:
        tmp_path.chmod(0o500)
        not_written(tmp_path / "state", "Permission denied")
        tmp_path.chmod(0o700)


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "state"
    save_state(path, STATE, MODEL)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_io.os, step, full)
    with pytest.raises(StateError, match="No space left"):
        save_state(path, make_state(MODEL.config, seed=1), MODEL)
    assert_equal(load_state(path, MODEL), STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch, step):
    """Ctrl-C in the middle: the old file, and nothing half written beside it."""
    path = tmp_path / "state"
    save_state(path, STATE, MODEL)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(state_io.os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, make_state(MODEL.config, seed=1), MODEL)
    assert_equal(load_state(path, MODEL), STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_kill_9_leaves_the_old_file(tmp_path, user_env):
    """A process is killed when the new state is half written, over the one it wrote before."""
    path = tmp_path / "state"
    program = """
        import sys, time
        sys.path.insert(0, sys.argv[2])
        import tests.io.test_state as t
        t.save_state(sys.argv[1], t.STATE, t.MODEL)

        def write_half(arrays, metadata):
            data = t.save(arrays, metadata=metadata)
            return data[: len(data) // 2]

        def wait(_):
            print("half", flush=True)
            time.sleep(600)

        t.state_io.save, t.state_io.os.fsync = write_half, wait
        t.save_state(sys.argv[1], t.make_state(t.MODEL.config, seed=1), t.MODEL)
    """
    folder = str(ROOT)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(path), folder],
        env=user_env,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "half\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 2  # control: it was in the middle of writing
    assert_equal(load_state(path, MODEL), STATE)
    save_state(path, make_state(MODEL.config, seed=2), MODEL)  # what was left is in nobody's way
