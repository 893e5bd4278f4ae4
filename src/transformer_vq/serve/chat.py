"""Chats: a template in Jinja2 makes a prompt of messages, and completions answer it."""

import datetime
import json
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from transformer_vq.errors import UserError
from transformer_vq.serve.aside import token_array
from transformer_vq.serve.completion import Completion
from transformer_vq.serve.protocol import (
    MOST_STOPS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Message,
    Sampled,
    validation_error,
)
from transformer_vq.serve.service import Service
from transformer_vq.serve.writer import LEAST, Entry, Piece

MOST_TOKENS = 512  # of an answer, where a request does not say it


class Rendered(NamedTuple):
    """The prompt of a chat."""

    documents: list[str]  # texts; between them is what ends a document
    stops: list[str]  # texts that end the answer


class ChatTemplate:
    """A template as Hugging Face's tokenizers have it: `messages`, `add_generation_prompt`.

    It runs in a sandbox, without access to anything else. `eos_token` in it becomes the token that
    ends a document, and a `{% set stop = [...] %}` outside of blocks texts that end an answer.

    Raises `UserError` for a template that cannot be read.
    """

    def __init__(self, source: str):
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is wrong in line {error.lineno}: {error.message}"
            ) from None

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The prompt after which the assistant speaks. Raises `ApiError` if the template does."""
        end = f"<{secrets.token_hex(16)}>"  # no message can have it
        said = [{"role": _role(message), "content": message.text} for message in messages]
        for message, values in zip(messages, said, strict=True):
            if message.name is not None:
                values["name"] = message.name
        try:
            module = self._template.make_module(
                {
                    "messages": said,
                    "add_generation_prompt": True,
                    "bos_token": "",
                    "eos_token": end,
                }
            )
        except Exception as error:  # whatever a template does
            raise ApiError(
                400,
                f"the chat template refuses the messages: {str(error) or type(error).__name__}",
                param="messages",
                code="chat_template",
            ) from None
        stop = getattr(module, "stop", [])
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(s and isinstance(s, str) for s in stops):
            stops = []
        return Rendered(str(module).split(end), stops)


def _role(message: Message) -> str:
    """Templates are older than the role developer."""
    return "system" if message.role == "developer" else message.role


def _refuse(why: str) -> None:
    raise ValueError(why)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _json(value: Any, indent: int | None = None, **_: Any) -> str:
    """As Hugging Face has it: Jinja's own would write HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def completion_of(service: Service, template: ChatTemplate, body: ChatRequest) -> CompletionRequest:
    """The request for a completion that answers a chat. Raises `ApiError`."""
    service.require_model(body.model)
    documents, stops = template.render(body.messages)
    parts: list[np.ndarray] = []
    for i, text in enumerate(documents):
        parts += [token_array([service.ready.tokenizer.eos_id])] if i else []
        parts.append(service.encode(text))
    tokens: Any = np.concatenate(parts)
    length = body.max_completion_tokens or body.max_tokens
    if length is None:
        capacity = service.ready.capacity
        room = MOST_TOKENS if capacity is None else capacity - len(tokens)
        length = max(1, min(MOST_TOKENS, room))
    values = body.model_dump(include=set(Sampled.model_fields), exclude_unset=True)
    values["stop"] = list(dict.fromkeys([*body.stops, *stops]))[:MOST_STOPS]
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    try:
        return CompletionRequest(prompt=tokens, max_tokens=length, logprobs=logprobs, **values)
    except ValidationError as error:
        raise validation_error(dict(error.errors()[0])) from None


class ChatCompletion(Completion):
    """The answers to a chat, in the form of OpenAI's chats."""

    prefix = "chatcmpl"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._begun: set[int] = set()  # answers of which a chunk was sent

    def _content(self, index: int, piece: Piece, *, chunk: bool) -> dict[str, Any]:
        if not chunk:
            return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
        role = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        return {"delta": {**role, "content": piece.text}}

    def _logprobs(self, piece: Piece, alternatives: int) -> dict[str, Any]:
        return {"content": [_token(e, alternatives) for e in piece.entries], "refusal": None}


def _token(entry: Entry, alternatives: int) -> dict[str, Any]:
    top = zip((entry.top or {}).items(), entry.top_contents, strict=True)
    return {
        **_named(entry.name, LEAST if entry.logprob is None else entry.logprob, entry.content),
        "top_logprobs": [_named(*item, content) for item, content in top][:alternatives],
    }


def _named(name: str, logprob: float, content: bytes) -> dict[str, Any]:
    return {"token": name, "logprob": max(logprob, LEAST), "bytes": list(content)}
