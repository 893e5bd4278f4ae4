"""Files of the reference implementation, made here as flax makes them."""

import io
import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import flax_bytes
from transformer_vq.io.official import bytes_first
from transformer_vq.io.official_files import OfficialError, read_fields, read_weights

W = np.arange(6, dtype=np.float32).reshape(2, 3)
PARAMS = {"out_proj": {"kernel": W, "bias": W[0]}, "position_embedder": {"scale": W[0, 1:2].sum()}}
FLAT = {"out_proj/kernel": W, "out_proj/bias": W[0], "position_embedder/scale": W[0, 1]}


def train_state(params=PARAMS, step=7):
    moments = {"0": {}, "1": {"count": np.array(step), "mu": params}}
    return {"step": step, "params": params, "opt_state": {"inner_states": {"main": moments}}}


def same(found, expected=FLAT):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def refused(path, *words):
    with pytest.raises(OfficialError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [train_state(), train_state(step=np.int32(7)), {"step": 7, "params": {"params": PARAMS}}],
)
def test_a_checkpoint_of_flax(tmp_path, tree):
    path = tmp_path / "checkpoint_7"
    path.write_bytes(flax_bytes(tree))
    weights = read_weights(path)
    same(weights.params)
    assert weights.step == 7
    path.write_bytes(flax_bytes(tree["params"]))  # the parameters alone
    same(read_weights(path).params)


def test_what_orbax_writes_in_its_place(tmp_path):
    """Its code for msgpack is that of flax."""
    orbax = pytest.importorskip("orbax.checkpoint.msgpack_utils")
    content = orbax.msgpack_serialize(train_state(step=np.int32(7)))
    (tmp_path / "checkpoint").write_bytes(content)
    weights = read_weights(tmp_path)
    same(weights.params)
    assert weights.step == 7


def test_bfloat16_and_chunks(tmp_path):
    half = W.astype(jnp.bfloat16)
    chunks = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}}
    chunks["chunks"] = {"0": half.reshape(-1)[:4], "1": half.reshape(-1)[4:]}
    (tmp_path / "c").write_bytes(flax_bytes({"params": {"a": half, "b": chunks}}))
    same(read_weights(tmp_path / "c").params, {"a": half, "b": half})
    del chunks["chunks"]["1"]
    (tmp_path / "c").write_bytes(flax_bytes({"params": {"b": chunks}}))
    refused(tmp_path / "c", "the chunks of b are damaged")


@pytest.mark.parametrize("way", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_is_named(tmp_path, way):
    """Whatever its libraries raise of it: those of lzma and bz2 raise errors of their own."""
    array = io.BytesIO()
    np.save(array, np.random.default_rng(0).random(100))
    with zipfile.ZipFile(tmp_path / "p", "w", way) as archive:
        archive.writestr("params/w.npy", array.getvalue())
    assert read_weights(tmp_path / "p").params["w"].shape == (100,)  # control
    content = bytearray((tmp_path / "p").read_bytes())
    content[200:260] = bytes(60)
    (tmp_path / "p").write_bytes(content)
    refused(tmp_path / "p", "cannot be read as .npz")


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "p")  # nobody writes to it: to read it is to wait for ever
    with pytest.raises(OfficialError, match="p is no regular file: give JSON"):
        read_fields(tmp_path / "p")


def test_folders_of_checkpoints(tmp_path):
    """The newest by its number; orbax makes a folder of each."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint_{step}"
        folder.mkdir()
        (folder / "checkpoint").write_bytes(flax_bytes(train_state(step=step)))
    (tmp_path / "validation_loss_lm_per_token_11").write_bytes(b"")  # it saves these beside them
    assert read_weights(tmp_path).step == 10
    assert read_weights(tmp_path / "checkpoint_9").step == 9
    os.rename(folder / "checkpoint", folder / "manifest.ocdbt")
    refused(tmp_path, "has no file checkpoint")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no checkpoint of flax")
    refused(tmp_path / "nothing", "does not exist")


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", **FLAT)
    same(read_weights(tmp_path / "a.npz").params)
    inside = {f"params/{name}": array for name, array in FLAT.items()}
    np.savez(tmp_path / "b.npz", **inside, logprobs=W, config_json=np.array('{"d_k": 8}'))
    weights = read_weights(tmp_path / "b.npz")
    same(weights.params)
    assert weights.fields == {"d_k": 8}


class Harmful:
    """What a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_bytes(pickle.dumps(Harmful()))
    refused(tmp_path / "p", "no checkpoint of flax")
    buffer = io.BytesIO()
    np.savez(buffer, w=np.array([Harmful()], dtype=object), allow_pickle=True)
    (tmp_path / "p").write_bytes(buffer.getvalue())
    refused(tmp_path / "p", "cannot be read as .npz", "allow_pickle=False")
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(Harmful()))
    assert (tmp_path / "harm").exists()  # control: it could have run


