"""The `openai` client, as it is."""

import asyncio
import threading

import pytest

openai = pytest.importorskip("openai", reason="NOT TESTED: openai is not installed")

SAID = [
    {"role": "system", "content": "Answer like a whale."},
    {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
]
PROMPT = "System: Answer like a whale.\n\nUser: Who are you?\n\nAssistant:"


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def test_completions(client, server):
    settings = dict(model="bytes", prompt="It was", max_tokens=40, seed=1)
    whole = client.completions.create(**settings, logprobs=2)
    text = whole.choices[0].text
    assert whole.usage.completion_tokens == 40 == len(whole.choices[0].logprobs.tokens)
    with client.completions.create(**settings, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == text

    async def also():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as other:
            one = await other.completions.create(**settings)
            parts = [c async for c in await other.completions.create(**settings, stream=True)]
            return one.choices[0].text, "".join(part.choices[0].text for part in parts)

    assert asyncio.run(also()) == (text, text)
    assert [model.id for model in client.models.list()] == ["bytes"]


def test_errors(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="there is no field suffix"):
        client.completions.create(model="bytes", prompt="x", suffix="y")
    with pytest.raises(openai.BadRequestError, match="there is no field tools"):
        client.chat.completions.create(model="bytes", messages=SAID, tools=[])
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="bytes", messages=[])


def test_it_retries_where_the_queue_is_full(client, server):
    """4 slots and 8 places in the queue are taken, then given back; the client comes again."""
    held = [
        client.completions.create(model="bytes", prompt="x", max_tokens=10**8, n=3, stream=True)
        for _ in range(4)
    ]
    with pytest.raises(openai.RateLimitError, match="try again later"):
        client.completions.create(model="bytes", prompt="x")
    patient = client.with_options(max_retries=20)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(patient.completions.create(model="bytes", prompt="x"))
    )
    thread.start()
    for stream in held:
        stream.close()
    thread.join(60)
    assert found[0].usage.completion_tokens == 16


def test_chat(client):
    """The template makes a prompt, and the completion of it is the answer."""
    settings = dict(model="bytes", seed=3, max_completion_tokens=60)
    answer = client.chat.completions.create(messages=SAID, **settings)
    message = answer.choices[0].message
    plain = client.completions.create(
        model="bytes", prompt=PROMPT, seed=3, max_tokens=60, stop="\n\nUser:"
    )
    assert (answer.object, message.role) == ("chat.completion", "assistant")
    assert message.content == plain.choices[0].text and len(message.content) > 10
    assert answer.usage.prompt_tokens == len(PROMPT)
    turn = [*SAID, message, {"role": "user", "content": "And now?"}]
    more = client.chat.completions.create(messages=turn, **settings)
    assert more.usage.prompt_tokens_details.cached_tokens > 0
    with pytest.raises(AssertionError):  # control: the system's words count
        other = client.chat.completions.create(messages=SAID[1:], **settings)
        assert other.choices[0].message.content == message.content


def test_chat_in_chunks(client):
    settings = dict(model="bytes", messages=SAID, seed=3, max_tokens=60, n=2)
    whole = client.chat.completions.create(**settings)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options=options))
    texts, roles, ends = ["", ""], [[], []], [None, None]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content
        roles[choice.index].append(choice.delta.role)
        ends[choice.index] = choice.finish_reason
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert all(of[0] == "assistant" and set(of[1:]) <= {None} for of in roles)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    stop = texts[0][10:12]
    ended = client.chat.completions.create(**{**settings, "n": 1}, stop=stop).choices[0]
    assert (ended.message.content, ended.finish_reason) == (texts[0].split(stop)[0], "stop")


def test_log_probabilities_of_a_chat(client):
    settings = dict(model="bytes", messages=SAID, seed=3, max_tokens=20)
    answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    plain = client.completions.create(
        model="bytes", prompt=PROMPT, seed=3, max_tokens=20, stop="\n\nUser:", logprobs=3
    )
    assert [token.logprob for token in tokens] == plain.choices[0].logprobs.token_logprobs
    written = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert written == answer.choices[0].message.content
    for token, names in zip(tokens, plain.choices[0].logprobs.top_logprobs, strict=True):
        assert len(token.top_logprobs) == 3
        assert [(t.token, t.logprob) for t in token.top_logprobs] == list(names.items())[:3]
