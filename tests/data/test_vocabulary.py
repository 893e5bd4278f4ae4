"""Vocabularies: made, read, kept with a run; text comes back as it was, never half a character."""

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.vocabularies import MADE_HERE, OTHERS, make_vocabularies
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
from transformer_vq.errors import UserError

BOOK = bundled_corpus().read_bytes()[:60_000].decode(errors="ignore")
load = functools.cache(load_tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_vocabularies(tmp_path_factory.mktemp("vocabularies"), BOOK)


# Text and back


TEXTS = [
    BOOK[:20_000],
    "“I — naïve\n\n\t 𝄞  é 日本 \x00 end ",
    "",
    " two  spaces ",
    "\n",
    "before<|endoftext|>after",
    "<|endoftext|>",
    "<s> </s> <unk> <0x41> <pad>",
    "▁ a▁b ▁▁",
]


@pytest.mark.parametrize("name", MADE_HERE)
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_made_here_loses_nothing(folder, name, text):
    tokenizer = load(folder / name)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.eos_id not in tokens and tokenizer.changes == ""


@pytest.mark.parametrize("name", MADE_HERE)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("▁ \n<|"))))
def test_any_text_comes_back(folder, name, text):
    tokenizer = load(folder / name)
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert tokenizer.encode_batch([text, "▁", text])[2] == tokenizer.encode(text)


@pytest.mark.parametrize("name", MADE_HERE)
def test_vocabularies_have_ends_starts_and_limits(folder, name):
    tokenizer = load(folder / name)
    assert len(tokenizer.encode(BOOK)) < 0.65 * len(BOOK)
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == b"a"
    assert tokenizer.decode([tokenizer.start_id]) == b"\n"
    with pytest.raises(ValueError, match="not UTF-8 at byte 2"):
        tokenizer.encode(b"ab\xff")
    with pytest.raises(ValueError, match="token 100000 at position 1 is outside"):
        tokenizer.decode([1, 100_000])


def test_an_end_is_added_where_there_is_none(folder):
    words = load(folder / "words.json")
    own = tokenizers.Tokenizer.from_file(str(folder / "words.json")).get_vocab_size()
    assert (words.eos_id, words.vocab_size) == (own, own + 1)
    bpe = load(folder / "bpe.json")
    assert (bpe.eos_id, bpe.vocab_size) == (0, 400)


@pytest.mark.parametrize("special", [True, False])
def test_the_letters_of_the_end_are_text(folder, tmp_path, special):
    """Also where the file does not call the end a special token; the others are as they were."""
    values = json.loads((folder / "llama.json").read_text())
    for token in values["added_tokens"]:
        token["special"] = special
    (tmp_path / "t.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.eos_id == 2
    tokens = tokenizer.encode("it</s>was")
    assert 2 not in tokens and tokenizer.decode(tokens) == b"it</s>was"
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert 2 in library.encode("it</s>was").ids  # control


CHANGES = {
    "default.model": "spaces at the ends or side by side, line breaks or tabs, accents, U+2581",
    "llama.json": "U+2581",
    "metaspace.json": "rare characters",
    "suffix.json": "punctuation",
    "words.json": "line breaks or tabs",
    "level.json": "spaces at the ends or side by side",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_vocabulary_changes_is_named(folder, name):
    assert CHANGES[name] in load(folder / name).changes
    assert load(folder / name).decode(load(folder / name).encode("I was a")) == b"I was a"


def test_an_end_that_is_a_word_is_named(folder):
    """Words of WordLevel are looked up, those of the end too."""
    assert "the letters </s>" in load(folder / "level.json").changes


@pytest.mark.parametrize("name", ["sp.model", "default.model", "llama.json"])
def test_a_byte_is_a_byte(folder, name):
    """Half a character is its bytes, and not U+FFFD; the rest is as the library has it."""
    tokenizer = load(folder / name)
    tokens = tokenizer.encode("it was 𝄞 日 and a")
    library = tokenizer._library
    assert tokenizer.decode(tokens).decode() == library.decode(tokens) == "it was 𝄞 日 and a"
    halves = [tokenizer.decode(tokens[:n]) for n in range(len(tokens))]
    whole = "it was 𝄞 日 and a".encode()
    assert all(whole.startswith(half) for half in halves)
    assert b"it was \xf0\x9d" in halves and b"it was \xf0\x9d\x84\x9e \xe6" in halves


# As it comes


@pytest.mark.parametrize("name", [*MADE_HERE, *OTHERS])
@given(data=st.data())
def test_streamed_text_is_the_text(folder, name, data):
    """Of any tokens, after any others; and no half character is shown but in the end."""
    tokenizer = load(folder / name)
    if data.draw(st.booleans()):
        tokens = tokenizer.encode(data.draw(st.text("a é—𝄞日\n▁ It", max_size=20)))
        valid = True
    else:
        tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        valid = False
    cut = data.draw(st.integers(0, len(tokens)))
    decoder = StreamDecoder(tokenizer, tokens[:cut])
    before, whole = tokenizer.decode(tokens[:cut]), tokenizer.decode(tokens)
    expected = whole[len(before) :].decode(errors="replace")
    for _ in range(2):
        pieces = [decoder.push(token) for token in tokens[cut:]]
        if valid and not cut:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + decoder.flush() == expected


@pytest.mark.parametrize("name", [*MADE_HERE, *OTHERS])
def test_the_space_after_a_prompt_is_kept(folder, name):
    tokenizer = load(folder / name)
    prompt, rest = tokenizer.encode("I was"), tokenizer.encode("I was a I")
    assert rest[: len(prompt)] == prompt
    for before in (prompt, None):  # None: a state, whose tokens nobody knows
        decoder = StreamDecoder(tokenizer, before)
        shown = "".join(decoder.push(token) for token in rest[len(prompt) :])
        assert shown + decoder.flush() == " a I"
    alone = tokenizer.decode_text(rest[len(prompt) :])  # control
    assert (alone == " a I") == (name in MADE_HERE)


def test_characters_come_whole(folder):
    tokenizer = load(folder / "bpe.json")
    tokens = tokenizer.encode("日")
    assert len(tokens) == 3  # a rare character is its bytes
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in tokens] == ["", "", "日"]
    assert tokenizer.decode_text(tokens[:1]) == "\ufffd"  # what is avoided


# Data


def test_the_split_is_the_same_text(folder):
    """Bits per byte of a split can be compared between vocabularies."""
    plain = open_source([folder / "book.txt"])
    for name in MADE_HERE:
        tokenizer = load(folder / name)
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
    tokenizer = load(folder / "bpe.json")
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
    tokenizer = load(folder / "bpe.json")
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
        ("a.model", b"", "a.model is empty: give a vocabulary"),
        ("A.JSON", b"{}", "is no vocabulary of tokenizer.json's kind: "),
    ],
)
def test_what_is_no_vocabulary(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "a.json")  # nobody writes to it: to read it is to wait for ever
    with pytest.raises(DataError, match=r"a.json is not a regular file"):
        load_tokenizer(tmp_path / "a.json")
    with pytest.raises(UserError, match="the vocabulary is None: it must be a path"):
        load_tokenizer(None)


