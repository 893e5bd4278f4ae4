"""The API over HTTP. It parses, passes on to the `Service`, and writes; it imports no JAX."""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from transformer_vq.engine.scheduler import Snapshot
from transformer_vq.errors import UserError
from transformer_vq.serve.completion import Completion
from transformer_vq.serve.guard import Guard, error_response
from transformer_vq.serve.metrics import Metrics
from transformer_vq.serve.protocol import (
    NAME,
    ApiError,
    CompletionRequest,
    DetokenizeRequest,
    StateRequest,
    TokenizeRequest,
    validation_error,
)
from transformer_vq.serve.service import Service, no_room, no_state
from transformer_vq.serve.states import StoreFull

PING = 15.0  # seconds of silence after which a stream says that it lives
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")}
PAGE["/page.js"] = ("page.js", "text/javascript")


def make_app(service: Service, *, keys: Sequence[str] = (), local: bool = True) -> FastAPI:
    """The application.

    Args:
      service: what answers; bound to the loop that the application starts in.
      keys: of which a client must send one; none: everybody may ask.
      local: only for hosts that mean this machine, so that no page of another can ask.
    """
    app = FastAPI(
        title="Transformer-VQ", version=version("transformer-vq"), docs_url=None, redoc_url=None
    )
    metrics = Metrics(service)
    app.add_middleware(Guard, service=service, keys=keys, local=local, metrics=metrics)
    _add_errors(app)
    _add_status(app, service, metrics, needs_key=bool(keys))
    _add_page(app)
    _add_completions(app, service, metrics)
    for prefix in ("", "/v1"):
        _add_tokenizer(app, service, prefix)
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
        return error_response(ApiError(error.status_code, said))

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

    @app.get("/metrics")
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
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts, as OpenAI's API does."""
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        completion = await service.complete(body, request.state.owner, seed)
        if body.stream:
            return EventStream(completion, metrics)
        answer = asyncio.ensure_future(completion.whole())
        try:
            await _first(answer, request.receive)
        finally:
            if not answer.done():
                answer.cancel()
                completion.cancel()
        if answer.cancelled() or not answer.done():
            return Response(status_code=499)  # nobody is there to read it
        content = answer.result()
        metrics.completed(completion)
        return JSONResponse(content)

    @app.post("/v1/chat/completions")
    async def chat() -> Response:
        """Not for models that continue text."""
        raise ApiError(
            404,
            "this model continues text and knows no chat template: use /v1/completions",
            code="no_chat_template",
        )


async def _first(answer: "asyncio.Future[Any]", receive: Receive) -> None:
    """Wait until there is an answer, or nobody who waits for it."""
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a completion; it ends when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, completion: Completion, metrics: Metrics):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._completion, self._metrics = completion, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        try:
            await _first(writing, receive)
            if writing.done():
                writing.result()
        except OSError:  # the client has gone in the middle of a write
            pass
        finally:
            writing.cancel()
            self._completion.cancel()

    async def _write(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def line(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            async for chunk in _or_ping(self._completion.chunks()):
                await line(f"data: {json.dumps(chunk)}\n\n" if chunk else ": ping\n\n")
            self._metrics.completed(self._completion)
        except ApiError as error:
            await line(f"data: {json.dumps(error.content)}\n\n")
        await line("data: [DONE]\n\n", more=False)


async def _or_ping(
    chunks: AsyncIterator[dict[str, Any]],
) -> AsyncIterator[dict[str, Any] | None]:
    """The chunks; None after every while in which there was none."""
    following = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(chunks, None))
            done, _ = await asyncio.wait((following,), timeout=PING)
            if not done:
                yield None
                continue
            chunk, following = following.result(), None
            if chunk is None:
                return
            yield chunk
    finally:
        if following is not None:
            following.cancel()


# Text and tokens.


def _add_tokenizer(app: FastAPI, service: Service, prefix: str) -> None:
    @app.post(f"{prefix}/tokenize", include_in_schema=not prefix)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text."""
        service.require_model(body.model)
        tokens = service.encode(body.prompt)
        return {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": service.ready.capacity,
        }

    @app.post(f"{prefix}/detokenize", include_in_schema=not prefix)
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens; bytes that are no text are U+FFFD."""
        service.require_model(body.model)
        service.check_tokens("tokens", body.tokens)
        return {"prompt": service.ready.tokenizer.decode_text(body.tokens)}

    @app.get(f"{prefix}/tokenizer_info", include_in_schema=not prefix)
    async def tokenizer_info() -> dict[str, Any]:
        """What the vocabulary is."""
        tokenizer = service.ready.tokenizer
        return {
            "tokenizer_class": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eos_token": tokenizer.decode_text([tokenizer.eos_id]),
            "eos_token_id": tokenizer.eos_id,
            "bos_token": None,
            "pad_token": None,
            "chat_template": None,
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

    @app.get("/v1/states/{name}/file")
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
