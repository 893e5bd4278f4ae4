"""Runs with a vocabulary at the command line: spaces are kept; no other vocabulary is used."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import fails, make_run, sample
from tests.vocabularies import make_vocabularies
from transformer_vq.cli import main
from transformer_vq.data import bundled_corpus, load_tokenizer
from transformer_vq.run import folder as run_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    text = bundled_corpus().read_bytes()[:60_000].decode(errors="ignore")
    return make_vocabularies(tmp_path_factory.mktemp("vocabularies"), text)


@pytest.fixture(scope="module")
def tokenizer(folder):
    """One that leaves out the space before a text."""
    return load_tokenizer(folder / "llama.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer) -> str:
    return make_run(tmp_path_factory.mktemp("runs") / "run", tokenizer)


ASK = ["--prompt", "It was", "--max-tokens", "24"]


def test_text_goes_on_from_the_prompt(capsys, tmp_path, run, tokenizer):
    """In JSON and on the terminal; after a state, whose text nobody knows, too."""
    words = {str(tokenizer.encode(word)[0]) for word in ["a", "I", "was", "the", "of", "and", "in"]}
    only = ["--max-tokens", "4", "--allowed-tokens", *sorted(words)]
    state = str(tmp_path / "state")
    record = sample(capsys, run, "--prompt", "It was", *only)
    whole = tokenizer.decode_text([*tokenizer.encode("It was"), *record["tokens"]])
    assert record["text"] == whole.removeprefix("It was") and record["text"].startswith(" ")
    assert record["text"] == " " + tokenizer.decode_text(record["tokens"])  # what is avoided
    assert main(["sample", "--run", run, "--prompt", "It was", *only, "--logprobs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("' ") for line in lines)
    save = ["--save-state", state]
    assert sample(capsys, run, "--prompt", "It was", *only, *save)["text"].startswith(" ")
    assert sample(capsys, run, "--state", state, *only)["text"].startswith(" ")


def test_stop_texts_with_a_vocabulary(capsys, run, tokenizer):
    """The text ends before them, and so do the tokens; `min_tokens` are kept in any case."""
    whole = sample(capsys, run, *ASK, "--seed", "1")
    stop = whole["text"][9:11]
    end = whole["text"].index(stop)
    short = sample(capsys, run, *ASK, "--seed", "1", "--stop", stop)
    assert short["text"] == whole["text"][:end] and short["stopped"]
    assert short["tokens"] == whole["tokens"][: len(short["tokens"])]
    prompt = tokenizer.encode("It was")
    kept = tokenizer.decode_text([*prompt, *short["tokens"]]).removeprefix("It was")
    assert short["text"].startswith(kept)
    longer = sample(capsys, run, *ASK, "--seed", "1", "--stop", stop, "--min-tokens", "20")
    assert len(longer["tokens"]) >= 20 and longer["text"].startswith(short["text"] + stop)


def test_scores_show_tokens_as_they_stand(capsys, run):
    text = "It was 日 a whale"
    assert main(["score", "--run", run, "--text", text, "--per", "token", "--json"]) == 0
    *tokens, total = map(json.loads, capsys.readouterr().out.splitlines())
    shown = "".join(token["text"] for token in tokens)
    assert shown.replace("\ufffd", "") == text.replace("日", "")
    assert any(token["text"].startswith(" ") for token in tokens)
    assert total["bytes"] == len(text.encode())
    assert main(["score", "--run", run, "--text", "😀", "--json"]) == 0
    total = json.loads(capsys.readouterr().out)
    scored = -total["logprob"] / np.log(2)
    first = len("😀".encode()) - total["scored"]  # the space before it, or its first byte
    assert total["bits_per_byte"] == pytest.approx(scored / (4 - max(first, 0)))


def test_the_vocabulary_of_the_run_is_needed(capsys, tmp_path, folder, run):
    """Lost, or another one: nothing goes on with what is there."""
    (text := tmp_path / "page.txt").write_text("It was a whale. " * 20)
    lost, other = tmp_path / "lost", tmp_path / "other"
    for out in (lost, other):
        shutil.copytree(run, out)
    (lost / "tokenizer.json").unlink()
    shutil.copy(folder / "bpe.json", other / "tokenizer.json")
    state = str(tmp_path / "state")
    for command in (
        ["sample", "--prompt", "It"],
        ["score", "--text", "It was"],
        ["prefill", "--prompt-file", str(text), "--save-state", state],
        ["eval", "--data", str(text), "--split", "all"],
    ):
        name, *options = command
        assert "tokenizer.json is gone" in fails(capsys, 1, name, "--run", str(lost), *options)
        said = fails(capsys, 1, name, "--run", str(other), *options)
        assert "tokenizer.json is another vocabulary" in said and "put its own back" in said
    assert not Path(state).exists()


def test_a_diverged_model_says_so(capsys, tmp_path, monkeypatch, run):
    """And neither NUL characters nor the NaN of no JSON."""
    load_run = run_folder.load_run

    def diverged(*arguments):
        model, info = load_run(*arguments)
        return jax.tree.map(lambda x: x * np.float32(np.nan), model), info

    monkeypatch.setattr(run_folder, "load_run", diverged)
    (prompt := tmp_path / "prompt").write_text("It was")
    for command in (
        ["sample", "--prompt", "It", "--json"],
        ["sample", "--prompt", "It", "--repetition-penalty", "2"],
        ["score", "--text", "It was", "--json"],
        ["prefill", "--prompt-file", str(prompt), "--save-state", str(tmp_path / "state")],
    ):
        name, *options = command
        capsys.readouterr()
        assert "its training diverged" in fails(capsys, 1, name, "--run", run, *options)
    assert not (tmp_path / "state").exists()
