"""The API over HTTP. It parses, passes on to the `Service`, and writes; it imports no JAX."""

import asyncio
import json
import re
import secrets
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from transformer_vq.engine.scheduler import Snapshot
from transformer_vq.errors import UserError
from transformer_vq.serve.aside import aside, json_list
from transformer_vq.serve.body import LargeBodies
from transformer_vq.serve.chat import ChatCompletion, ChatTemplate, completion_of
from transformer_vq.serve.guard import Guard, error_response
from transformer_vq.serve.metrics import Metrics
from transformer_vq.serve.protocol import (
    NAME,
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    DetokenizeRequest,
    ErrorAnswer,
    Sampled,
    StateRequest,
    TokenizeRequest,
    validation_error,
)
from transformer_vq.serve.respond import respond
from transformer_vq.serve.service import Service, no_room, no_state
from transformer_vq.serve.states import StoreFull

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Documented = dict[int | str, dict[str, Any]]
ERROR: dict[str, Any] = {"model": ErrorAnswer, "description": "an error"}
FILE: Documented = {200: {"content": {"application/octet-stream": {}}}}
STREAM = {"text/event-stream": {}}  # beside JSON
OF_TEXT: Documented = {200: {"model": CompletionAnswer, "content": STREAM}}
OF_CHAT: Documented = {200: {"model": ChatAnswer, "content": STREAM}}
PAGE = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")}
PAGE["/page.js"] = ("page.js", "text/javascript")


def make_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    local: bool = True,
    template: ChatTemplate | None = None,
) -> FastAPI:
    """The application.

    Args:
      service: what answers; bound to the loop that the application starts in.
      keys: of which a client must send one; none: everybody may ask.
      local: only for hosts that mean this machine, so that no page of another can ask.
      template: makes prompts of chats; None: there are no chats.
    """
    app = FastAPI(
        title="Transformer-VQ",
        version=version("transformer-vq"),
        docs_url=None,
        redoc_url=None,
        responses={"4XX": ERROR, "5XX": ERROR},
    )
    app.router.route_class = LargeBodies
    metrics = Metrics(service)
    app.add_middleware(Guard, service=service, keys=keys, local=local, metrics=metrics)
    _add_errors(app)
    _add_status(app, service, metrics, needs_key=bool(keys))
    _add_page(app)
    _add_completions(app, service, metrics)
    _add_chat(app, service, metrics, template)
    for prefix in ("", "/v1"):
        _add_tokenizer(app, service, prefix, template)
    _add_states(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    """Every error has the form of the API's."""

    async def of_api(_: Request, error: Any) -> Response:
        return error_response(error)

    async def of_validation(_: Request, error: Any) -> Response:
        return error_response(validation_error(error.errors()[0]))

    async def of_http(_: Request, error: Any) -> Response:
        said = error.detail if error.status_code != 404 else "there is nothing at this address"
        response = error_response(ApiError(error.status_code, said))
        response.headers.update(error.headers or {})  # which methods there are, with a 405
        return response

    async def of_program(_: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "this is a fault of the server", code="fault"))

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, of_program)


# How it is, and the page.


def _add_status(app: FastAPI, service: Service, metrics: Metrics, *, needs_key: bool) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the server lives."""
        if service.failed:
            return error_response(ApiError(503, "the engine has failed", code="engine_failed"))
        loaded = service.loaded
        about = {"model": loaded.name if loaded else None, "needs_key": needs_key}
        return JSONResponse({"status": "ok", **about})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken."""
        return JSONResponse({"status": "ready", "model": service.ready.name})

    @app.get("/version")
    async def version_() -> dict[str, str]:
        """Of this program."""
        return {"version": version("transformer-vq")}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=metrics.media_type)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """The same, by its id."""
        service.require_model(name)
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    loaded = service.ready
    return {
        "id": loaded.name,
        "object": "model",
        "created": loaded.created,
        "owned_by": "transformer-vq",
        "max_model_len": loaded.capacity,  # null: any number of tokens
        "state_bytes": loaded.store.row_bytes,
    }