def test_a_byte_order_mark_is_no_part_of_a_vocabulary(folder, tmp_path):
    """As editors of Windows put one before a text."""
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + (folder / "bpe.json").read_bytes())
    known = load(folder / "bpe.json")
    assert load_tokenizer(tmp_path / "a.json").encode("a b") == known.encode("a b")


def test_a_text_that_a_vocabulary_has_no_words_for_is_named(tmp_path):
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "\n": 2}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "a.json"))
    tokenizer = load_tokenizer(tmp_path / "a.json")
    assert tokenizer.encode("a b") == [0, 1]
    with pytest.raises(UserError, match=r"cannot express this text: .*Missing \[UNK\] token"):
        tokenizer.encode("a c")


# The vocabulary of a run


def test_bytes_have_nothing_to_keep(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert not list(tmp_path.iterdir()) and isinstance(run_tokenizer(tmp_path), ByteTokenizer)


def test_a_new_run_keeps_no_other_vocabulary(folder, tmp_path):
    """What an earlier start left, of whatever kind, is not taken for that of the run."""
    sorts = [load(folder / name) for name in ("bpe.json", "sp.model")]
    for before in (*sorts, ByteTokenizer()):
        for now in (ByteTokenizer(), *sorts):
            (out := tmp_path / "run").mkdir(exist_ok=True)
            before.save(out)
            keep_tokenizer(out, now)
            assert run_tokenizer(out, now.name).name == now.name
            assert len(list(out.iterdir())) == (now.name != "bytes")
            shutil.rmtree(out)


def test_another_vocabulary_than_that_of_the_run_is_refused(folder, tmp_path):
    """Lost, another of its kind, of another kind, or where there was none."""
    bpe, sp, llama = (load(folder / name) for name in ("bpe.json", "sp.model", "llama.json"))
    for kept, name, says in [
        (ByteTokenizer(), bpe.name, r"tokenizer.json is gone: put it back"),
        (sp, bpe.name, r"tokenizer.json is gone: put it back"),
        (llama, bpe.name, r"tokenizer.json is another vocabulary \(.*put its own back"),
        (bpe, "bytes", r"tokenizer.json is another .*\(bytes, .*remove the file"),
    ]:
        (out := tmp_path / "run").mkdir()
        kept.save(out)
        with pytest.raises(DataError, match=says) as caught:
            run_tokenizer(out, name)
        assert "\n" not in str(caught.value)
        assert run_tokenizer(out, kept.name).name == kept.name  # control
        for unknown in (None, "a name of the caller's own"):
            assert run_tokenizer(out, unknown).name == kept.name
        shutil.rmtree(out)
