"""Files of requests: what a line may be, and what is refused before anything is answered."""

import json

import pytest

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")

from transformer_vq.errors import UserError
from transformer_vq.serve import lines
from transformer_vq.serve.lines import RequestFile, seed_of


def write(folder, *rows):
    path = folder / "requests.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else row.encode() for row in rows))
    return path


def read(path, index=0, count=1, done=(), **options):
    with RequestFile(path, **options) as file:
        marks = bytearray(file.last + 1)
        for number in done:
            marks[number] = 1
        found = list(file.read(index, count, marks))
        if not done:
            assert len(found) == file.share(index, count)
    return [(line.number, line.custom_id, line.body) for line in found]


def test_all_forms_of_a_line(tmp_path):
    frame = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    rows = [
        "\ufeff" + json.dumps(frame),
        "",
        '{"prompt": "y", "n": 2}\r',
        '"z"',
        '{"body": {}, "custom_id": "é"}',
    ]
    path = write(tmp_path, *rows)
    expected = [
        (1, "a", {"prompt": "x"}),
        (3, "line-3", {"prompt": "y", "n": 2}),
        (4, "line-4", {"prompt": "z"}),
        (5, "é", {}),
    ]
    assert read(path) == expected
    assert read(path, done=[1, 4]) == [expected[1], expected[3]]
    assert read(path, 1, 3) == [expected[1]] and read(path, 0, 3) == [expected[0], expected[3]]
    assert read(path, 4, 5) == []
    texts = [
        prompt["prompt"] for _, _, prompt in read(write(tmp_path, '{"a', " b\r", ""), text=True)
    ]
    assert texts == ['{"a', " b"]


WRONG = [
    (['"a"', "{"], r"line 2 of .* is not JSON \(Expecting property name.*or give --text"),
    (['"a"', "Call me"], "line 2 of .* is not JSON"),
    (['"a"', b"\xff"], "line 2 of .* is not UTF-8"),
    (["[1]"], r"line 1 of .* is \[1\]: it must be a request as an object, or a prompt"),
    (["[" * 100_000], "line 1 of .* is not JSON"),
    (['{"custom_id": 7, "body": {}}'], "line 1 of .* has the custom_id 7: it must be a text"),
    (['{"custom_id": "a"}'], "line 1 of .* has no body: give the fields"),
    (['{"custom_id": "a", "prompt": "x"}'], "line 1 of .* has the field 'prompt' beside custom_id"),
    (['{"url": "/v1/chat/completions", "body": {}}'], "asks for 'POST' '/v1/chat/completions'"),
    (["", " "], "has no requests: write one a line"),
    (
        ['{"custom_id": "a", "body": {}}', '"x"', "", '{"custom_id": "a", "body": {"n": 1}}'],
        "lines 1 and 4 of .* have the same custom_id, 'a': give each its own",
    ),
    (['{"custom_id": "line-2", "body": {}}', '"x"'], "lines 1 and 2 of .* 'line-2'"),
]


@pytest.mark.parametrize(("rows", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_files_that_are_refused(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        RequestFile(write(tmp_path, *rows))


def test_no_file_of_requests(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is no regular file: requests are read twice"):
        RequestFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        RequestFile(tmp_path / "nothing")
    monkeypatch.setattr(lines, "MOST_BODY", 10)
    with pytest.raises(UserError, match=r"line 2 of .* has more than 10 bytes"):
        RequestFile(write(tmp_path, '"a"', '"0123456789"', '"b"'))


def test_a_file_that_changes_is_not_answered(tmp_path):
    path = write(tmp_path, '"a"', '"b"')
    with RequestFile(path) as file:
        left = file.read(0, 1, bytearray(3))
        assert next(left).custom_id == "line-1"
        path.write_text('"a"\n"c"\n')
        with pytest.raises(UserError, match="has changed while it was answered"):
            next(left)


def test_seeds_follow_the_request():
    seeds = {seed_of(seed, name) for seed in (0, 1) for name in ("a", "b", "\ud800")}
    assert len(seeds) == 6 and all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of(0, "a") == 3426273630  # a job that goes on with another version is the same job
