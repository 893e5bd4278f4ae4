"""Jobs over a scheduler without a model: no answer lost or doubled, whatever ends the process."""

import errno
import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.fakes import Alphabet, Failing, loaded
from transformer_vq.engine.engine import Engine
from transformer_vq.errors import UserError
from transformer_vq.serve.answers import AnswerFile
from transformer_vq.serve.job import Job
from transformer_vq.serve.lines import RequestFile, seed_of
from transformer_vq.serve.service import Service


class Killed(Exception):
    """The end of a process."""


class Dying(AnswerFile):
    """Is killed in the middle of an answer, after some more."""

    def add(self, *answer):
        self.left -= 1
        if self.left >= 0:
            return super().add(*answer)
        if self.left == -1:
            before = self._size
            super().add(*answer)
            os.truncate(self._number, before + self.torn % (self._size - before))
        raise Killed


def engine_of(make, max_queue):
    service = Service()

    def load():
        loaded(service)
        service.loaded = service.loaded.__class__(**{**vars(service.loaded), "capacity": None})
        return make()

    return service, Engine(load, service.deliver, max_queue=max_queue)


def answer(
    folder, *, make=Alphabet, engines=1, death=None, tell=None, model="c" * 64, options="b" * 64
):
    """Answer what is left of a folder's requests: what `Job.run` gives."""
    with RequestFile(folder / "requests") as requests:
        kind = AnswerFile if death is None else Dying
        with kind(folder / "answers", requests, options=options, model=model) as answers:
            if death is not None:
                answers.left, answers.torn = death
            pairs = [engine_of(make, max_queue=2) for _ in range(engines)]
            job = Job(
                requests.read(0, 1, answers.done),
                answers,
                pairs,
                depth=4,
                defaults={"max_tokens": 4},
                seed=3,
                keeps_states=False,
                tell=tell or (lambda tokens: None),
            )
            try:
                return job.run()
            finally:
                assert all(engine.close(30) for _, engine in pairs)


def found(folder):
    """The answers by id. They are whole, and none is there twice."""
    content = (folder / "answers").read_text()
    assert content == "" or content.endswith("\n")
    by_id = {}
    for line in content.splitlines():
        value = json.loads(line)
        assert value["custom_id"] not in by_id and value["error"] is None
        value["response"]["body"].pop("created", None)  # the time
        by_id[value["custom_id"]] = value
    return by_id


def write(folder, *bodies):
    rows = [{"custom_id": f"q{i}", "body": body} for i, body in enumerate(bodies)]
    (folder / "requests").write_text("".join(json.dumps(row) + "\n" for row in rows))


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    deaths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**6)), max_size=4),
    engines=st.integers(1, 2),
)
def test_killed_at_any_moment_is_unbroken(sizes, deaths, engines):
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name, "whole"), Path(name, "broken")
        for folder in (whole, broken):
            folder.mkdir()
            write(folder, *({"prompt": "A", "max_tokens": n, "logprobs": 1} for n in sizes))
        assert answer(whole) == 0
        expected = found(whole)
        assert set(expected) == {f"q{i}" for i in range(len(sizes))}
        for death in deaths:
            try:
                answer(broken, death=death, engines=engines)
            except Killed:
                ids = [json.loads(line)["custom_id"] for line in whole_lines(broken)]
                assert len(set(ids)) == len(ids) == len(whole_lines(broken))
        assert answer(broken, engines=engines) == 0
        assert found(broken) == expected


def whole_lines(folder):
    return (folder / "answers").read_bytes().split(b"\n")[:-1]


def test_what_an_answer_is(tmp_path):
    """OpenAI's form; errors are those of the server, and end nothing but their line."""
    bodies = [
        {"prompt": "A"},
        {"prompt": "A", "foo": 1},
        {"prompt": "A", "stream": True},
        {"prompt": "A", "save_state": "x"},
        {"prompt": "A", "state": "x"},
        {"prompt": "A", "model": "gpt"},
        {"prompt": "A", "seed": 9, "max_tokens": 2, "logprobs": 0},
    ]
    write(tmp_path, *bodies)
    told = []
    assert answer(tmp_path, tell=told.append) == 0
    answers = found(tmp_path)
    response = answers["q0"]["response"]
    assert response["status_code"] == 200 and answers["q0"]["id"].endswith(f"-{'c' * 12}-1")
    body = response["body"]
    assert body["choices"][0]["text"] == "BCDE" and body["object"] == "text_completion"
    assert body["seed"] == seed_of(3, "q0") and body["id"].startswith("cmpl-")
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
    wrong = {
        "q1": (400, "there is no field foo: leave it out"),
        "q2": (400, "stream is true, and an answer in a file is whole: leave it out"),
        "q3": (400, "save_state would end with the job: start it with --state-dir"),
        "q4": (404, "there is no state 'x': save it first"),
        "q5": (404, "there is no model 'gpt': this server has 'm'"),
    }
    for name, (status, message) in wrong.items():
        response = answers[name]["response"]
        assert (response["status_code"], response["body"]["error"]["message"]) == (status, message)
    last = answers["q6"]["response"]["body"]
    assert last["seed"] == 9 and last["choices"][0]["logprobs"]["token_logprobs"] == [-9.0, -9.0]
    assert sorted(told) == [0] * 5 + [3, 5]


