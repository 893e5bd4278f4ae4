"""Compiled programs on disk: JAX's cache, of which no damaged entry is run."""

import random

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from transformer_vq.engine.kept import Entries, keep_entries_whole, read_kept, write_kept


def test_what_is_not_as_it_was_written_is_not_there(tmp_path):
    path, content = tmp_path / "program", random.Random(0).randbytes(200)
    write_kept(path, content)
    whole = path.read_bytes()
    assert read_kept(path) == content
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_kept(path) is None, place
        path.write_bytes(whole[:place])
        assert read_kept(path) is None, place
    path.write_bytes(whole)
    assert read_kept(path.rename(tmp_path / "another")) is None
    assert read_kept(path) is None and read_kept(tmp_path) is None  # nothing, and a folder
    write_kept(tmp_path / "no folder" / "program", content)  # nothing happens


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where JAX keeps its programs for now, as `tvq` lets it."""
    monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    keep_entries_whole()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_jax_makes_a_damaged_entry_anew(folder, monkeypatch):
    asked = []
    get = Entries.get
    monkeypatch.setattr(Entries, "get", lambda self, key: asked.append(get(self, key)) or asked[-1])

    def ask():
        asked.clear()
        jax.clear_caches()
        assert jax.jit(lambda x: x * 3 + 1)(jnp.arange(3.0)).tolist() == [1, 4, 7]
        return [found is not None for found in asked]

    assert not any(ask())
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    assert all(path.name.endswith("-kept") for path in whole)
    assert all(ask()) and asked  # control: found
    for path, content in whole.items():
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert not any(ask())
    assert all(ask())  # they were replaced
