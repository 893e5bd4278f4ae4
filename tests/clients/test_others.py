"""Other clients of OpenAI's API, as they are, in the way their documentation has it."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

SAID = "Who are you?"
PROMPT = f"User: {SAID}\n\nAssistant:"


def text_of(server, **body) -> str:
    """What the server answers without any client's help."""
    response = httpx.post(f"{server.url}/completions", json={"seed": 5, "max_tokens": 30, **body})
    return response.json()["choices"][0]["text"]


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai", reason="NOT TESTED: no langchain-openai")
    settings = dict(model="bytes", base_url=server.url, api_key="none", max_tokens=30, seed=5)
    model = langchain.OpenAI(**settings)
    warmth = dict(temperature=model.temperature)  # it sends 0.7 where nothing is said
    expected = text_of(server, prompt=SAID, **warmth)
    assert model.invoke(SAID) == expected == "".join(model.stream(SAID))
    assert model.batch([SAID, "x"]) == [expected, text_of(server, prompt="x", **warmth)]
    assert asyncio.run(model.ainvoke(SAID)) == expected
    chat = langchain.ChatOpenAI(**settings)
    expected = text_of(server, prompt=PROMPT, stop="\n\nUser:")
    answer = chat.invoke(SAID)
    assert answer.content == expected and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(SAID)) == expected
    assert asyncio.run(chat.ainvoke([("human", SAID)])).content == expected
    scored = chat.bind(logprobs=True).invoke(SAID)
    assert len(scored.response_metadata["logprobs"]["content"]) > 0


def test_litellm(server):
    litellm = pytest.importorskip("litellm", reason="NOT TESTED: no litellm")
    settings = dict(api_base=server.url, api_key="none", max_tokens=30, seed=5)
    expected = text_of(server, prompt=SAID)
    of_text = dict(model="text-completion-openai/bytes", prompt=SAID, **settings)
    assert litellm.text_completion(**of_text).choices[0].text == expected
    chunks = litellm.text_completion(**of_text, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == expected
    said = dict(model="openai/bytes", messages=[{"role": "user", "content": SAID}], **settings)
    expected = text_of(server, prompt=PROMPT, stop="\n\nUser:")
    assert litellm.completion(**said).choices[0].message.content == expected
    chunks = litellm.completion(**said, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    also = asyncio.run(litellm.acompletion(**said))
    assert also.choices[0].message.content == expected
    with pytest.raises(litellm.exceptions.NotFoundError, match="no model"):
        litellm.completion(**{**said, "model": "openai/other"})


MODELS = """
- model_id: tvq
  model_name: bytes
  api_base: {url}
  completion: true
- model_id: tvq-chat
  model_name: bytes
  api_base: {url}
"""


def test_llm(server, tmp_path):
    pytest.importorskip("llm", reason="NOT TESTED: no llm")
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=server.url))

    def llm(*arguments: str) -> str:
        env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        command = [Path(sys.executable).with_name("llm"), *arguments]
        run = subprocess.run(command, env=env, capture_output=True, stdin=subprocess.DEVNULL)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout.decode()  # as it is: a carriage return is part of a text

    options = ["-o", "max_tokens", "30", "-o", "seed", "5"]
    expected = text_of(server, prompt=SAID)
    assert llm("-m", "tvq", SAID, *options).rstrip("\n") == expected.rstrip("\n")
    assert llm("-m", "tvq", "--no-stream", SAID, *options).rstrip("\n") == expected.rstrip("\n")
    expected = text_of(server, prompt=PROMPT, stop="\n\nUser:")
    for stream in ([], ["--no-stream"]):
        answer = llm("-m", "tvq-chat", *stream, SAID, *options)
        assert answer.rstrip("\n") == expected.rstrip("\n")
