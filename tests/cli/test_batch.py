"""`tvq batch` where it cannot: one sentence, before the model is loaded. The rest: tests/serve."""

import pytest

from tests.helpers import fails

pytest.importorskip("pydantic", reason="NOT TESTED: the extra serve is not installed")


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--slots", "0"], 2, "--slots is 0: it must be"),
        (["--seed", "-1"], 2, "--seed is -1: it must be"),
        (["--shard", "4/4"], 2, "--shard is '4/4': it must be I/N, with I from 0 to N - 1"),
        (["--shard", "1"], 2, "--shard is '1': it must be I/N"),
        (["--body", "x"], 2, "--body is 'x': it must be a JSON object, such as"),
        (["--body", "[]"], 2, "--body is '[]': it must be a JSON object"),
        (["--body", '{"foo": 1}'], 2, "--body: there is no field foo: leave it out"),
        (["--body", '{"stream": true}'], 2, "--body: stream is true, and an answer in a file"),
        (["--run", "nothing"], 1, "there is no run folder nothing: name one that was trained"),
        (["--input", "nothing"], 1, "cannot use nothing: No such file"),
        (["--input", "run"], 1, "run is no regular file: requests are read twice"),
        ([], 1, "line 2 of requests is not JSON"),
        (["--text"], 1, "run"),  # the requests are, and the run is none
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, options, status, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "requests").write_text('"a"\nb\n')
    given = {"--run": "run", "--input": "requests", "--out": "answers"}
    for name in given.keys() & set(options):
        del given[name]
    rest = [word for pair in given.items() for word in pair]
    assert words in fails(capsys, status, "batch", *rest, *options)
    assert not (tmp_path / "answers").exists()
