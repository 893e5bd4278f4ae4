"""An answer over HTTP, whole or as server-sent events, as long as somebody waits for it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from transformer_vq.serve.aside import aside, json_text
from transformer_vq.serve.completion import Completion
from transformer_vq.serve.metrics import Metrics
from transformer_vq.serve.protocol import ApiError

PING = 15.0  # seconds of silence after which a stream says that it lives


async def respond(
    completion: Completion, stream: bool, request: Request, metrics: Metrics
) -> Response:
    """The answers to a request. Raises `ApiError` if there are none."""
    if stream:
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
    size = completion.size
    return Response(await aside(size, json_text, content, size), media_type="application/json")


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
                if chunk is None:
                    await line(": ping\n\n")
                    continue
                size = self._completion.size
                await line(f"data: {await aside(size, _event, chunk, size)}\n\n")
            self._metrics.completed(self._completion)
        except ApiError as error:
            await line(f"data: {_event(error.content, 0)}\n\n")
        await line("data: [DONE]\n\n", more=False)


def _event(content: dict[str, Any], size: int) -> str:
    """JSON in ASCII: to some clients, letters such as U+2028 end a line, and so an event."""
    return json_text(content, size, ascii=True)


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
