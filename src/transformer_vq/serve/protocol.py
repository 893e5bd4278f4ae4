"""The API as types: what a request may say, what is checked of it, and how errors look."""

from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator

MOST_SAMPLES = 128  # of one prompt
MOST_PROMPTS = 256  # of one request
MOST_STOPS = 16  # texts that end an answer
MOST_ALTERNATIVES = 20  # ops.decode.TOP_LOGPROBS
MOST_SEED = 2**53 - 1 - MOST_SAMPLES  # JSON's numbers are exact up to there
NAME = r"^[A-Za-z0-9_-]{1,64}$"  # of a state

Text = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=NAME)]


def _as_read(value: Any, check: Any) -> Any:
    """What `body.parse` has made arrays was checked there, in slices."""
    return value if isinstance(value, np.ndarray) else check(value)


def _all_as_read(value: Any, check: Any) -> Any:
    """The same of one prompt or of several."""
    if isinstance(value, list) and value and all(isinstance(item, np.ndarray) for item in value):
        return value
    return _as_read(value, check)


# Lists are given up at the first item that does not fit: a prompt may have millions.
_Tokens = Annotated[list[Token], Field(fail_fast=True)]
Tokens = Annotated[_Tokens, WrapValidator(_as_read)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Prompt = Annotated[
    str | Texts | _Tokens | Annotated[list[_Tokens], Field(fail_fast=True)],
    WrapValidator(_all_as_read),
]


class ApiError(Exception):
    """An answer with an error, as OpenAI's API gives it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def content(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


class ErrorContent(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An answer with an error."""

    error: ErrorContent


class Strict(BaseModel):
    """No field that is not known, no value of another type; null is as if it were left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Strict):
    """What a stream has beside the answer."""

    include_usage: bool = False


class Sampled(Strict):
    """What completions of text and of chats have in common."""

    model: str | None = Field(None, description="the id of the model, as /v1/models has it")
    n: int = Field(1, ge=1, le=MOST_SAMPLES, description="answers to each prompt")
    stop: Text | list[Text] = Field([], description="texts before which an answer ends")
    seed: int | None = Field(None, ge=0, le=MOST_SEED, description="the n-th answer has seed + n")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    logit_bias: dict[str, float] = Field({}, description="by token id, from -100 to 100")
    presence_penalty: float = Field(0.0, ge=-100, le=100)
    frequency_penalty: float = Field(0.0, ge=-100, le=100)
    user: str | None = Field(None, description="has no effect")
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    typical_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=1e6)
    stop_token_ids: list[Token] = Field([], max_length=7)
    ignore_eos: bool = Field(False, description="go on where the model ends a document")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    return_token_ids: bool = False
    include_stop_str_in_output: bool = False
    cache: Literal["exact", "any", "off"] | None = Field(
        None, description="which states of known prompts may be used"
    )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        if len(self.stops) > MOST_STOPS:
            raise ValueError(f"stop has {len(self.stops)} texts: at most {MOST_STOPS} are allowed")
        for token, bias in self.logit_bias.items():
            if not (token.isascii() and token.isdecimal()):
                raise ValueError(f"logit_bias has {token!r}: its keys are token ids")
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias is {bias} for {token}: it must be from -100 to 100")
        return self


class CompletionRequest(Sampled):
    """`POST /v1/completions`: OpenAI's fields but `suffix`, and some more."""

    prompt: Prompt = Field("", description="text, texts, tokens, or lists of tokens")
    max_tokens: int = Field(16, ge=0, le=2**31 - 1, description="tokens to write; 0: none")
    best_of: int | None = Field(
        None, ge=1, le=MOST_SAMPLES, description="answers of which the n most probable are given"
    )
    echo: bool = Field(False, description="the prompt comes before the answer")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="log-probabilities, with so many alternatives"
    )
    state: Name | None = Field(None, description="a state that the prompt goes on from")
    save_state: Name | None = Field(None, description="keep the state after the answer")

    @property
    def samples(self) -> int:
        """How many answers are written for each prompt."""
        return max(self.n, self.best_of or 0)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, and n is {self.n}: it must be n or more")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError("best_of is larger than n: then nothing can be streamed")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}: it must be at most max_tokens, {self.max_tokens}"
            )
        if self.save_state is not None and self.samples > 1:
            raise ValueError("save_state keeps one state: n and best_of must be 1")
        return self


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """What somebody has said in a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = ""
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`: OpenAI's fields for text without tools."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="tokens to write")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="the same")
    logprobs: bool = False
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="so many alternatives, with logprobs"
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given without logprobs: set logprobs to true")
        return self


class TokenizeRequest(Strict):
    """`POST /tokenize`."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = Field(True, description="has no effect: there are none to add")


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Tokens


class StateRequest(Strict):
    """`POST /v1/states`: read a prompt, after a state or after nothing, and keep what it leaves."""

    name: Name
    prompt: Annotated[str | _Tokens, WrapValidator(_as_read)] = ""
    state: Name | None = None


# Answers, as /openapi.json has them.


class Usage(BaseModel):
    """What was counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]


class Answer(BaseModel):
    """What answers to completions of text and of chats have in common."""

    id: str
    created: int
    model: str
    seed: int
    usage: Usage


class Choice(BaseModel):
    """The same of each of their answers."""

    index: int
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] = Field([], description="with return_token_ids")


class Logprobs(BaseModel):
    """Log-probabilities of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    top_token_ids: list[list[int]] = Field([], description="with return_token_ids")


class TextChoice(Choice):
    """An answer."""

    text: str
    logprobs: Logprobs | None


class CompletionAnswer(Answer):
    """The answers to `POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatToken(BaseModel):
    """A token of an answer to a chat."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[dict[str, Any]] = []


class ChatChoice(Choice):
    """An answer to a chat."""

    message: dict[Literal["role", "content", "refusal"], str | None]
    logprobs: dict[Literal["content", "refusal"], list[ChatToken] | None] | None


class ChatAnswer(Answer):
    """The answers to `POST /v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


def validation_error(error: dict[str, Any]) -> ApiError:
    """The first thing that pydantic finds wrong, as a sentence that names the field."""
    where = [str(part) for part in error["loc"] if part != "body"]
    param = where[0] if where else None
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    if error["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"there is no field {'.'.join(where)}: leave it out",
            param=param,
            code="unknown_field",
        )
    if error["type"] == "missing":
        name = param or "a body"
        return ApiError(400, f"{name} is missing", param=param, code="missing")
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        known = text.split(" ", 1)[0]
        return ApiError(400, text, param=param or known, code="invalid_value")
    if param == "prompt":
        text = "prompt must be text, a list of texts, tokens, or a list of lists of tokens"
        return ApiError(400, text, param=param, code="invalid_value")
    if param is None and error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        text = "the body must be a JSON object, sent with the header Content-Type: application/json"
        return ApiError(400, text, code="invalid_value")
    said = error["msg"][0].lower() + error["msg"][1:]
    return ApiError(400, f"{param or 'the body'}: {said}", param=param, code="invalid_value")
