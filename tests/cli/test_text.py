"""Text of the command line, and for terminals."""

import pytest

from transformer_vq.cli.text import broken, printable, show_bytes, unescape


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"a\n\tb\\n\x", "a\n\tb\\n\\x"),
        (r"\r\n", "\r\n"),
        (r"\0\e\a\b\f\v", "\0\x1b\a\b\f\v"),
        (r"\x41\xc3\xa9\u20ac\U0001d11e", "Aé€𝄞"),
        (r"\xff", "\udcff"),  # a byte that is no text, as in arguments
        (r"\ud800\U00110000\q\u12", r"\ud800\U00110000\q\u12"),  # nothing
        ("é\\", "é\\"),
    ],
)
def test_escapes(typed, meant):
    assert unescape(typed) == meant


def test_control_characters_are_shown():
    assert printable("a\tb\n\x1b[2J\x7f\x9bé") == "a\tb\n^[[2J^?\ufffdé"


def test_bytes_are_shown():
    assert [show_bytes(b) for b in (b" it", "é".encode(), b"\xc3", b"\n", b"")] == [
        "' it'", "'é'", "0xc3", "0x0a", "''"
    ]  # fmt: skip


def test_long_lines_break_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    line = "data: a/path/of/more/than/thirty/characters, 60,000 bytes, of which 54,000 to train on"
    lines = broken(line).split("\n")
    assert [word for part in lines for word in part.split()] == line.split()
    assert all(len(part) <= 30 or len(part.split()) == 1 for part in lines) and len(lines) == 4
