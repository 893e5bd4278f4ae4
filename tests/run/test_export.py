"""From a run to an exported model, and back by whatever reads a run."""

import dataclasses
import errno
import json
import os

import jax
import numpy as np
import pytest

from tests.helpers import raw
from tests.io.models import make_model
from transformer_vq import TrainConfig, load
from transformer_vq.data import DataError, load_tokenizer, open_source, train_tokenizer
from transformer_vq.io.export import FILES, MODEL_FILE, ExportError
from transformer_vq.run.export import Carried, gather, require_free, write
from transformer_vq.run.folder import (
    DataSource,
    RunError,
    RunInfo,
    find_step,
    load_info,
    load_run,
    make_run_folder,
)
from transformer_vq.run.weights import Cost, load_cost, save_cost

MODEL = make_model()
INFO = RunInfo(
    MODEL.config,
    TrainConfig(batch_size=1, sequence_len=16),
    DataSource("book.txt", 60, "f00", more_paths=("more.txt",)),
    step=40,
    seconds=2.5,
)
RECORDS = [{"step": 40, "loss": 1.5, "bpb": 2.1}]
CARRIED = Carried(MODEL, INFO, records=RECORDS, environment={"jax": "1.2.3"})


@pytest.fixture
def out(tmp_path):
    write(CARRIED, tmp_path / "out", "# Card\n")
    return tmp_path / "out"


# ---------------------------------------------------------------- there and back


def test_what_is_written_is_read(out):
    model, info = load_run(out)
    assert raw(model) == raw(MODEL) and info == INFO
    assert load_info(out, 40) == INFO == load_info(str(out))
    assert [find_step(out, name) for name in ("latest", "best", "40")] == [None, None, 40]
    content = json.loads((out / "config.json").read_text())
    assert content["format"] == "transformer-vq model" and content["version"] == 1
    assert content["product"].startswith("transformer-vq ") and content["tokenizer"] == "bytes"
    assert content["model"] == MODEL.config.to_dict()
    assert {path.name for path in out.iterdir()} < set(FILES)
    assert (out / "README.md").read_text() == "# Card\n"


def test_what_rounding_costs_goes_with_the_weights_that_were_rounded(out, tmp_path):
    cost = Cost(INFO.step, INFO.seconds, 1.5, 1.501, 4096)
    save_cost(out, "int8", cost)
    save_cost(out, "bfloat16", dataclasses.replace(cost, step=39))  # of another checkpoint
    assert gather(out).costs == gather(out, dtype="float32").costs == {"int8": cost}
    assert gather(out, dtype="bfloat16").costs == {}
    write(gather(out), tmp_path / "again", "")
    assert load_cost(tmp_path / "again", INFO, "int8") == cost
    write(CARRIED, out, "", overwrite=True)
    assert load_cost(out, INFO, "int8") is None


def test_an_export_is_exported_again(out, tmp_path):
    carried = gather(out, dtype="bfloat16")
    assert carried.records == RECORDS and carried.environment == {"jax": "1.2.3"}
    write(carried, tmp_path / "half", "")
    model, info = load_run(tmp_path / "half")
    assert model.config == info.config == MODEL.config.replace(param_dtype="bfloat16")
    half = jax.tree.map(lambda x: np.asarray(x).astype(model.codebook["sum"].dtype), MODEL)
    assert raw(model) == raw(half)
    write(gather(tmp_path / "half", dtype="float32"), tmp_path / "wide", "")
    again = gather(tmp_path / "wide", dtype="bfloat16").model
    assert raw(again) == raw(half)
    assert raw(load_run(tmp_path / "wide")[0]) != raw(MODEL)  # control


def test_the_vocabulary_goes_with_it(tmp_path):
    text = "It was the best of times, it was the worst of times.\n" * 20
    (tmp_path / "book.txt").write_text(text)
    train_tokenizer(open_source([tmp_path / "book.txt"]), tmp_path / "bpe.json", 270)
    tokenizer = load_tokenizer(tmp_path / "bpe.json")
    info = dataclasses.replace(INFO, tokenizer=tokenizer.name)
    write(Carried(MODEL, info, tokenizer), tmp_path / "out", "")
    model, found = load(tmp_path / "out")
    assert found.name == tokenizer.name and raw(model) == raw(MODEL)
    (tmp_path / "out/tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json is gone: put it back"):
        load(tmp_path / "out")


def test_a_card_of_other_data_may_be_edited(out):
    """What people may not want to publish is not under the hash; sizes are."""
    path = out / "config.json"
    path.write_text(path.read_text().replace("book.txt", "a book"))
    assert load_run(out)[1].data.path == "a book"
    path.write_text(path.read_text().replace('"logit_scale": 1.0', '"logit_scale": 2.0'))
    with pytest.raises(ExportError, match=r"config.json beside it was changed"):
        load_run(out)


def test_models_that_are_not_finite_are_known():
    assert CARRIED.is_finite
    model = make_model()
    model.codebook["sum"][0, 0, 0] = np.nan
    assert not dataclasses.replace(CARRIED, model=model).is_finite


# ---------------------------------------------------------------- what is refused


def test_a_step_that_it_does_not_hold(out):
    with pytest.raises(RunError, match="holds an exported model of step 40, and not of step 30"):
        load(out, 30)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"steps": "many"}}, "steps is 'many'"),
        ({"data": None}, "of another version"),
        ({"model": {**MODEL.config.to_dict(), "d_new": 1}}, "unknown configuration field 'd_new'"),
        ({"step": "40"}, "in place of a value of type int"),
    ],
)
def test_damage_of_what_it_says(out, change, words):
    path = out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RunError, match=words):
        load_info(out)


def test_no_run_begins_there(out):
    with pytest.raises(RunError, match="holds an exported model, which cannot be trained on"):
        make_run_folder(out, resume=False)


def test_what_is_there_stays(out, tmp_path):
    before = (out / MODEL_FILE).read_bytes()
    with pytest.raises(ExportError, match="already holds an exported model"):
        write(CARRIED, out, "")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds notes.txt beside an exported model"):
        write(CARRIED, out, "", overwrite=True)
    os.remove(out / "notes.txt")
    other = Carried(make_model(seed=1), INFO)
    write(other, out, "", overwrite=True)
    assert raw(load_run(out)[0]) == raw(other.model) and not (out / "metrics.jsonl").exists()
    assert (out / MODEL_FILE).read_bytes() != before
    (tmp_path / "more.txt").write_text("")
    with pytest.raises(ExportError, match="is not empty, and holds no exported model"):
        require_free(tmp_path, overwrite=True)
    with pytest.raises(ExportError, match="Not a directory"):
        require_free(tmp_path / "more.txt")


def test_a_full_disk(out, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"new: No space left on device: free some space"):
        write(CARRIED, tmp_path / "new", "")
    with pytest.raises(ExportError, match="No space left"):
        write(Carried(make_model(seed=1), INFO), out, "", overwrite=True)
    assert raw(load_run(out)[0]) == raw(MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