def _add_page(app: FastAPI) -> None:
    """The page to play on, as it is in the package."""
    folder = files("transformer_vq.serve") / "page"
    headers = {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    for path, (name, kind) in PAGE.items():
        content = (folder / name).read_bytes()

        def send(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers=headers)

        app.add_api_route(path, send, include_in_schema=False)


# Completions.


def _add_completions(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.post("/v1/completions", responses=OF_TEXT)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts, as OpenAI's API does."""
        completion = await service.complete(body, request.state.owner, _seed(body))
        return await respond(completion, body.stream, request, metrics)


def _add_chat(
    app: FastAPI, service: Service, metrics: Metrics, template: ChatTemplate | None
) -> None:
    path = "/v1/chat/completions"
    if template is None:

        @app.post(path, include_in_schema=False)
        async def no_chat() -> Response:
            """Not for models that continue text."""
            raise ApiError(
                404,
                "this server has no chat template, so it only continues text: use "
                "/v1/completions, or start it with --chat-template",
                code="no_chat_template",
            )

        return

    @app.post(path, responses=OF_CHAT)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a chat, as OpenAI's API does."""
        size = sum(len(message.text) for message in body.messages)
        of_text = await aside(size, completion_of, service, template, body)
        owner = request.state.owner
        completion = await service.complete(of_text, owner, _seed(body), ChatCompletion)
        return await respond(completion, body.stream, request, metrics)


def _seed(body: Sampled) -> int:
    return secrets.randbelow(2**32) if body.seed is None else body.seed


# Text and tokens.


def _add_tokenizer(
    app: FastAPI, service: Service, prefix: str, template: ChatTemplate | None
) -> None:
    @app.post(f"{prefix}/tokenize", include_in_schema=not prefix)
    async def tokenize(body: TokenizeRequest) -> Any:
        """The tokens of a text; of `eos_token` of `/tokenizer_info` alone, that token."""
        service.require_model(body.model)
        if body.prompt == service.eos_text:
            return answer(np.array([service.ready.tokenizer.eos_id]))
        return await aside(len(body.prompt), lambda: answer(service.encode(body.prompt)))

    def answer(tokens: np.ndarray) -> Response:
        rest = {"count": len(tokens), "max_model_len": service.ready.capacity}
        content = f'{{"tokens":{json_list(tokens)},{json.dumps(rest)[1:]}'
        return Response(content, media_type="application/json")

    @app.post(f"{prefix}/detokenize", include_in_schema=not prefix)
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens; bytes that are no text are U+FFFD."""
        service.require_model(body.model)
        return await aside(len(body.tokens), text_of, body.tokens)

    def text_of(given: Any) -> dict[str, str]:
        tokens = service.tokens("tokens", given)
        return {"prompt": service.ready.tokenizer.decode_text(tokens)}

    @app.get(f"{prefix}/tokenizer_info", include_in_schema=not prefix)
    async def tokenizer_info() -> dict[str, Any]:
        """What the vocabulary is."""
        tokenizer = service.ready.tokenizer
        return {
            "tokenizer_class": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eos_token": service.eos_text,
            "eos_token_id": tokenizer.eos_id,
            "bos_token": None,
            "pad_token": None,
            "chat_template": template.source if template else None,
        }


# States.


def _add_states(app: FastAPI, service: Service) -> None:
    def described(name: str, snapshot: Snapshot) -> dict[str, Any]:
        size = service.ready.store.row_bytes
        return {"id": name, "object": "state", "tokens": snapshot.position, "bytes": size}

    def checked(name: str) -> str:
        if not re.fullmatch(NAME, name):
            message = f"the name of a state is {name!r}: give 1 to 64 of A-Z a-z 0-9 _ -"
            raise ApiError(400, message, param="name", code="invalid_value")
        return name

    @app.post("/v1/states")
    async def make_state(body: StateRequest, request: Request) -> dict[str, Any]:
        """Read a prompt, and keep the state that it leaves."""
        snapshot = await service.make_state(body, request.state.owner)
        return described(body.name, snapshot)

    @app.get("/v1/states")
    async def states(request: Request) -> dict[str, Any]:
        """The names of all states of this key."""
        names = await asyncio.to_thread(service.ready.store.names, request.state.owner)
        return {"object": "list", "data": [{"id": name, "object": "state"} for name in names]}

    @app.get("/v1/states/{name}")
    async def state(name: str, request: Request) -> dict[str, Any]:
        """What a state is."""
        owner = request.state.owner
        return described(name, await service.named(owner, checked(name)))

    @app.delete("/v1/states/{name}")
    async def delete_state(name: str, request: Request) -> dict[str, Any]:
        """Forget a state."""
        store, owner = service.ready.store, request.state.owner
        if not await asyncio.to_thread(store.delete, owner, checked(name)):
            raise no_state(name)
        return {"id": name, "object": "state", "deleted": True}

    @app.get("/v1/states/{name}/file", response_class=Response, responses=FILE)
    async def state_file(name: str, request: Request) -> Response:
        """A state as the file that `tvq sample --state` reads."""
        store, owner = service.ready.store, request.state.owner
        data = await asyncio.to_thread(store.data, owner, checked(name))
        if data is None:
            raise no_state(name)
        headers = {"Content-Disposition": f'attachment; filename="{name}.tvq"'}
        return Response(data, media_type="application/octet-stream", headers=headers)

    @app.put("/v1/states/{name}/file")
    async def put_state_file(name: str, request: Request) -> dict[str, Any]:
        """Keep a state that comes as a file."""
        store, owner = service.ready.store, request.state.owner
        data = await request.body()
        try:
            snapshot = await asyncio.to_thread(store.put, owner, checked(name), data)
        except (StoreFull, OSError) as error:
            raise no_room(error) from None
        except UserError as error:
            other = type(error).__name__ == "OtherModel"
            code = "other_model" if other else "damaged"
            raise ApiError(409 if other else 400, str(error), code=code) from None
        return described(name, snapshot)
