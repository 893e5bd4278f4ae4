"""`tvq score`: a text, its lines and its tokens, from options, files and pipes."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import make_run
from transformer_vq import (
    score,
)
from transformer_vq.cli import main
from transformer_vq.cli import score as score_module
from transformer_vq.data import Source, text_pieces, train_tokenizer
from transformer_vq.run.folder import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def scored(capsys, *arguments: str) -> list[dict]:
    """What `tvq score --json` prints, an object a line."""
    assert main(["score", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


TEXT = "It was, wäs,\n\n  and will be.\nno end"


def test_score_of_a_text_by_token_and_line(capsys, run):
    content = list(TEXT.encode())
    (expected,) = score(load_run(run)[0], [content])
    *tokens, total = scored(capsys, "--run", run, "--text", TEXT, "--per", "token")
    assert [token["token"] for token in tokens] == content
    assert tokens[0] == {"token": 73, "text": "I", "logprob": None} and expected[0] is None
    found = [token["logprob"] for token in tokens[1:]]
    np.testing.assert_allclose(found, expected[1:], atol=1e-4)
    nats = -sum(expected[1:])
    assert nats > 100
    assert total["tokens"] == total["bytes"] == len(content) == total["scored"] + 1
    assert total["characters"] == len(TEXT) == total["bytes"] - 1
    assert total["logprob"] == pytest.approx(-nats, rel=1e-5)
    assert total["bits_per_byte"] == pytest.approx(nats / np.log(2) / total["scored"], rel=1e-5)
    assert total["bits_per_character"] == pytest.approx(
        nats / np.log(2) / (len(TEXT) - 1), rel=1e-5
    )
    assert total["perplexity"] == pytest.approx(np.exp(nats / total["scored"]), rel=1e-4)

    *lines, again = scored(capsys, "--run", run, "--text", TEXT, "--per", "line")
    assert [line["text"] for line in lines] == TEXT.splitlines(keepends=True)
    assert [line["line"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["logprob"] for line in lines) == pytest.approx(again["logprob"])
    assert {**again, "seconds": 0} == {**total, "seconds": 0}
    start = len("It was, wäs,\n\n".encode())
    third = sum(expected[start : start + lines[2]["tokens"]])
    assert lines[2]["logprob"] == pytest.approx(third, rel=1e-4)


def test_score_in_words(capsys, run):
    (total,) = scored(capsys, "--run", run, "--text", TEXT)
    for per, lines in (("text", 0), ("line", 4 + 1), ("token", len(TEXT.encode()) + 1)):
        assert main(["score", "--run", run, "--text", TEXT, "--per", per]) == 0
        printed = capsys.readouterr().out
        assert f"  {total['bits_per_byte']:.4f} bits per byte   " in printed
        assert f"perplexity {total['perplexity']:.4f} per token" in printed
        assert printed.count("\n") == lines + 3
    assert "\n  -" in f"\n{printed}" and "   0xc3\n" in printed


def test_score_of_a_long_file(capsys, tmp_path, run, monkeypatch):
    """Read in pieces, compressed or not; any bytes."""
    monkeypatch.setattr(score_module, "CHUNK", 1024)
    monkeypatch.setattr(score_module, "text_pieces", lambda file: text_pieces(file, 700))
    content = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    (tmp_path / "text").write_bytes(content)
    (tmp_path / "text.gz").write_bytes(gzip.compress(content))
    (expected,) = score(load_run(run)[0], [list(content)])
    for name in ("text", "text.gz"):
        (total,) = scored(capsys, "--run", run, "--file", str(tmp_path / name))
        assert total["tokens"] == total["bytes"] == 5000
        assert total["characters"] == len(content.decode(errors="replace"))
        assert total["logprob"] == pytest.approx(sum(expected[1:]), rel=1e-5)


def test_score_goes_on_from_a_state(capsys, tmp_path, run):
    """Then the first token counts too."""
    state, prompt = str(tmp_path / "s.tvq"), tmp_path / "prompt"
    prompt.write_text(TEXT[:9])
    arguments = ["--prompt-file", str(prompt), "--save-state", state]
    assert main(["prefill", "--run", run, *arguments]) == 0
    capsys.readouterr()
    rest = ["--text", TEXT[9:], "--state", state, "--per", "token"]
    *after, total = scored(capsys, "--run", run, *rest)
    *whole, _ = scored(capsys, "--run", run, "--text", TEXT, "--per", "token")
    whole = [token["logprob"] for token in whole[9:]]
    np.testing.assert_allclose([token["logprob"] for token in after], whole, atol=1e-4)
    assert total["scored"] == total["tokens"] == len(TEXT[9:].encode())


@pytest.mark.slow
def test_score_with_a_vocabulary_and_full_attention(capsys, tmp_path):
    """Bits are of the text, not of tokens; a long text is more than one piece of 1,024."""
    source = Source.of(np.frombuffer(b"it was and it was not what it was " * 90, np.uint8))
    tokenizer = train_tokenizer(source, tmp_path / "tokenizer.json", 270)
    run = make_run(tmp_path / "run", tokenizer, attention="full")
    text = "it was not and\nit was so " * 120
    tokens = tokenizer.encode(text)
    assert 1024 < len(tokens) < len(text) / 1.5
    (path := tmp_path / "text").write_text(text)
    (expected,) = score(load_run(run)[0], [tokens])
    *lines, total = scored(capsys, "--run", run, "--file", str(path), "--per", "line")
    assert total["tokens"] == len(tokens) and total["bytes"] == len(text)
    assert total["logprob"] == pytest.approx(sum(expected[1:]), rel=1e-5)
    scored_bytes = len(text) - len(tokenizer.decode(tokens[:1]))
    bits = -sum(expected[1:]) / np.log(2)
    assert total["bits_per_byte"] == pytest.approx(bits / scored_bytes, rel=1e-5)
    assert [line["line"] for line in lines] == list(range(1, 122))
    assert sum(line["tokens"] for line in lines) == len(tokens)


@pytest.mark.parametrize(
    ("status", "arguments", "says"),
    [
        (2, [], "there is no text: give --text or --file"),
        (2, ["--text", "a", "--file", "b"], "--text and --file are both given"),
        (2, ["--text", "a", "--per", "word"], "--per is 'word': it must be one of"),
        (2, ["--text", "a"], "the text has 1 of the two tokens"),
        (2, ["--file", "empty"], "the text has 0 of the two tokens"),
        (1, ["--file", "gone"], "there is no file gone"),
        (1, ["--file", "."], ". is a directory: give a file"),
        (1, ["--file", "cut.gz"], "cannot read"),
        (1, ["--text", "ab", "--checkpoint", "7"], "there is no checkpoint of step 7"),
        (1, ["--text", "ab", "--state", "empty"], "not a state file"),
    ],
)
def test_score_refuses(capsys, tmp_path, monkeypatch, run, status, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("cut.gz").write_bytes(gzip.compress(b"some text " * 99)[:30])
    assert main(["score", "--run", run, *arguments]) == status
    printed = capsys.readouterr().err
    assert says in printed and printed.startswith("tvq: ") and printed.count("\n") == 1


def test_score_refuses_pictures(capsys, tmp_path):
    run = make_run(tmp_path / "run", image_shape=(2, 2, 1))
    assert main(["score", "--run", run, "--text", "some"]) == 2
    assert "is one of pictures: tvq eval scores those" in capsys.readouterr().err


def test_score_of_the_standard_input(run, user_env):
    """A real process, in a pipe."""
    tvq = [
        sys.executable,
        "-c",
        "import sys; from transformer_vq.cli import main; sys.exit(main())",
    ]
    command = [*tvq, "score", "--run", run, "--file", "-", "--json"]
    done = subprocess.run(command, input=TEXT.encode(), env=user_env, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (expected,) = score(load_run(run)[0], [list(TEXT.encode())])
    assert json.loads(done.stdout)["logprob"] == pytest.approx(sum(expected[1:]), rel=1e-5)


def test_pieces_of_a_text_are_whole():
    """They end with a line, or with a character; together they are the text."""
    for text in ("one\ntwo\nthree", "äöü€𝄞" * 20, "a" * 50, ""):
        content = text.encode()
        for size in (4, 5, 7, 100):
            pieces = list(text_pieces(io.BytesIO(content), size))
            assert b"".join(pieces) == content
            assert all(len(piece) <= size and piece.decode() for piece in pieces)
    assert list(text_pieces(io.BytesIO(b"one\ntwo\nthree"), 6)) == [b"one\n", b"two\n", b"three"]
    broken = b"\x80" * 9 + b"\xff" * 9  # no text: cut anywhere
    assert b"".join(text_pieces(io.BytesIO(broken), 4)) == broken
