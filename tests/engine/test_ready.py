"""Programs that are found on disk, without being traced."""

import functools
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_vq.engine import kept, ready

traced: list[tuple[int, ...]] = []


@functools.partial(jax.jit, static_argnames=("times", "mesh"), donate_argnames="x")
def scaled(given: dict, x: jax.Array, *, times: int, mesh: object = None) -> dict:
    traced.append(x.shape)
    return {"y": given["w"] * x * times, "x": x + 1}


@pytest.fixture
def folder(tmp_path):
    next_process(tmp_path)
    traced.clear()
    yield tmp_path
    ready.keep_programs(None)


def ask(size: int = 3, times: int = 2, dtype: str = "float32", **more: object) -> list:
    w = np.arange(size, dtype=dtype)
    out = ready.call(scaled, {"w": w}, jnp.ones(size, dtype), times=times, **more)
    return [np.asarray(out[name]).tolist() for name in ("y", "x")]


def next_process(folder: Path) -> None:
    """Forget what is in memory, as a process that starts knows nothing."""
    ready.keep_programs(folder)
    scaled.clear_cache()  # pyright: ignore


def test_a_program_is_traced_by_the_first_process_alone(folder):
    assert ask() == [[0, 2, 4], [2, 2, 2]] and len(traced) == 1
    next_process(folder)
    assert ask() == [[0, 2, 4], [2, 2, 2]] and len(traced) == 1
    assert ask() == [[0, 2, 4], [2, 2, 2]]  # once more, now from memory
    for path in folder.iterdir():  # control: without the files it is traced
        path.unlink()
    next_process(folder)
    assert ask() == [[0, 2, 4], [2, 2, 2]] and len(traced) == 2


def test_what_differs_is_another_program(folder, monkeypatch):
    assert ask() == [[0, 2, 4], [2, 2, 2]]
    assert ask(times=3) == [[0, 3, 6], [2, 2, 2]]
    assert ask(size=2) == [[0, 2], [2, 2]]
    assert ask(dtype="int32") == [[0, 2, 4], [2, 2, 2]]
    assert len(traced) == len(list(folder.iterdir())) == 4
    monkeypatch.setattr(ready, "_circumstances", lambda: "other sources")
    next_process(folder)
    ask()
    assert len(traced) == 5


def test_sources_settings_and_processor_count():
    about = ready._circumstances.__wrapped__()
    assert (
        f"'{jax.__version__}', '{version('jaxlib')}'" in about
        and "jax_enable_x64" in about
        and "flags" in about
    )
    before = jax.config.jax_default_matmul_precision  # pyright: ignore
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert ready._circumstances.__wrapped__() != about
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert ready._circumstances.__wrapped__() == about


def test_a_damaged_file_is_made_anew(folder):
    ask()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:middle], b"no program", flipped(whole, middle)):
        path.write_bytes(damaged)
        next_process(folder)
        assert ask() == [[0, 2, 4], [2, 2, 2]]
        assert path.read_bytes() != damaged and len(path.read_bytes()) > middle
    assert len(traced) == 5


def test_a_program_with_a_flipped_bit_is_not_loaded(folder):
    ask()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(flipped(whole, place))
        assert ready._loaded(path, jax.devices()[0]) is None
    path.write_bytes(whole)  # control
    assert ready._loaded(path, jax.devices()[0]) is not None


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_where_it_is_not_one_device_all_is_as_ever(folder):
    """Within a trace, on a mesh, on another device, or of what is no array."""
    w = np.ones(3, "float32")
    out = jax.jit(lambda x: ready.call(scaled, {"w": w}, x, times=2))(jnp.ones(3))
    assert out["y"].tolist() == [2, 2, 2]
    assert ask(mesh="some") == [[0, 2, 4], [2, 2, 2]]
    other = jax.devices()[1]
    out = ready.call(scaled, {"w": w}, jax.device_put(jnp.ones(3), other), times=2)
    assert out["y"].tolist() == [2, 2, 2] and out["y"].devices() == {other}
    assert ready.call(scaled, {"w": w}, 1.0, times=2)["y"].tolist() == [2, 2, 2]
    assert not list(folder.iterdir())
    ready.keep_programs(None)
    assert ask() == [[0, 2, 4], [2, 2, 2]]


def test_a_folder_that_cannot_be_written_to(tmp_path, folder, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(kept, "write_whole", full)
    assert ask() == [[0, 2, 4], [2, 2, 2]] and not list(folder.iterdir())
