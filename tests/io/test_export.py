"""Exported models on disk: to the bit, and refused in a sentence when anything is wrong."""

import json
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import load, save

from tests.helpers import raw
from tests.io.models import make_model
from transformer_vq.io.export import (
    CONFIG_FILE,
    MODEL_FILE,
    ExportError,
    cast_model,
    is_export,
    load_model,
    read_config,
    save_model,
    write_config,
)
from transformer_vq.io.state import model_hash

MODEL = make_model()


def export(folder: Path, model=MODEL) -> Path:
    folder.mkdir(exist_ok=True)
    save_model(folder, model)
    write_config(folder, model.config, {"step": 3})
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    return (export(tmp_path_factory.mktemp("good")) / MODEL_FILE).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported model whose file of arrays the tests write anew."""
    return export(tmp_path_factory.mktemp("export"))


def refused(folder, *words, config=MODEL.config):
    with pytest.raises(ExportError) as caught:
        read_config(folder)
        load_model(folder, config)
    sentence = str(caught.value)
    assert str(folder) in sentence and "\n" not in sentence
    assert all(word in sentence for word in words), sentence


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_round_trip(tmp_path, dtype):
    with jax.enable_x64(dtype == "float64"):
        model = make_model(param_dtype=dtype, head_type="mqa", absolute_positions=True)
        found = load_model(export(tmp_path, model), model.config)
        assert jax.tree.structure(found) == jax.tree.structure(model)
        assert raw(found) == raw(model) and model_hash(found) == model_hash(model)
        assert {x.dtype.name for x in jax.tree.leaves(found)} == {dtype}
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, MODEL_FILE]


def test_numbers_that_are_none_come_back(tmp_path):
    model = make_model()
    model.params["output_bias"][:3] = [np.nan, np.inf, -0.0]
    assert raw(load_model(export(tmp_path, model), model.config)) == raw(model)


def test_float64_is_not_cut_in_silence(tmp_path):
    with jax.enable_x64():
        model = make_model(param_dtype="float64")
        export(tmp_path, model)
    refused(tmp_path, "float64", "jax_enable_x64", config=model.config)


def test_another_dtype_is_the_cast():
    model = jax.tree.map(jax.numpy.asarray, MODEL)
    assert cast_model(model, "float32") is model
    half = cast_model(model, "bfloat16")
    assert half.config == MODEL.config.replace(param_dtype="bfloat16")
    assert raw(half) == [np.asarray(x).astype(jax.numpy.bfloat16).tobytes() for x in leaves(MODEL)]
    wide = cast_model(half, "float32")
    assert raw(wide) != raw(MODEL)  # control: something was rounded
    assert raw(cast_model(wide, "bfloat16")) == raw(half)


def leaves(model):
    return jax.tree.leaves((model.params, model.codebook))


def test_others_can_read_and_write_it(good, folder):
    """The library safetensors: the same names and numbers, in whatever order it writes them."""
    arrays = load(good)
    np.testing.assert_array_equal(arrays["params.units.w_q"], MODEL.params["units"]["w_q"])
    np.testing.assert_array_equal(arrays["codebook.sum"], MODEL.codebook["sum"])
    assert len(arrays) == len(leaves(MODEL))
    (folder / MODEL_FILE).write_bytes(save(arrays, header_of(good)))
    assert (folder / MODEL_FILE).read_bytes() != good  # control: another order
    assert raw(load_model(folder, MODEL.config)) == raw(MODEL)


def test_bfloat16_says_so(tmp_path):
    half = make_model(param_dtype="bfloat16")
    entries = deserialize((export(tmp_path, half) / MODEL_FILE).read_bytes())
    assert {entry["dtype"] for _, entry in entries} == {"BF16"}


# ---------------------------------------------------------------- damage


def header_of(data: bytes) -> dict[str, str]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@settings(max_examples=150)
@given(where=st.floats(0, 1, exclude_max=True), header=st.booleans(), bit=st.integers(0, 7))
def test_one_flipped_bit(good, folder, where, header, bit):
    size = 8 + int.from_bytes(good[:8], "little") if header else len(good)
    changed = bytearray(good)
    changed[int(where * size)] ^= 1 << bit
    (folder / MODEL_FILE).write_bytes(changed)
    refused(folder)
    (folder / MODEL_FILE).write_bytes(good)
    load_model(folder, MODEL.config)  # control: it was the bit


@given(where=st.floats(0, 1, exclude_max=True))
def test_cut_short(good, folder, where):
    (folder / MODEL_FILE).write_bytes(good[: int(where * len(good))])
    refused(folder, "damaged, cut or no safetensors file")


def test_bytes_of_no_array(good, folder):
    """All hashes fit, but something hides between the arrays."""
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    arrays = [entry for name, entry in header.items() if name != "__metadata__"]
    last = max(arrays, key=lambda entry: entry["data_offsets"])
    start, end = last["data_offsets"]
    last["data_offsets"] = [start + 8, end + 8]
    text = json.dumps(header).encode()
    data = good[8 + size :]
    data = data[:start] + b"8 bytes!" + data[start:]
    (folder / MODEL_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    refused(folder, "damaged, cut or no safetensors file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: {"more": np.zeros(2, np.float32)}, ["'more' has no place in the model"]),
        (lambda a: {"params.embedding": None}, ["'params.embedding' is missing"]),
        (
            lambda a: {"codebook.count": a["codebook.count"][:1]},
            ["'codebook.count' is 'F32' [1, 1, 6], and config.json says F32 [2, 1, 6]"],
        ),
        (
            lambda a: {"codebook.count": a["codebook.count"].astype(np.float16)},
            ["'codebook.count' is 'F16'"],
        ),
        (
            lambda a: {"params.embedding": a["params.embedding"] + np.float32(1e-7)},
            ["is damaged, or config.json beside it was changed"],
        ),
        (lambda a: {name: None for name in a}, ["is missing"]),
    ],
)
def test_other_arrays(good, folder, change, words):
    arrays = load(good)
    arrays = {k: v for k, v in {**arrays, **change(arrays)}.items() if v is not None}
    (folder / MODEL_FILE).write_bytes(save(arrays, header_of(good)))
    refused(folder, *words)


class Harmful:
    """What a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


