"""Vocabularies: made, read, kept with a run; text comes back as it was, never half a character."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import make_run
from transformer_vq import ModelConfig, SamplingParams, TrainConfig, generate, init_model
from transformer_vq.cli import main
from transformer_vq.cli.stops import TextStops
from transformer_vq.data import (
    ByteTokenizer,
    DataError,
    Source,
    StreamDecoder,
    bundled_corpus,
    keep_tokenizer,
    load_tokenizer,
    open_source,
    run_tokenizer,
    train_tokenizer,
)
from transformer_vq.run import loop
from transformer_vq.run.folder import DataSource, RunInfo, load_run
from transformer_vq.run.log import read_metrics
from transformer_vq.run.samples import open_samples

BOOK = bundled_corpus().read_bytes()[:150_000].decode(errors="ignore")
HARD = "“I — naïve\n\n\t 𝄞  é 日本 \x00 end "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A book, and vocabularies: byte-level BPE, SentencePiece, words without a decoder."""
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "book.txt").write_text(BOOK)
    source = open_source([folder / "book.txt"])
    train_tokenizer(source, folder / "bpe.json", 500)
    train_tokenizer(source, folder / "sp.model", 500)
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )
    words.train_from_iterator([BOOK[:20_000]], trainer)
    words.save(str(folder / "words.json"))
    return folder


NAMES = ["bpe.json", "sp.model", "words.json"]


@pytest.mark.parametrize("name", NAMES[:2])
def test_what_is_made_here_loses_nothing(folder, name):
    tokenizer = load_tokenizer(folder / name)
    for text in (BOOK[:20_000], HARD, "", " two  spaces ", "\n"):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text.encode()
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert len(tokenizer.encode(BOOK)) < 0.6 * len(BOOK)
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == b"a"
    assert tokenizer.decode([tokenizer.start_id]) == b"\n"
    with pytest.raises(ValueError, match="not UTF-8 at byte 2"):
        tokenizer.encode(b"ab\xff")
    with pytest.raises(ValueError, match="token 100000 at position 1 is outside"):
        tokenizer.decode([1, 100_000])


def test_an_end_is_added_where_there_is_none(folder):
    words = load_tokenizer(folder / "words.json")
    own = tokenizers.Tokenizer.from_file(str(folder / "words.json")).get_vocab_size()
    assert (words.eos_id, words.vocab_size) == (own, own + 1)
    bpe = load_tokenizer(folder / "bpe.json")
    assert (bpe.eos_id, bpe.vocab_size) == (0, 500)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_streamed_text_is_the_text(folder, name, data):
    """Also of random tokens; and no half character is ever shown but in the end."""
    tokenizer = _loaded(folder / name)
    if data.draw(st.booleans()):
        tokens = tokenizer.encode(data.draw(st.text("a é—𝄞日\n", max_size=20)))
        valid = True
    else:
        tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        valid = False
    decoder = StreamDecoder(tokenizer)
    for _ in range(2):
        pieces = [decoder.push(token) for token in tokens]
        if valid:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + decoder.flush() == tokenizer.decode_text(tokens)


_cache: dict[Path, object] = {}


def _loaded(path: Path):
    return _cache.setdefault(path, load_tokenizer(path))


def test_characters_come_whole(folder):
    tokenizer = load_tokenizer(folder / "bpe.json")
    tokens = tokenizer.encode("日")
    assert len(tokens) == 3  # a rare character is its bytes
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in tokens] == ["", "", "日"]
    assert tokenizer.decode_text(tokens[:1]) == "\ufffd"  # what is avoided


def test_the_split_is_the_same_text(folder):
    """Bits per byte of a split can be compared between vocabularies."""
    plain = open_source([folder / "book.txt"])
    for name in NAMES[:2]:
        tokenizer = load_tokenizer(folder / name)
        source = open_source([folder / "book.txt"], tokenizer=tokenizer)
        assert source.tokens.dtype == np.uint16
        for part in ("train", "validation", "test"):
            mine, bytes_ = source.split(part), plain.split(part)
            text = tokenizer.decode(mine.tokens)
            assert mine.num_bytes == len(text) and abs(len(text) - len(bytes_.tokens)) < 4
            assert text[8:-8] in bytes_.tokens.tobytes()
            assert mine.bytes_per_token == len(text) / len(mine.tokens)
        assert source.num_bytes == plain.num_bytes