def test_more_answers_than_the_queue_takes(tmp_path):
    """Two slots and two that wait: a request of more waits until it is alone."""
    write(tmp_path, *({"prompt": ["A"] * 3, "n": 1 + i % 3} for i in range(8)))
    assert answer(tmp_path) == 0
    answers = found(tmp_path)
    counts = [len(answers[f"q{i}"]["response"]["body"]["choices"]) for i in range(8)]
    assert counts == [3 * (1 + i % 3) for i in range(8)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(tmp_path, number):
    before = signal.getsignal(number)
    write(tmp_path, *({"prompt": "A"} for _ in range(30)))
    told = []

    def tell(tokens):
        told.append(tokens)
        if len(told) == 5:
            signal.raise_signal(number)

    try:
        assert answer(tmp_path, tell=tell) == number
    finally:
        signal.signal(number, before)
    assert 5 <= len(found(tmp_path)) < 30
    assert answer(tmp_path) == 0 and len(found(tmp_path)) == 30


def test_an_engine_that_fails_is_no_answer(tmp_path):
    write(tmp_path, {"prompt": "A"}, {"prompt": "A", "foo": 1})
    with pytest.raises(RuntimeError, match="the device has gone"):
        answer(tmp_path, make=Failing)
    assert set(found(tmp_path)) <= {"q1"}

    def make():
        raise UserError("the model cannot be loaded")

    with pytest.raises(UserError, match="cannot be loaded"):
        answer(tmp_path, make=make)
    assert answer(tmp_path) == 0 and len(found(tmp_path)) == 2


def test_a_full_disk(tmp_path, monkeypatch):
    """No part of an answer stays, and no answer is lost."""
    write(tmp_path, *({"prompt": "A"} for _ in range(6)))
    real, written = os.write, []

    def short(number, content):
        if not content.startswith(b'{"id"') and b"cmpl-" not in content:
            return real(number, content)
        written.append(content)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(number, content[:50] if len(written) == 4 else content)

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(UserError, match=r"cannot write .*: No space left.* the 3 answers before"):
        answer(tmp_path)
    assert len(found(tmp_path)) == 3
    monkeypatch.undo()
    assert answer(tmp_path) == 0 and len(found(tmp_path)) == 6


def test_files_of_other_answers(tmp_path):
    """Nothing of them is changed."""
    write(tmp_path, {"prompt": "A"}, {"prompt": "B"})
    answer(tmp_path)
    path = tmp_path / "answers"
    whole = path.read_text()
    first, second = whole.splitlines()

    def refused(words, content=None, **other):
        path.write_text(whole if content is None else content)
        before = path.read_bytes()
        with pytest.raises(UserError, match=words):
            answer(tmp_path, **other)
        assert path.read_bytes() == before

    refused("has answers of another model: give the same --run", model="d" * 64)
    refused("has answers with other options: give the same --body", options="d" * 64)
    refused("line 1 of .* is no answer of tvq batch: give another --out", "Call me")
    refused("line 2 of .* is no answer of tvq batch", f"{first}\nCall me\n{second}\n")
    refused("line 2 of .* is no answer", f"{first}\n{json.dumps(json.loads(second), indent=1)}")
    refused("line 2 of .* is a second answer to line", f"{first}\n{first}\n")
    refused("line 1 of .* is damaged", first.replace('-1"', '-9"').replace('-2"', '-9"') + "\n")
    requests = (tmp_path / "requests").read_text()
    write(tmp_path, {"prompt": "A"}, {"prompt": "C"})
    refused("has answers to another input: give the one that it was begun with")
    (tmp_path / "requests").write_text(requests)
    path.write_text(first + "\n")  # a line that was deleted is answered anew
    assert answer(tmp_path) == 0 and len(found(tmp_path)) == 2


def test_one_process_has_the_file(tmp_path):
    write(tmp_path, {"prompt": "A"})
    with RequestFile(tmp_path / "requests") as requests:
        options = dict(options="b" * 64, model="c" * 64)
        with (
            AnswerFile(tmp_path / "answers", requests, **options),
            pytest.raises(UserError, match="is being written by another process: wait"),
        ):
            AnswerFile(tmp_path / "answers", requests, **options)
        with pytest.raises(UserError, match="is a folder: give the name of a file"):
            AnswerFile(tmp_path, requests, **options)