FOREIGN = {
    "text": (b"It was the best of times.\n" * 20, "no safetensors file"),
    "zeros": (bytes(1000), "no safetensors file"),
    "a pickle": (pickle.dumps(Harmful()), "no safetensors file"),
    "deep": (b"\x40\x42\x0f\0\0\0\0\0" + b"[" * 1_000_000, "no safetensors file"),
    "a huge header": ((1 << 40).to_bytes(8, "little") + b"{}", "no safetensors file"),
    "tensors": (save({"w": np.zeros(3, np.float32)}), "of another program"),
    "of torch": (save({"w": np.zeros(3)}, {"format": "pt"}), "of another program"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_arrays(folder, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    content, words = FOREIGN[name]
    (folder / MODEL_FILE).write_bytes(content)
    refused(folder, words)
    assert not list(tmp_path.iterdir())  # no harm


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"architectures": ["GPT2"], "model_type": "gpt2"}', "of another program"),
        ('{"format": "transformer-vq model", "version": 2}', "has version 2 of the format"),
        ('{"format"', "is damaged (it is not JSON)"),
        ("[1]", "is damaged (it is not a JSON object)"),
        ("[" * 100_000, "is damaged (it is not JSON)"),
        (" " * (1 << 21), "has more than 1,048,576 bytes"),
        (None, "no config.json"),
    ],
)
def test_foreign_sizes(tmp_path, content, words):
    (tmp_path / MODEL_FILE).write_bytes(b"")
    if content is not None:
        (tmp_path / CONFIG_FILE).write_text(content)
    assert is_export(tmp_path)
    refused(tmp_path, words)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / CONFIG_FILE)
    (tmp_path / MODEL_FILE).mkdir()
    refused(tmp_path, "it is no regular file")
    os.remove(tmp_path / CONFIG_FILE)
    write_config(tmp_path, MODEL.config, {})
    refused(tmp_path, "is no regular file")
    (tmp_path / MODEL_FILE).rmdir()
    refused(tmp_path, "is missing")


def test_sizes_that_were_changed(good, tmp_path):
    """Those that change no shape too."""
    export(tmp_path)
    load_model(tmp_path, MODEL.config)  # control
    refused(
        tmp_path,
        "config.json beside it was changed",
        config=MODEL.config.replace(sink=False, logit_scale=0.5),
    )
    refused(tmp_path, "and config.json says", config=MODEL.config.replace(codebook_size=7))


def test_a_run_is_no_export(tmp_path):
    assert not is_export(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"config": {}, "train": {}}')
    assert not is_export(tmp_path) and not is_export(tmp_path / "nothing")
    export(tmp_path)
    assert is_export(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert not is_export(tmp_path)
