"""Completions over a scheduler without a model: whose answer it is, what is counted, who waits."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")

from tests.serve.fakes import served, until
from transformer_vq.serve import completion, guard


def ask(**body):
    async def act(client, service, scheduler):
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert not service.busy
        return response.json() if not body.get("stream") else response.text

    return served(act)


def test_whose_answer_it_is():
    """Choices are numbered prompt * n + i; any number of prompts is taken where nothing waits."""
    prompts = [chr(65 + i % 20) for i in range(200)]
    found = ask(prompt=prompts, n=2, max_tokens=4, seed=1)
    assert [choice["index"] for choice in found["choices"]] == list(range(400))
    for i, choice in enumerate(found["choices"]):
        first = ord(prompts[i // 2]) + 1 + i % 2
        assert choice["text"] == "".join(chr(first + k) for k in range(4))
        assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert found["usage"]["prompt_tokens"] == 200
    assert found["usage"]["completion_tokens"] == 1600


def test_the_most_probable_of_several():
    """Sample i has seed + i and so, here, a smaller log-probability."""
    found = ask(prompt=["A", "K"], n=2, best_of=4, max_tokens=3, seed=5, logprobs=1)
    assert [choice["text"] for choice in found["choices"]] == ["BCD", "CDE", "LMN", "MNO"]
    assert found["choices"][1]["logprobs"]["token_logprobs"] == [-6.0] * 3
    assert found["choices"][1]["logprobs"]["text_offset"] == [1, 2, 3]
    assert found["usage"]["completion_tokens"] == 24


def test_a_stop_ends_one_answer():
    """The engine is told, and the others go on."""

    async def act(client, service, scheduler):
        body = dict(prompt="A", n=2, max_tokens=12, stop="EF", return_token_ids=True)
        found = (await client.post("/v1/completions", json=body)).json()
        assert not service.busy
        await until(lambda: {0, 1} <= set(scheduler.cancelled))
        return found["choices"]

    first, second = served(act)
    assert (first["text"], second["text"]) == ("BCD", "CD")
    assert first["finish_reason"] == second["finish_reason"] == "stop"
    assert first["token_ids"] == [66, 67, 68]


def test_a_stream_is_ascii():
    """No letter in it can be taken for the end of a line (`str.splitlines`)."""
    fields = dict(prompt=[126], max_tokens=6)
    whole, stream = ask(**fields), ask(**fields, stream=True)
    assert not whole["choices"][0]["text"].isascii() and stream.isascii()


def test_streams_are_the_answers():
    body = dict(prompt=["A", "a"], n=2, max_tokens=7, seed=3, echo=True)
    whole = [choice["text"] for choice in ask(**body, stream=False)["choices"]]
    lines = ask(**body, stream=True, stream_options={"include_usage": True}).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    *chunks, usage = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    texts = [""] * 4
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        assert chunk["seed"] == 3 and chunk["usage"] is None
    assert len(chunks) > 8 and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 28
    assert texts == whole == ["ABCDEFGH", "ACDEFGHI", "abcdefgh", "acdefghi"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_prompt_is_written_aside(monkeypatch, stream):
    """The same answer; what the engine says meanwhile waits."""
    body = dict(prompt=["abc", "xyz"], echo=True, max_tokens=9, n=2, seed=1, stream=stream)

    def texts(answer):
        lines = answer.split("data: ")[1:-1] if stream else [json.dumps(answer)]
        found = ["", "", "", ""]
        for line in lines:
            for choice in json.loads(line)["choices"]:
                found[choice["index"]] += choice["text"]
        return found

    at_once = texts(ask(**body))
    assert at_once[:2] == ["abcdefghijkl", "abcefghijklm"]
    monkeypatch.setattr(completion, "MOST_AT_ONCE", 2)
    aside = []
    to_thread = asyncio.to_thread

    async def slowly(*args):
        aside.append(args)
        await asyncio.sleep(0.1)  # the engine goes on
        return await to_thread(*args)

    monkeypatch.setattr(completion.asyncio, "to_thread", slowly)
    assert texts(ask(**body)) == at_once and len(aside) == 2

    def fail(*args):
        raise RuntimeError("a fault")

    monkeypatch.setattr(completion.Writer, "echo", fail)

    async def act(client, service, scheduler):
        asyncio.get_running_loop().set_exception_handler(lambda *args: None)
        return (await client.post("/v1/completions", json=body)).text

    assert "this is a fault of the server" in served(act)


def test_a_full_queue_takes_all_prompts_or_none():
    async def act(client, service, scheduler):
        long = asyncio.ensure_future(
            client.post("/v1/completions", json={"prompt": ["A", "B"], "max_tokens": 3000})
        )
        await until(lambda: service.busy)
        full = await client.post("/v1/completions", json={"prompt": ["C"] * 3, "max_tokens": 1})
        fits = await client.post("/v1/completions", json={"prompt": ["C"] * 2, "max_tokens": 1})
        assert (await long).status_code == 200
        return full, fits

    full, fits = served(act, max_queue=2)
    assert full.status_code == 429 and "2 answers are being written" in full.text
    assert full.headers["retry-after"] == "1"
    assert [choice["text"] for choice in fits.json()["choices"]] == ["D", "D"]


def test_a_request_that_never_ends(monkeypatch):
    monkeypatch.setattr(guard, "BODY", 0.01)

    async def beginning():
        yield b'{"prompt": '
        await asyncio.sleep(3600)

    async def act(client, service, scheduler):
        headers = {"Content-Type": "application/json"}
        return await client.post("/v1/completions", content=beginning(), headers=headers)

    answer = served(act)
    assert (answer.status_code, answer.headers["connection"]) == (408, "close")
    assert "nothing has come of the request for 0.01 seconds" in answer.text


def test_a_stream_that_nobody_reads_ends(monkeypatch):
    """What waits for the reader is bounded, alternatives included."""
    monkeypatch.setattr(completion, "MOST_UNREAD", 50)

    async def act(client, service, scheduler):
        from transformer_vq.serve.protocol import ApiError, CompletionRequest

        read = []
        for logprobs in (None, 4):
            scheduler.cancelled.clear()
            body = CompletionRequest(prompt="A", max_tokens=10**6, stream=True, logprobs=logprobs)
            slow = await service.complete(body, "", 1)
            await until(lambda: scheduler.idle and scheduler.cancelled)
            read.append(0)
            with pytest.raises(ApiError, match="the stream is not read"):
                async for chunk in slow.chunks():
                    read[-1] += len(chunk["choices"][0]["text"])
            assert not service.busy
        return read

    assert served(act) == [51, 12]


def test_a_stream_keeps_nothing_of_what_was_read():
    """It may have no end."""

    async def act(client, service, scheduler):
        from transformer_vq.serve.protocol import CompletionRequest

        whole = CompletionRequest(prompt="A", max_tokens=300, logprobs=1)
        kept = []
        for body in (whole, whole.model_copy(update={"stream": True})):
            made = await service.complete(body, "", 1)
            if body.stream:
                assert [chunk async for chunk in made.chunks()]
            else:
                await made.whole()
            (choice,) = made._choices
            kept.append((len(choice.entries), len(choice.text)))
        return kept

    assert served(act) == [(300, 300), (0, 0)]
