"""Weights of the reference implementation become exported models."""

import json

import numpy as np
import pytest

from tests.helpers import flax_bytes, raw, recorded
from transformer_vq.cli import main
from transformer_vq.data import load_tokenizer, open_source, train_tokenizer
from transformer_vq.errors import UserError
from transformer_vq.io.official import from_official
from transformer_vq.run.folder import load_run
from transformer_vq.run.official import import_official

ARRAYS = recorded("f32_h2_pe1_tie1_agg1")
CONFIG = json.loads(ARRAYS["config_json"].tobytes())
PARAMS = {k.removeprefix("params/"): v for k, v in ARRAYS.items() if k.startswith("params/")}


def nested(params) -> dict:
    tree: dict = {}
    for path, array in params.items():
        *above, name = path.split("/")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[name] = array
    return tree


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint_7"
    path.write_bytes(flax_bytes({"step": np.int32(7), "params": nested(PARAMS), "opt_state": {}}))
    return path


def test_both_kinds_of_files_give_the_model(checkpoint, tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS | {"config_json": np.array(json.dumps(CONFIG))})
    expected = from_official(PARAMS, CONFIG)
    carried = import_official(checkpoint, CONFIG)
    assert carried.info.step == 7 and carried.info.config == carried.model.config == expected.config
    assert raw(carried.model) == raw(expected)
    fields = {name: value for name, value in CONFIG.items() if name != "n_vocab"}
    for path, given in ((checkpoint, fields), (tmp_path / "w.npz", {})):
        found = import_official(path, given).model
        assert found.config == expected.config and raw(found) == raw(expected)


def test_the_command(checkpoint, tmp_path, capsys):
    """The folder is one that `load` takes; fields that are given count before those of the file."""
    lines = "".join(f"{name}: {value}\n" for name, value in CONFIG.items() if name != "mem_len")
    (tmp_path / "log").write_text(lines)
    command = ["import-official", "--weights", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "has no field" in capsys.readouterr().err
    command += ["--config", str(tmp_path / "log")]
    assert main([*command, "--field", "mem_len=4", "e_scale=0.5", "--license", "mit"]) == 0
    assert "the model at step 7 is in" in capsys.readouterr().out
    model, info = load_run(tmp_path / "out")
    assert raw(model) == raw(from_official(PARAMS, CONFIG))
    assert model.config.window_len == 4 and model.config.logit_scale == 0.5
    assert info.train.sequence_len == CONFIG["sequence_len"]
    card = (tmp_path / "out/README.md").read_text()
    assert "license: mit" in card and "converted by `tvq import-official`" in card
    assert main(["info", "--run", str(tmp_path / "out")]) == 0
    assert main([*command, "--field", "mem_len"]) == 2
    assert "--field is 'mem_len': it must be NAME=VALUE" in capsys.readouterr().err


def test_bytes_are_our_bytes(tmp_path):
    """Its vocabulary of bytes has three special tokens before them."""
    rng = np.random.default_rng(0)
    params = dict(PARAMS)
    params["token_embedder/embs"] = rng.normal(size=(259, 16)).astype(np.float32)
    params["token_embedder/bias_out"] = rng.normal(size=259).astype(np.float32)
    np.savez(tmp_path / "w.npz", **params)
    config = {**CONFIG, "n_vocab": 259}
    carried = import_official(tmp_path / "w.npz", config)
    assert carried.tokenizer.name == carried.info.tokenizer == "bytes"
    whole = from_official(params, config)
    for name in ("embedding", "output_bias"):
        ours, theirs = carried.model.params[name], whole.params[name]
        np.testing.assert_array_equal(ours[:256], theirs[3:])
        np.testing.assert_array_equal(ours[256:], theirs[:3])


def test_other_tokens_need_a_vocabulary(tmp_path):
    params = dict(PARAMS)
    params["token_embedder/embs"] = np.arange(280 * 16, dtype=np.float32).reshape(280, 16)
    params["token_embedder/bias_out"] = np.zeros(280, np.float32)
    np.savez(tmp_path / "w.npz", **params)
    config = {**CONFIG, "n_vocab": 280, "dataset": "pg19"}
    with pytest.raises(UserError, match="has 280 tokens, which are no bytes: give its vocabulary"):
        import_official(tmp_path / "w.npz", config)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst.\n" * 20)
    source = open_source([tmp_path / "book.txt"])
    train_tokenizer(source, tmp_path / "bpe.json", 270)
    tokenizer = load_tokenizer(tmp_path / "bpe.json")
    carried = import_official(tmp_path / "w.npz", config, tokenizer)
    assert carried.info.tokenizer == carried.tokenizer.name and carried.info.data.documents > 1
    assert np.array_equal(carried.model.params["embedding"], params["token_embedder/embs"])
    with pytest.raises(UserError, match=r"tokens, and the model 250: give the one that it was"):
        import_official(tmp_path / "w.npz", {**config, "n_vocab": 250}, tokenizer)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_len": "$BLOCK_LEN"}, "block_len is '\\$BLOCK_LEN', a variable of a script"),
        ({"agg_cache": "yes"}, "agg_cache is 'yes': it must be 0 or 1"),
        ({"param_dtype": "bfloat16"}, "is of float32 and param_dtype is bfloat16"),
        ({"d_ff": 64}, "d_ff is 64"),
        ({"n_vocab": 18}, "has shape"),
        ({"d_k": "wide"}, "d_k is 'wide'"),
        ({"update_len": 7}, "sequence_len is .*, not a multiple of update_len"),
    ],
)
def test_fields_that_do_not_fit(checkpoint, fields, words):
    with pytest.raises(UserError, match=words):
        import_official(checkpoint, {**CONFIG, **fields})