WHOLE = flax_bytes(train_state())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (WHOLE[:-5], "damaged or no checkpoint"),
        (WHOLE + b"\0", "damaged or no checkpoint"),
        (b"", "damaged or no checkpoint"),
        (b"\x81" * 100_000, "damaged or no checkpoint"),
        (b"PK\x03\x04" + bytes(50), "cannot be read as .npz"),
        (flax_bytes([1, 2]), "it holds no dictionary"),
        (WHOLE.replace(b"float32", b"object_"), "an array is of type 'object_'"),
        (flax_bytes({"params": {}}), "no parameters"),
        (flax_bytes({"params": {"w": W.astype(np.int32)}}), "w is of type int32"),
        (flax_bytes({"params": {"w": "PLACEHOLDER://w"}}), "w lies in files of its own"),
        (flax_bytes({"params": {"w": [1.0, 2.0]}}), "w is no array"),
    ],
    ids=range(11),
)
def test_damaged_and_foreign_files(tmp_path, content, words):
    (tmp_path / "c").write_bytes(content)
    refused(tmp_path / "c", words)


FIELDS = {"d_model": 768, "e_scale": 0.005, "agg_cache": 1, "dtype": "bfloat16", "pe_abs": False}


@pytest.mark.parametrize(
    "text",
    [
        '{"d_model": 768, "e_scale": 0.005, "agg_cache": 1, "dtype": "bfloat16", '
        '"pe_abs": false, "grad_clip": null}',
        "d_model: 768\ne_scale: 0.005\nagg_cache: 1\ndtype: bfloat16\npe_abs: False\n"
        "grad_clip: None\n",
        "python3 scripts/launch.py \\\n  --d_model=768 \\\n  --e_scale=0.005 \\\n"
        '  --agg_cache=1 \\\n  --dtype="bfloat16" \\\n  --pe_abs=False\n',
        "wandb_version: 1\nd_model:\n    desc: null\n    value: 768\ne_scale:\n    value: 0.005\n"
        "agg_cache:\n    value: 1\ndtype:\n    value: bfloat16\npe_abs:\n    value: false\n",
        "config.d_model = 7_68  # width\n    config.e_scale = 0.005\nconfig.agg_cache = 1\n"
        "config.dtype = jnp.bfloat16  # of activations\nconfig.pe_abs = False\n",
    ],
    ids=["json", "printed", "script", "wandb", "python"],
)
def test_fields(tmp_path, text):
    (tmp_path / "f").write_text(text)
    found = read_fields(tmp_path / "f")
    assert {name: found.get(name) for name in FIELDS} == FIELDS
    assert "grad_clip" not in found and type(found["d_model"]) is int


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no fields"),
        (b"[1]", "has no fields"),
        (b"\xff\xfe", "is not text"),
        (b"a" * (1 << 21), "more than 1,048,576 bytes"),
    ],
)
def test_fields_that_are_none(tmp_path, content, words):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(OfficialError, match=words):
        read_fields(tmp_path / "f")


def test_bytes_come_first():
    tokens = np.arange(259, dtype=np.float32)
    params = {
        "token_embedder/embs": tokens[:, None] * [1, 10],
        "out_proj/kernel": tokens * np.ones((2, 1), np.float32),
        "out_proj/bias": tokens,
        "out_ln/g": tokens[:2],
    }
    moved = bytes_first(params, 3)
    assert moved["token_embedder/embs"][ord("A")].tolist() == [68, 680]
    assert moved["out_proj/kernel"][1, ord("A")] == moved["out_proj/bias"][ord("A")] == 68
    assert moved["out_proj/bias"][-3:].tolist() == [0, 1, 2]
    assert moved["out_ln/g"] is params["out_ln/g"]
