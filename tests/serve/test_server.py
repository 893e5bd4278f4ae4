"""A real server and the unmodified OpenAI client."""

import asyncio
import contextlib
import http.client
import json
import random
import subprocess
import threading

import httpx
import numpy as np
import openai
import pytest

from tests.helpers import TVQ
from tests.serve.conftest import KEYS, auth, complete, endless
from transformer_vq.cli import main

SETTINGS = dict(model="run", max_tokens=12, seed=7)


def text_of(server, **fields):
    response = complete(server, **{**SETTINGS, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_what_it_says_when_it_is_ready(server):
    assert f"serving run at {server.url} with 2 slots of " in server.said
    client = server.client()
    assert [model.id for model in client.models.list()] == ["run"]
    assert client.models.retrieve("run").owned_by == "transformer-vq"
    assert httpx.get(f"{server.url}/health").json()["needs_key"] is True
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert "version" in httpx.get(f"{server.url}/version").json()
    assert "/v1/completions" in httpx.get(f"{server.url}/openapi.json", headers=auth()).text


def test_completions(server):
    """All forms of a prompt, several answers, streams, and what is counted."""
    client = server.client()
    whole = client.completions.create(prompt="It was", **SETTINGS)
    assert whole.choices[0].finish_reason == "length" and whole.object == "text_completion"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 12)
    assert whole.seed == 7
    expected = whole.choices[0].text
    for prompt in (["It was"], list(b"It was"), [list(b"It was")]):
        same = client.completions.create(prompt=prompt, **SETTINGS)
        assert same.choices[0].text == expected
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            prompt="It was", stream=True, stream_options=options, **{**SETTINGS, "max_tokens": 300}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 300
    streamed = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert streamed == text_of(server, prompt="It was", max_tokens=300)
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    several = client.completions.create(prompt=["It was", "Call me"], n=3, **SETTINGS)
    assert [choice.index for choice in several.choices] == list(range(6))
    for i, choice in enumerate(several.choices):
        prompt = ["It was", "Call me"][i // 3]
        assert choice.text == text_of(server, prompt=prompt, seed=7 + i % 3)
    drawn = client.completions.create(prompt="x", model="run")
    assert text_of(server, prompt="x", max_tokens=16, seed=drawn.seed) == drawn.choices[0].text
    many = client.completions.create(prompt=["It was"] * 9, **SETTINGS)  # more than the queue takes
    assert [choice.text for choice in many.choices] == [expected] * 9
    ids = complete(server, **SETTINGS, prompt="It was", return_token_ids=True).json()
    assert bytes(ids["choices"][0]["token_ids"]).decode(errors="replace") == expected
    nothing = complete(server, prompt="It was", max_tokens=0, echo=True).json()
    assert nothing["choices"][0]["text"] == "It was" and nothing["usage"]["completion_tokens"] == 0
    best = complete(server, **SETTINGS, prompt="It was", n=1, best_of=3, logprobs=0).json()
    three = complete(server, **SETTINGS, prompt="It was", n=3, logprobs=0).json()
    sums = [sum(c["logprobs"]["token_logprobs"]) for c in three["choices"]]
    assert best["choices"][0]["text"] == three["choices"][int(np.argmax(sums))]["text"]


def test_stops(server):
    """A text ends before its stop, streamed or not, and no part of it is seen."""
    text = text_of(server, prompt="It was", max_tokens=60)
    stop = text[20:23]
    before = text[: text.index(stop)]
    ended = complete(server, **{**SETTINGS, "max_tokens": 60}, prompt="It was", stop=[stop, "\0"])
    choice = ended.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (before, "stop")
    kept = text_of(
        server, prompt="It was", max_tokens=60, stop=stop, include_stop_str_in_output=True
    )
    assert kept == before + stop
    chunks = server.client().completions.create(
        prompt="It was", stream=True, stop=stop, **{**SETTINGS, "max_tokens": 60}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == before
    first = next(iter(text.encode()))
    assert text_of(server, prompt="It was", stop_token_ids=[first]) == ""


def test_echo_with_logprobs_is_score(server, capsys):
    """As lm-evaluation-harness asks: equal to `tvq score`, and the greedy token to the bit."""
    prompt = "It was the best of times, ça va"
    response = complete(
        server, prompt=list(prompt.encode()), max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    logprobs = response.json()["choices"][0]["logprobs"]
    run = str(server.run)
    assert main(["score", "--run", run, "--text", prompt, "--per", "token", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[:-1]]
    scores = [line["logprob"] for line in lines]
    found = logprobs["token_logprobs"]
    assert found[0] is None and scores[0] is None and logprobs["top_logprobs"][0] is None
    assert len(found) == len(scores) + 1 == len(prompt.encode()) + 1
    np.testing.assert_allclose(found[1:-1], scores[1:], rtol=1e-5, atol=1e-5)
    assert found[-1] == max(logprobs["top_logprobs"][-1].values())  # it was drawn greedily
    assert any(
        f != max(t.values()) for f, t in zip(found[1:], logprobs["top_logprobs"][1:], strict=True)
    )
    assert logprobs["text_offset"][:2] == [0, 1]
    assert "bytes:\\xc3" in logprobs["tokens"]


def test_256_bytes_have_256_keys(server):
    tokens = list(range(256))
    logprobs = complete(server, prompt=tokens, max_tokens=0, logprobs=0, echo=True).json()
    assert len(set(logprobs["choices"][0]["logprobs"]["tokens"])) == 256


def test_tokens_and_text(server):
    post = lambda path, body: httpx.post(server.url + path, json=body, headers=auth())  # noqa: E731
    for prefix in ("", "/v1"):
        made = post(f"{prefix}/tokenize", {"prompt": "é!"}).json()
        assert made == {"tokens": [195, 169, 33], "count": 3, "max_model_len": None}
        assert post(f"{prefix}/detokenize", {"tokens": [195, 169, 33]}).json() == {"prompt": "é!"}
        info = httpx.get(f"{server.url}{prefix}/tokenizer_info", headers=auth()).json()
        assert info["vocab_size"] == 256 and info["eos_token"] == "\0"
    refused = post("/detokenize", {"tokens": [256]})
    assert refused.status_code == 400 and "tokens go from 0 to 255" in refused.text


WRONG = [
    ({"prompt": "x", "suffix": "y"}, 400, "suffix", "there is no field suffix"),
    ({"prompt": "x", "max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    ({"prompt": "x", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"prompt": "x", "model": "gpt-4"}, 404, "model", "there is no model 'gpt-4'"),
    ({"prompt": [1, 256]}, 400, "prompt", "has the token 256"),
    ({"prompt": {"a": 1}}, 400, "prompt", "prompt must be text"),
    ({"prompt": []}, 400, "prompt", "there are 0 prompts"),
    ({"prompt": "x", "n": 2, "best_of": 1}, 400, "best_of", "it must be n or more"),
    ({"prompt": "x", "state": "../x"}, 400, "state", "match pattern"),
    ({"prompt": "x", "state": "nothing"}, 404, "state", "there is no state 'nothing'"),
    ({"prompt": "x", "stop": ""}, 400, "stop", "at least 1"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias", "its keys are token ids"),
    ({"prompt": "x", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    ({"prompt": "x", "stop_token_ids": [300]}, 400, None, "stop has the token 300"),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_requests(server, body, status, param, words):
    response = complete(server, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert words in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_the_clients_errors(server):
    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        server.client("wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="no model 'x'"):
        server.client().completions.create(model="x", prompt="x")
    with pytest.raises(openai.NotFoundError, match="no chat template"):
        server.client().chat.completions.create(model="run", messages=[])
    with pytest.raises(openai.BadRequestError, match="there is no field foo"):
        server.client().completions.create(model="run", prompt="x", extra_body={"foo": 1})
    not_json = httpx.post(f"{server.url}/v1/completions", content=b"{", headers=auth())
    assert not_json.status_code == 400
    assert "with the header Content-Type: application/json" in not_json.text
    large = httpx.post(f"{server.url}/v1/completions", content=b"x" * (8 << 20 | 1), headers=auth())
    assert large.status_code == 413 and "8,388,608 bytes" in large.text
    other = httpx.get(f"{server.url}/v1/models", headers={**auth(), "Host": "evil.example"})
    assert other.status_code == 403 and "127.0.0.1" in other.text
    assert httpx.get(f"{server.url}/nothing", headers=auth()).status_code == 404


def test_answers_do_not_depend_on_the_load(server):
    """Streams that begin at any time, some with log-probabilities: as each is alone."""
    rng = random.Random(0)
    jobs = []
    for i in range(24):
        prompt = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 60)))
        jobs.append(
            dict(prompt=prompt, seed=i, max_tokens=rng.randint(1, 80), n=rng.choice([1, 2]))
        )

    async def one(client, job, delay):
        await asyncio.sleep(delay)
        texts = [""] * job["n"]
        async for chunk in await client.completions.create(model="run", stream=True, **job):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        return texts

    async def together():
        options = dict(base_url=f"{server.url}/v1", api_key=KEYS[1], max_retries=50)
        async with openai.AsyncOpenAI(**options) as client:
            return await asyncio.gather(*(one(client, job, rng.random()) for job in jobs))

    found = asyncio.run(together())
    for job, texts in zip(jobs, found, strict=True):
        alone = complete(server, **job).json()["choices"]
        assert texts == [choice["text"] for choice in alone]
    assert len({tuple(texts) for texts in found}) > 20


def asked(server, **fields) -> http.client.HTTPConnection:
    """The connection of a request whose answer nobody reads, until it is closed."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    headers = {**auth(), "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(fields), headers)
    return connection


def test_who_leaves_frees_a_row(server):
    """In a stream, without one, in the queue; and a full queue says so at once."""
    patient = server.client(max_retries=60)
    answer = threading.Thread(target=patient.completions.create, kwargs=dict(SETTINGS, prompt="x"))
    with contextlib.closing(endless(server)), contextlib.ExitStack() as leaving:
        leaving.enter_context(contextlib.closing(asked(server, prompt="x", max_tokens=10**8)))
        assert server.becomes("tvq_rows_running", 2)
        for _ in range(4):
            leaving.enter_context(contextlib.closing(asked(server, prompt="x", max_tokens=10**8)))
        assert server.becomes("tvq_requests_waiting", 4)
        seventh = complete(server, prompt="x")
        assert seventh.status_code == 429 and seventh.headers["retry-after"] == "1"
        assert "6 answers are being written or waiting, and 2 + 4 are the most" in seventh.text
        answer.start()
        leaving.close()
        answer.join(60)  # in the row that is free
        assert not answer.is_alive()
        assert server.becomes("tvq_rows_running", 1)
    assert server.becomes("tvq_rows_running", 0) and server.becomes("tvq_requests_waiting", 0)


def test_states(server, tmp_path, capsys):
    """Continued is unbroken; a state is a file that `tvq sample` reads; names are one key's own."""
    prompt = "It was the best of times"
    settings = dict(prompt=prompt, seed=5, presence_penalty=0.5, repetition_penalty=1.2)
    unbroken = complete(server, **settings, max_tokens=30, return_token_ids=True).json()
    expected = unbroken["choices"][0]["token_ids"]
    first = complete(
        server, **settings, max_tokens=12, return_token_ids=True, save_state="one"
    ).json()
    assert first["choices"][0]["token_ids"] == expected[:12]
    rest = dict(settings, prompt="", state="one", max_tokens=18, return_token_ids=True)
    for _ in range(2):  # a state never changes
        again = complete(server, **rest).json()
        assert again["choices"][0]["token_ids"] == expected[12:]
    url = f"{server.url}/v1/states"
    info = httpx.get(f"{url}/one", headers=auth()).json()
    assert (info["id"], info["tokens"]) == ("one", len(prompt) + 12)
    # Made of a prompt alone, and where a stop text ends: as far as the text goes.
    made = httpx.post(url, json={"name": "two", "prompt": prompt}, headers=auth())
    assert made.json()["tokens"] == len(prompt)
    text = bytes(expected).decode(errors="replace")
    at = next(i for i in range(4, len(text)) if text[i].isprintable() and text[i] != "\ufffd")
    stopped = complete(
        server, **settings, max_tokens=30, stop=text[at], save_state="three", return_token_ids=True
    ).json()["choices"][0]["token_ids"]
    assert stopped == expected[: len(stopped)] and len(stopped) < 30
    later = complete(server, **dict(rest, state="three", max_tokens=30 - len(stopped))).json()
    assert later["choices"][0]["token_ids"] == expected[len(stopped) :]
    names = [state["id"] for state in httpx.get(url, headers=auth()).json()["data"]]
    assert names == ["one", "three", "two"]
    assert httpx.get(url, headers=auth(KEYS[1])).json()["data"] == []
    assert httpx.get(f"{url}/one", headers=auth(KEYS[1])).status_code == 404
    # As a file: to `tvq sample`, from it, and never of another model.
    file = httpx.get(f"{url}/two/file", headers=auth()).content
    (tmp_path / "two.tvq").write_bytes(file)
    arguments = ["sample", "--run", str(server.run), "--state", str(tmp_path / "two.tvq")]
    save = ["--save-state", str(tmp_path / "more.tvq")]
    assert main([*arguments, "--json", "--max-tokens", "9", "--seed", "5", *save]) == 0
    sampled = json.loads(capsys.readouterr().out)["samples"][0]["tokens"]
    plain = complete(server, prompt="", state="two", seed=5, max_tokens=9, return_token_ids=True)
    assert plain.json()["choices"][0]["token_ids"] == sampled
    more = (tmp_path / "more.tvq").read_bytes()
    put = httpx.put(f"{url}/more/file", content=more, headers=auth())
    assert put.json()["tokens"] == len(prompt) + 9
    damaged = httpx.put(f"{url}/more/file", content=more[:-1], headers=auth())
    assert damaged.status_code == 400 and "damaged" in damaged.text
    for path in ("a.b", "x" * 65, "%2e%2e"):
        assert httpx.get(f"{url}/{path}", headers=auth()).status_code in (400, 404)
    assert httpx.put(f"{url}/a.b/file", content=more, headers=auth()).status_code == 400
    assert httpx.delete(f"{url}/more", headers=auth()).json()["deleted"]
    assert httpx.delete(f"{url}/more", headers=auth()).status_code == 404


def test_known_prompts_are_not_read_again(server):
    """Equal to the bit with `exact`, which uses whole chunks only; all of it with `any`."""
    prompt = "".join(random.Random(1).choice("abcdefgh ") for _ in range(100))
    cold = complete(server, **SETTINGS, prompt=prompt, cache="off").json()
    assert cold["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    texts, cached = [], []
    turn = prompt + cold["choices"][0]["text"] + " and so on"
    for body in (
        dict(prompt=prompt),
        dict(prompt=prompt),
        dict(prompt=turn),
        dict(prompt=turn, cache="off"),
    ):
        answer = complete(server, **SETTINGS, **body).json()
        texts.append(answer["choices"][0]["text"])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert texts[0] == texts[1] == cold["choices"][0]["text"]
    assert texts[2] == texts[3]
    assert cached == [0, 100, 96, 0]
    other = complete(server, KEYS[1], **SETTINGS, prompt=prompt).json()
    assert other["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}  # another key's
    ids = [*list(prompt.encode()), 3]
    answer = complete(server, prompt=ids, max_tokens=4, seed=1, return_token_ids=True).json()
    whole = ids + answer["choices"][0]["token_ids"]
    turn2 = complete(server, prompt=[*whole, 5], cache="any", max_tokens=1).json()
    assert turn2["usage"]["prompt_tokens_details"]["cached_tokens"] == len(whole)


@pytest.mark.slow
def test_a_file_of_requests_has_the_same_answers(server, server_env, tmp_path):
    """`tvq batch`, with a state that the server made."""
    httpx.post(f"{server.url}/v1/states", json={"name": "b", "prompt": "It"}, headers=auth())
    (tmp_path / "states/all").mkdir(parents=True)
    content = httpx.get(f"{server.url}/v1/states/b/file", headers=auth()).content
    (tmp_path / "states/all/b.tvq").write_bytes(content)
    bodies = [dict(prompt="It was", seed=i, max_tokens=12, logprobs=1) for i in range(4)]
    bodies += [dict(prompt=" is", seed=i, max_tokens=12, state="b") for i in range(4)]
    bodies.append(dict(prompt="x", n=0))
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    command = [TVQ, "batch", "--run", server.run, "--input", path, "--out", tmp_path / "answers"]
    command += [
        "--exact",
        "--slots",
        "2",
        "--prompt-chunk",
        "16",
        "--state-dir",
        tmp_path / "states",
    ]
    process = subprocess.run(command, env=server_env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    out = tmp_path / "answers"
    assert process.stdout == f"9 requests are answered in {out}, 1 of them with an error\n"
    answers = {}
    for line in (tmp_path / "answers").read_text().splitlines():
        value = json.loads(line)
        answers[value["custom_id"]] = value["response"]
    assert len(answers) == 9 and answers["line-9"]["status_code"] == 400
    for i, body in enumerate(bodies[:-1], 1):
        choice = complete(server, **body).json()["choices"][0]
        assert answers[f"line-{i}"]["body"]["choices"] == [choice]


def test_nothing_was_compiled_after_the_start(server):
    """After all of the above. (JAX says what it compiles: it did so before the start.)"""
    assert "Finished XLA compilation" in server.errors()
    assert "compil" not in server.errors(since_ready=True).lower()
