"""What every request passes before it is looked at: hosts, keys, sizes."""

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transformer_vq.serve.metrics import Metrics
from transformer_vq.serve.protocol import ApiError
from transformer_vq.serve.service import Service

MOST_BODY = 8 << 20  # bytes of a request
BODY = 60.0  # seconds of silence in the middle of one
OPEN = ("/", "/page.css", "/page.js", "/health", "/ready", "/version", "/metrics")  # without a key
LOCAL = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Hosts, keys and sizes of requests; counts what was answered. Plain ASGI.

    (Starlette's own kind of middleware hides that a client has gone.)
    """

    def __init__(
        self, app: ASGIApp, service: Service, keys: Sequence[str], local: bool, metrics: Metrics
    ):
        self._app, self._service, self._local, self._metrics = app, service, local, metrics
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._service.bind()
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        limit = self._limit(scope)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(message["status"])
            await send(message)

        try:
            self._check_host(headers)
            scope["state"] = {**scope.get("state", {}), "owner": self._owner(scope, headers)}
            if int(headers.get(b"content-length", "0") or 0) > limit:
                raise _too_large(limit)
        except ApiError as error:
            await error_response(error)(scope, receive, counted)
            return
        size, whole = 0, False

        async def limited() -> Message:
            nonlocal size, whole
            try:
                async with asyncio.timeout(None if whole else BODY):
                    message = await receive()
            except TimeoutError:
                said = f"nothing has come of the request for {BODY:g} seconds"
                raise HTTPException(408, said, {"Connection": "close"}) from None
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, _too_large(limit).message)
            return message

        await self._app(scope, limited, counted)

    def _limit(self, scope: Scope) -> int:
        """Bytes that a request may have; the file of a state is as large as a state."""
        loaded = self._service.loaded
        if scope["method"] == "PUT" and scope["path"].startswith("/v1/states/") and loaded:
            return loaded.store.row_bytes + (17 << 20)
        return MOST_BODY

    def _check_host(self, headers: dict[bytes, str]) -> None:
        host = headers.get(b"host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._local and name not in LOCAL:
            raise ApiError(
                403,
                f"the host is {host!r}, and this server is for this machine alone: ask for "
                f"127.0.0.1, or start it with --host",
                code="wrong_host",
            )

    def _owner(self, scope: Scope, headers: dict[bytes, str]) -> str:
        """Whose request it is: what states are kept apart by. Raises `ApiError` (401)."""
        if not self._keys or scope["path"] in OPEN:
            return ""
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        key = given.strip().encode("latin-1")
        same = [hmac.compare_digest(key, known) for known in self._keys]  # all, in equal time
        if kind.lower() != "bearer" or not any(same):
            message = "the API key is missing or wrong: send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
        return hashlib.sha256(key).hexdigest()[:16]


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request has more than {limit:,} bytes", code="too_large")


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response, with what a client should do about it."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(error.content, error.status, headers)
