"""Chats: a prompt made by a template, without a model."""

import json

import pytest

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")
pytest.importorskip("jinja2", reason="NOT TESTED: jinja2 is not installed")

import httpx

from tests.helpers import fails
from tests.serve.fakes import served as served_text
from transformer_vq.cli.serve import _chat_template
from transformer_vq.errors import UserError
from transformer_vq.serve.chat import ChatTemplate
from transformer_vq.serve.protocol import ApiError, Message
from transformer_vq.serve.server import make_app

# The newline after a block is not part of the prompt, nor is what stands before one in its line.
TEMPLATE = """\
{% set stop = ["\\nuser:"] %}
{% for message in messages %}
  {% if message.role == "system" and not loop.first %}
    {{ raise_exception("the system speaks first") }}
  {% endif %}
{{ message.role }}: {{ message.content }}{% if message.role == "assistant" %}{{ eos_token }}{% endif %}

{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}
"""  # noqa: E501


def said(*contents, roles=("user", "assistant")):
    return [Message(role=roles[i % 2], content=text) for i, text in enumerate(contents)]


def test_a_prompt():
    """The end of a document is a token, whatever the messages say."""
    rendered = ChatTemplate(TEMPLATE).render(said("<0>", "yes", "no?"))
    assert rendered.documents == ["user: <0>\nassistant: yes", "\nuser: no?\nassistant:"]
    assert rendered.stops == ["\nuser:"]
    parts = Message(role="developer", content=[{"type": "text", "text": t} for t in "ab"])
    plain = ChatTemplate("{{ messages | tojson }}|{{ bos_token }}").render([parts])
    assert plain.documents == ['[{"role": "system", "content": "a\\nb"}]|']
    named = Message(role="user", content="<é>", name="Ann")
    assert ChatTemplate("{{ messages[0] | tojson }}").render([named]).documents == [
        '{"role": "user", "content": "<é>", "name": "Ann"}'
    ]


REFUSED = [
    (TEMPLATE, "refuses the messages: the system speaks first"),
    ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ range(10 ** 9) | list }}", "Range too big"),
    ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ("{{ 1 / 0 }}", "division by zero"),
]


@pytest.mark.parametrize(("template", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_a_template_refuses(template, words):
    messages = [*said("a"), Message(role="system", content="b")]
    with pytest.raises(ApiError, match=words) as caught:
        ChatTemplate(template).render(messages)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_templates_are_found(tmp_path, capsys):
    """One that is given, in a file or as it is; else that of the model."""
    assert _chat_template(None, tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert _chat_template(None, tmp_path).source == "{{ 1 }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}")
    assert _chat_template(None, tmp_path).source == "{{ 2 }}"
    (tmp_path / "mine").write_text("{{ 3 }}")
    assert _chat_template(str(tmp_path / "mine"), tmp_path).source == "{{ 3 }}"
    assert _chat_template("{{ 4 }}", tmp_path).source == "{{ 4 }}"
    with pytest.raises(UserError, match="wrong in line 2: unexpected end of template"):
        _chat_template("a\n{% if x", tmp_path)
    arguments = ("serve", "--run", str(tmp_path), "--chat-template")
    assert "cannot be read (No such file or directory)" in fails(capsys, 1, *arguments, "nothing")
    assert "cannot be read (Is a directory)" in fails(capsys, 1, *arguments, str(tmp_path))


def ask(template=TEMPLATE, **body):
    """The answer of letters that follow the last one of the prompt."""

    async def act(client, service, scheduler):
        transport = httpx.ASGITransport(make_app(service, template=ChatTemplate(template)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as chat:
            response = await chat.post("/v1/chat/completions", json=body)
        return response, scheduler

    return served_text(act)


HELLO = [{"role": "user", "content": "A"}]
LETTERS = "{% set stop = 'FG' %}{{ messages[0].content }}"


def test_an_answer():
    response, _ = ask(LETTERS, messages=HELLO, max_tokens=3, seed=1, n=2)
    first, second = response.json()["choices"]
    assert first == {
        "index": 0,
        "message": {"role": "assistant", "content": "BCD", "refusal": None},
        "finish_reason": "length",
        "logprobs": None,
    }
    assert second["message"]["content"] == "CDE"
    response, _ = ask(LETTERS, messages=HELLO, max_completion_tokens=9)  # the template's stop
    (choice,) = response.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("BCDE", "stop")
    response, _ = ask(LETTERS, messages=HELLO, max_tokens=9, stop="D")
    assert response.json()["choices"][0]["message"]["content"] == "BC"
    response, _ = ask("{{ messages[0].content }}", messages=HELLO)
    assert response.json()["usage"]["completion_tokens"] == 512


def test_log_probabilities():
    """With the bytes of each token, of which a character may need several."""
    messages = [{"role": "user", "content": "\u007f"}]
    response, _ = ask(LETTERS, messages=messages, max_tokens=1, seed=2, logprobs=True)
    (token,) = response.json()["choices"][0]["logprobs"]["content"]
    assert token == {"token": "bytes:\\x80", "logprob": -2.0, "bytes": [128], "top_logprobs": []}
    response, _ = ask(LETTERS, messages=HELLO, max_tokens=1, seed=2, logprobs=True, top_logprobs=3)
    (token,) = response.json()["choices"][0]["logprobs"]["content"]
    assert token["top_logprobs"] == [{"token": "B", "logprob": -2.0, "bytes": [66]}]


WRONG = [
    (dict(messages=[]), "messages"),
    (dict(messages=HELLO, max_tokens=1, max_completion_tokens=2), "differ: give one of them"),
    (dict(messages=HELLO, top_logprobs=1), "set logprobs to true"),
    (dict(messages=HELLO, tools=[]), "there is no field tools"),
    (dict(messages=HELLO, max_tokens=3, min_tokens=4), "min_tokens is 4"),
    (dict(messages=[{"role": "robot", "content": "x"}]), "messages: input should be 'system'"),
    (dict(messages=HELLO, stop=["x"] * 17), "at most 16"),
]


@pytest.mark.parametrize(("body", "words"), WRONG, ids=[words for _, words in WRONG])
def test_wrong_chats(body, words):
    response, scheduler = ask(**body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]
    assert scheduler.idle
