"""Vocabularies at the command line: made by `tvq tokenizer train`, kept and used by a run."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import make_run
from transformer_vq import SamplingParams, generate
from transformer_vq.cli import main
from transformer_vq.data import (
    bundled_corpus,
    load_tokenizer,
    open_source,
    run_tokenizer,
    train_tokenizer,
)
from transformer_vq.run.folder import load_run
from transformer_vq.run.log import read_metrics

SIZES = [
    "--config.d-model=16",
    "--config.d-k=8",
    "--config.num-layers=1",
    "--config.codebook-size=8",
    "--config.block-len=32",
    "--config.window-len=16",
    "--train.batch-size=8",
    "--train.sequence-len=32",
    "--train.evaluate-tokens=500",
    "--train.log-every=1",
    "--steps=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A book, and a vocabulary of it."""
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "book.txt").write_bytes(bundled_corpus().read_bytes()[:60_000])
    train_tokenizer(open_source([folder / "book.txt"]), folder / "bpe.json", 500)
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """A run with a vocabulary of its own, made at the command line. Look, don't touch."""
    out = tmp_path_factory.mktemp("runs") / "run"
    vocabulary, data = out.parent / "tokenizer.json", ["--data", str(folder / "book.txt")]
    os.environ["TVQ_CACHE"] = ""
    make = ["tokenizer", "train", *data, "--out", str(vocabulary), "--vocab-size", "400"]
    assert main(make) == 0
    train = ["train", "--tokenizer", str(vocabulary), "--out", str(out), *SIZES]
    assert main([*train, *data]) == 0
    os.remove(vocabulary)
    return out


def answer(capsys, *arguments: str) -> dict:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_a_run_keeps_its_vocabulary(capsys, folder, run):
    tokenizer = run_tokenizer(run)
    model, info = load_run(run)
    assert tokenizer.vocab_size == model.config.vocab_size == 400
    assert info.tokenizer == tokenizer.name != load_tokenizer(folder / "bpe.json").name
    assert main(["info", "--run", str(run)]) == 0
    assert "tokenizer.json" in capsys.readouterr().out


@pytest.mark.slow
def test_bits_per_byte_are_of_the_text(capsys, folder, run):
    record = next(r for r in read_metrics(run / "metrics.jsonl") if "loss" in r)
    source = open_source([folder / "book.txt"], tokenizer=run_tokenizer(run))
    expected = record["loss"] / np.log(2) / source.split("train").bytes_per_token
    assert record["bpb"] == pytest.approx(expected)
    record = answer(capsys, "eval", "--run", str(run))
    assert 3 < record["bpb"] < 0.7 * record["loss"] / np.log(2)


@pytest.mark.slow
def test_resuming_needs_the_same_vocabulary(capsys, folder, run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    other = ["--tokenizer", str(folder / "bpe.json"), "--resume"]
    assert main(["train", "--out", str(out), *other]) == 2
    assert "bpe.json, another vocabulary than that of the run" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume"]) == 0
    (out / "tokenizer.json").unlink()
    assert main(["train", "--out", str(out), "--resume"]) == 1
    assert "tokenizer.json is gone: put it back" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tokenizer"], "say what to do: train"),
        (["tokenizer", "tran", "--data", "x", "--out", "y"], "one of train"),
        (["tokenizer", "train", "--out", "y.json"], "--data is missing"),
        (["tokenizer", "train", "--data", "x", "--out", "no/y.json"], "no such folder"),
        (["tokenizer", "train", "--data", "BOOK", "--out", "y.txt"], "must end with .json"),
        (["tokenizer", "train", "--data", "BOOK", "--out", "y.json", "--vocab-size", "9"], "257"),
        (["tokenizer", "train", "--data", "BOOK", "--out", "y.model", "--vocab-size", "9"], "9"),
        (
            [
                "tokenizer",
                "train",
                "--data",
                "BOOK",
                "--out",
                "y.json",
                "--vocab-size",
                "2147483648",
            ],
            "2147483648: it must be a whole number from 1 to 10000000",
        ),
        (["train", "--data", "BOOK", "--out", "r", "--tokenizer", "no.json"], "no file no.json"),
    ],
)
def test_wrong_options(folder, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    arguments = [str(folder / "book.txt") if a == "BOOK" else a for a in arguments]
    assert main(arguments) in (1, 2)
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_sample_draws_what_the_vocabulary_has(folder, tmp_path, capsys):
    """Where the model has more tokens than the vocabulary; what cannot be drawn can be shown."""
    tokenizer = load_tokenizer(folder / "bpe.json")
    size = tokenizer.vocab_size
    run = make_run(tmp_path / "run", tokenizer, vocab_size=2 * size)
    ask = ["sample", "--run", run, "--prompt", "It", "--max-tokens", "60", "--temperature", "9"]
    assert main([*ask, "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert len(sample["tokens"]) == 60 and max(sample["tokens"]) < size
    assert sample["text"] == tokenizer.decode_text(sample["tokens"])
    model, prompt = load_run(run)[0], tokenizer.encode("It")
    (drawn,) = generate(model, [prompt], SamplingParams(max_tokens=60, temperature=9))
    assert max(drawn) >= size  # control
    assert main([*ask, "--logprobs"]) == 0
    assert re.search(r" <\d{3,}> 0\.", capsys.readouterr().out)