def test_long_documents_in_pieces(folder, monkeypatch):
    """Pieces change no text; documents begin where they begin."""
    tokenizer = load_tokenizer(folder / "bpe.json")
    texts = [BOOK[:5000], "日" * 400, BOOK[:300].replace("\n", " ")]
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr("transformer_vq.data.prepare._PIECE", 100)
    source = open_source([path], tokenizer=tokenizer)
    assert (source.tokens[source.starts] == tokenizer.eos_id).all() and len(source.starts) == 3
    assert tokenizer.decode(source.tokens).decode() == "".join(texts)
    pieces = np.split(source.tokens, source.starts[1:])
    assert [tokenizer.decode_text(piece) for piece in pieces] == texts


def test_bytes_that_are_no_text_are_named(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "bpe.json")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes("é".encode() * 50 + b"\xe9 latin")
    with pytest.raises(DataError, match=r"bad.txt is not UTF-8 at byte 100, .*or train on bytes"):
        open_source([tmp_path], tokenizer=tokenizer)
    source = open_source([tmp_path], tokenizer=tokenizer, on_error="skip")
    assert tokenizer.decode(source.tokens) == b"good" and "bad.txt" in source.notes[0]
    with pytest.raises(DataError, match="is not UTF-8, say at "):
        train_tokenizer(Source.of(np.arange(256).astype(np.uint8)), tmp_path / "t.json", 300)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "is no vocabulary: give a tokenizer.json"),
        ("a.json", b"{}", "is no vocabulary of tokenizer.json's kind: "),
        ("a.json", b"\xff", "is no vocabulary of tokenizer.json's kind: "),
        ("a.model", b"nonsense", "is no vocabulary of tokenizer.model's kind: "),
        ("a.model", None, "there is no file"),
    ],
)
def test_what_is_no_vocabulary(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_stop_texts():
    def run(pieces: list[str], *stops: str) -> tuple[str, bool]:
        found = TextStops(stops)
        out = ""
        for piece in pieces:
            out += found.push(piece)
            if found.found:
                break
        return out + found.flush("?"), found.found

    assert run(["one t", "wo th", "ree"], "two") == ("one ", True)
    assert run(["one t", "wo th", "ree"], "tree", "o tt") == ("one two three?", False)
    assert run(["aab", "aaba", "ac"], "aabaac", "x") == ("aab", True)
    assert run(["a", "b"]) == ("ab?", False)


# The command line

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


@pytest.mark.slow
def test_a_run_keeps_its_vocabulary(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TVQ_CACHE", "")
    vocabulary, out = tmp_path / "tokenizer.json", tmp_path / "run"
    data = ["--data", str(folder / "book.txt")]
    make = ["tokenizer", "train", *data, "--out", str(vocabulary), "--vocab-size", "400"]
    assert main(make) == 0
    assert "400 tokens, made of " in capsys.readouterr().out
    train = ["train", "--tokenizer", str(vocabulary), "--out", str(out), *SIZES]
    assert main([*train, *data]) == 0
    assert "tokens (tokenizer.json " in capsys.readouterr().out
    os.remove(vocabulary)

    tokenizer = run_tokenizer(out)
    model, info = load_run(out)
    assert tokenizer.vocab_size == model.config.vocab_size == 400
    assert info.tokenizer == tokenizer.name != load_tokenizer(folder / "bpe.json").name
    record = next(r for r in read_metrics(out / "metrics.jsonl") if "loss" in r)
    part = open_source([folder / "book.txt"], tokenizer=tokenizer).split("train")
    assert record["bpb"] == pytest.approx(record["loss"] / np.log(2) / part.bytes_per_token)

    assert main(["eval", "--run", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 3 < record["bpb"] < 0.7 * record["loss"] / np.log(2)
    ask = ["sample", "--run", str(out), "--prompt", "“It was", "--max-tokens", "30"]
    assert main([*ask, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (sample,) = answer["samples"]
    assert answer["prompt_tokens"] == len(tokenizer.encode("“It was")) < len("“It was".encode())
    assert sample["text"] == tokenizer.decode_text(sample["tokens"]) and len(sample["tokens"]) == 30
    stop = sample["text"][10:12]
    assert main([*ask, "--stop", stop, "--json"]) == 0
    (short,) = json.loads(capsys.readouterr().out)["samples"]
    assert short["text"] == sample["text"].partition(stop)[0] and short["stopped"]
    assert short["tokens"] == sample["tokens"][: len(short["tokens"])]
    assert main(["sample", "--run", str(out), "--max-tokens", "3"]) == 0
    assert main(["info", "--run", str(out)]) == 0
    assert "tokenizer.json" in capsys.readouterr().out

    assert main(["train", "--out", str(out), "--resume"]) == 0
    other = ["--tokenizer", str(folder / "bpe.json"), "--resume"]
    assert main(["train", "--out", str(out), *other]) == 2
    assert "bpe.json, another vocabulary than that of the run" in capsys.readouterr().err
    damaged = shutil.copytree(out, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")
    assert main(["sample", "--run", str(damaged)]) == 1
    assert "is no vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tokenizer"], "train"),
        (["tokenizer", "tran", "--data", "x", "--out", "y"], "one of train"),
        (["tokenizer", "train", "--data", "x", "--out", "no/y.json"], "no such folder"),
        (["tokenizer", "train", "--data", "BOOK", "--out", "y.txt"], "must end with .json"),
        (["tokenizer", "train", "--data", "BOOK", "--out", "y.json", "--vocab-size", "9"], "257"),
        (["tokenizer", "train", "--data", "BOOK", "--out", "y.model", "--vocab-size", "9"], "9"),
        (["train", "--data", "BOOK", "--out", "r", "--tokenizer", "no.json"], "no file no.json"),
    ],
)
def test_wrong_options(folder, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TVQ_CACHE", "")
    arguments = [str(folder / "book.txt") if a == "BOOK" else a for a in arguments]
    assert main(arguments) in (1, 2)
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_bytes_have_nothing_to_keep(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert not list(tmp_path.iterdir()) and isinstance(run_tokenizer(tmp_path), ByteTokenizer)


def test_a_new_run_keeps_no_other_vocabulary(folder, tmp_path):
    """What an earlier start left, of whatever kind, is not taken for that of the run."""
    sorts = [load_tokenizer(folder / name) for name in ("bpe.json", "sp.model")]
    for before in (*sorts, ByteTokenizer()):
        for now in (ByteTokenizer(), *sorts):
            (out := tmp_path / "run").mkdir(exist_ok=True)
            before.save(out)
            keep_tokenizer(out, now)
            assert run_tokenizer(out).name == now.name
            assert len(list(out.iterdir())) == (now.name != "bytes")
            shutil.rmtree(out)


def test_train_replaces_the_vocabulary_of_an_earlier_start(folder, tmp_path):
    """In a folder without checkpoints; one that the caller answers for stays."""
    config = ModelConfig(d_model=16, d_k=8, num_layers=1, codebook_size=8, window_len=8)
    train = TrainConfig(batch_size=8, sequence_len=16, steps=1, evaluate_every=0)
    tokens, vocabulary = np.zeros(50, np.uint8), load_tokenizer(folder / "bpe.json")
    for name, kept in (("", "bytes"), ("mine", vocabulary.name)):
        (out := tmp_path / f"run{name}").mkdir()
        vocabulary.save(out)
        loop.train(config, train, tokens, None, out, tokenizer=name)
        assert run_tokenizer(out).name == kept


def test_sample_draws_what_the_vocabulary_has(folder, tmp_path, monkeypatch, capsys):
    """Where the model has more tokens than the vocabulary; what cannot be drawn can be shown."""
    monkeypatch.setenv("TVQ_CACHE", "")
    for name in (None, "bpe.json"):
        tokenizer = load_tokenizer(folder / name) if name else ByteTokenizer()
        size = tokenizer.vocab_size
        run = make_run(tmp_path / f"run{name}", tokenizer, vocab_size=2 * size)
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


def test_samples_of_a_run_are_of_its_vocabulary(tmp_path):
    """The same in training, as long as the tokens are those of the vocabulary."""
    config = ModelConfig(
        vocab_size=4096, d_model=16, d_k=8, num_layers=1, codebook_size=8, window_len=8
    )
    train = TrainConfig(batch_size=1, sequence_len=16, sample_tokens=40)
    model, texts = init_model(config, 0), {}
    for name, top in (("bytes", 255), ("others", 4000)):
        validation = Source.of(np.linspace(0, top, 30).astype(np.int32))
        info = RunInfo(config, train, DataSource.of("", validation))
        folder = tmp_path / name
        folder.mkdir()
        with open_samples(folder, info, validation, lambda tokens: f"{tokens}") as samples:
            samples.write(1, model, lambda: None)
        record = json.loads((folder / "samples.jsonl").read_text())
        texts[name] = [int(token) for token in re.findall(r"\d+", record["text"])]
    assert len(texts["bytes"]) >= 40 and max(texts["bytes"]) < 256
    assert max(texts["others"]) >= 256  # control
