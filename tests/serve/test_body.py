"""Large requests: read in slices and aside, and nothing else is different."""

import asyncio
import hashlib
import json
import threading

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")

from tests.serve.fakes import served
from transformer_vq.serve import aside, body
from transformer_vq.serve.aside import json_list, json_text, token_array
from transformer_vq.serve.body import parse
from transformer_vq.serve.hashes import APART, Hashed
from transformer_vq.serve.protocol import CompletionRequest
from transformer_vq.serve.service import Service

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)
BODIES = st.dictionaries(
    st.sampled_from(["prompt", "tokens", "stop", 'é\n"']),
    TOKENS | st.lists(TOKENS, max_size=4) | st.lists(st.text(max_size=5), max_size=4) | ANYTHING,
)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Much less is large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "LARGE", 0)
        patch.setattr(body, "SLICE", 16)
        patch.setattr(body, "MOST_ITEMS", 3)
        yield


def plain(value):
    """The same without arrays."""
    if isinstance(value, np.ndarray):
        assert value.dtype == np.int32
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


@given(BODIES | ANYTHING, st.sampled_from([None, 1]), st.booleans())
@example({"prompt": [[], [1, 2], [3]], "stop": [1, 2]}, None, True)
@example({"prompt": [[1], "a"], "tokens": [-1]}, None, True)
@example({"prompt": [2**31], "tokens": [1, 2.5]}, None, True)
def test_what_is_read_in_slices_is_json(value, indent, ascii):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    assert plain(parse(text.encode("utf-8", "surrogatepass"))) == value
    assert plain(parse(text.encode("utf-16", "surrogatepass"))) == value


@given(BODIES, st.data())
@example({"prompt": [1, 2, 3]}, None)
def test_what_is_no_json_is_refused(value, data):
    """Any text: it is read, or refused, as by `json.loads`."""
    text = json.dumps(value)
    for _ in range(3):
        at = data.draw(st.integers(0, len(text))) if data else 10
        sign = data.draw(st.sampled_from(list('[]{},:"0-e \n'))) if data else ","
        text = text[:at] + sign + text[at + 1 :]
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(json.JSONDecodeError):
            parse(text.encode())
    else:
        assert plain(parse(text.encode())) == expected


def test_tokens_become_arrays_a_slice_at_a_time(monkeypatch):
    """No call goes through more than a slice, but for what is no list of tokens."""
    lengths, loads = [], json.loads

    def watched(text):
        lengths.append(len(text))
        return loads(text)

    monkeypatch.setattr(body.json, "loads", watched)
    prompt = list(range(500))
    found = parse(json.dumps({"prompt": prompt, "n": 2}).encode())
    assert isinstance(found["prompt"], np.ndarray) and found["prompt"].tolist() == prompt
    assert len(lengths) > 20 and max(lengths) <= 16 + 2
    assert CompletionRequest.model_validate(found).prompt is found["prompt"]
    several = parse(json.dumps({"prompt": [prompt, [5], []]}).encode())["prompt"]
    assert CompletionRequest.model_validate({"prompt": several}).prompt is several
    lengths.clear()
    parse(json.dumps({"prompt": [*prompt, 0.5]}).encode())
    assert max(lengths) > 500


def asked_beside(prompt, owner, name, monkeypatch, *, patience):
    """The answer, and whether `/health` is answered while `owner.name` looks at the prompt: it
    waits for that."""
    begun, answered, found = threading.Event(), threading.Event(), []
    real = getattr(owner, name)

    def waits(*args):
        begun.set()
        found.append(answered.wait(patience))
        return real(*args)

    async def act(client, service, scheduler):
        given = {"prompt": prompt, "max_tokens": 3, "return_token_ids": True}
        completion = asyncio.create_task(client.post("/v1/completions", json=given))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        assert (await client.get("/health")).status_code == 200
        answered.set()
        return (await completion).json()["choices"][0]["token_ids"], found[0]

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, waits)
        return served(act)


@pytest.mark.parametrize("prompt", ["m" * 200, [109] * 200, [[109] * 200]])
@pytest.mark.parametrize(("owner", "name"), [(body, "parse"), (Service, "_prompts")])
def test_others_are_answered_while_a_large_request_is_read(prompt, owner, name, monkeypatch):
    """It is parsed, checked, made tokens and hashed aside; the answer is the same."""
    monkeypatch.setattr(aside, "LARGE", 100)
    tokens, beside = asked_beside(prompt, owner, name, monkeypatch, patience=30)
    assert tokens == [110, 111, 112] and beside
    monkeypatch.setattr(aside, "LARGE", 10_000)
    tokens, beside = asked_beside(prompt, owner, name, monkeypatch, patience=0.2)
    assert tokens == [110, 111, 112] and not beside


def test_text_and_tokens_of_large_requests(monkeypatch):
    monkeypatch.setattr(aside, "LARGE", 100)
    text = "wörter " * 50

    async def act(client, service, scheduler):
        found = (await client.post("/tokenize", json={"prompt": text})).json()
        again = (await client.post("/detokenize", json={"tokens": found["tokens"]})).json()
        odd = await client.post("/detokenize", json={"tokens": [*found["tokens"], 256]})
        lists = await client.post("/detokenize", json={"tokens": [found["tokens"]]})
        return found, again, odd, lists

    found, again, odd, lists = served(act)
    assert found == {"tokens": list(text.encode()), "count": 400, "max_model_len": None}
    assert again == {"prompt": text}
    assert odd.status_code == 400 and "tokens has the token 256" in odd.json()["error"]["message"]
    assert lists.status_code == 400


def test_slices_are_the_whole(monkeypatch):
    monkeypatch.setattr(aside, "SLICE", 7)
    for size in (0, 1, 7, 50):
        numbers = list(range(size))
        assert token_array(numbers).tolist() == json.loads(json_list(token_array(numbers)))
    content = {"text": "é\n", "logprobs": [None, -0.5, {"a": 1}], "n": 1}
    assert json_text(content, 10**9) == json_text(content, 0)
    assert json.loads(json_text(content, 0)) == content
    for size in (0, 10**9):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_text([float("nan")], size)


@given(st.lists(st.integers(0, 300), max_size=6))
@example([3, 1, 3, 300, 0])
def test_hashes_of_beginnings(lengths):
    """In any order, each is that of the tokens alone; so after more tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformer_vq.serve.hashes.APART", 50)
        tokens = np.arange(300, dtype=np.int32)
        hashed = Hashed(tokens)
        longer = hashed.followed_by([7, 8])
        for one, all_of_them in ((hashed, tokens), (longer, [*tokens, 7, 8])):
            for length in [*lengths, len(one)]:
                raw = np.asarray(all_of_them[:length], np.int32).tobytes()
                assert one.digest(length) == hashlib.blake2b(raw, digest_size=16).digest()
    assert Hashed([1, 2]).digest(2) != Hashed([1, 3]).digest(2)
    assert Hashed.of(hashed) is hashed and APART > 50
