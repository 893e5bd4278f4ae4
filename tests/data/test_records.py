"""Lines and rows: what is broken in them is named in a short sentence, and can be skipped."""

import io
import json
import os
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from transformer_vq.data import DataError, open_source, records

GOOD = '{"text": "good"}\n'

LINES = {
    "deep": ('{"text": "x", "m": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    "keys": (json.dumps({f"key {i}" * 20: i for i in range(5000)}), r"and 4,992 more \(choose"),
    "long value": (json.dumps({"text": ["x"] * 5000}), r"line 2 has 'text' \['x', .*which is no"),
    "zeros": ("\0\0\0\0", "line 2 is not JSON"),
    "surrogate": ('{"text": "\\ud800"}', "line 2 holds half a surrogate pair"),
    "list": ("[1]", "line 2 is a JSON list"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_broken_line_is_a_short_sentence(tmp_path, name):
    line, says = LINES[name]
    (path := tmp_path / "a.jsonl").write_text(GOOD + line + "\n" + GOOD)
    with pytest.raises(DataError, match=says) as caught:
        open_source([path])
    assert len(str(caught.value)) < 1500 + len(str(path))
    source = open_source([path], on_error="skip")
    assert source.tokens.tobytes() == b"\0good\0good"
    assert source.notes[0].startswith(f"skipped 1 broken record: {path}, line 2 ")


LENIENT = {
    "a large integer": '{"text": "good", "n": %s}' % ("9" * 5000),
    "a BOM": "\N{ZERO WIDTH NO-BREAK SPACE}" + GOOD.strip(),
    "CRLF": GOOD.strip() + "\r",
    "constants": '{"text": "good", "n": NaN, "m": -Infinity}',
    "UTF-16's look": '{"text":\0"good"}'.replace("\0", " " * 3),
}


@pytest.mark.parametrize("name", LENIENT)
def test_what_is_no_fault_of_a_line(tmp_path, name):
    (path := tmp_path / "a.jsonl").write_bytes((LENIENT[name] + "\n" + GOOD).encode())
    assert open_source([path]).tokens.tobytes() == b"\0good\0good"


def test_a_line_without_end_is_left_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LONGEST_LINE", 100)
    monkeypatch.setattr(records, "_CHECKED", 16)
    (path := tmp_path / "a.jsonl").write_text(GOOD + json.dumps({"text": "x" * 500}) + "\n" + GOOD)
    with pytest.raises(DataError, match="line 2 is longer than 100 bytes"):
        open_source([path])
    assert open_source([path], on_error="skip").tokens.tobytes() == b"\0good\0good"


def table(**columns: object) -> bytes:
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content)
    return content.getvalue()


def test_text_of_a_table_that_is_no_utf8(tmp_path):
    """Row by row; a column of bytes is taken as it is."""
    cells = pyarrow.array([b"good", b"\xff bad", b"more"])
    (path := tmp_path / "a.parquet").write_bytes(table(text=cells.view(pyarrow.string())))
    with pytest.raises(DataError, match="row 2 has text that is no UTF-8 at byte 0"):
        open_source([path])
    assert open_source([path], on_error="skip").tokens.tobytes() == b"\0good\0more"
    path.write_bytes(table(text=cells))
    assert open_source([path]).tokens.tobytes() == b"\0good\0\xff bad\0more"


@pytest.mark.parametrize("kind", ["plain", "large", "dictionary"])
def test_kinds_of_text_in_a_table(tmp_path, kind):
    cells = pyarrow.array(["good", "é"])
    if kind == "large":
        cells = cells.cast(pyarrow.large_string())
    if kind == "dictionary":
        cells = cells.dictionary_encode()
    (path := tmp_path / "a.parquet").write_bytes(table(text=cells))
    assert open_source([path]).tokens.tobytes() == "\0good\0é".encode()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"text": [["a"], ["b"]]}, r"row 1 has 'text' \['a'\], which is no text"),
        ({"text": [{"a": 1}]}, r"row 1 has 'text' \{'a': 1\}, which is no text"),
        ({f"c{i}": [1] for i in range(100)}, r"has no column 'text': it has 'c0', .* and 92 more"),
    ],
)
def test_tables_without_text(tmp_path, columns, says):
    (path := tmp_path / "a.parquet").write_bytes(table(**columns))
    with pytest.raises(DataError, match=says):
        open_source([path])


SEEDS = {
    "a.jsonl": (GOOD * 3 + '{"text": "é", "n": [1, {"m": null}]}\n').encode(),
    "a.parquet": table(text=["good", "é"] * 20),
}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 2**20) | st.none(),
    st.sampled_from(["stop", "skip"]),
)
def test_any_damage_is_a_data_error(tmp_path_factory, name, changes, end, on_error):
    content = bytearray(SEEDS[name])
    for place, value in changes:
        content[place % len(content)] = value
    path: Path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content if end is None else content[: end % len(content)])
    try:
        assert len(open_source([path], on_error=on_error).tokens)
    except DataError as error:
        assert len(str(error)) < 1000 + 2 * len(os.fspath(path))
