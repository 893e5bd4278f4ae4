"""The server as a process: it listens at once, and drains when it is told to end."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from transformer_vq.engine.engine import Engine
from transformer_vq.errors import UserError
from transformer_vq.serve.service import Service

LET_GO = 10.0  # seconds that the engine has for its last step
# Seconds that a connection stays open while it asks nothing: longer than clients and balancers (a
# minute, mostly) keep theirs, or they send a request into one that is just being closed.
KEEP_ALIVE = 75


def listen(host: str, port: int) -> socket.socket:
    """A socket. Raises `UserError` if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen at {host}, port {port}: {why}; choose another --port or --host"
        ) from None
    # Connections inherit it: what is written is sent at once. Without it the body of an answer
    # waits until the client has acknowledged its head, which takes 40 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def run(
    app: FastAPI,
    service: Service,
    engine: Engine,
    sock: socket.socket,
    *,
    drain: float,
    ready: Callable[[], None],
) -> int:
    """Serve until a signal: the exit status. The first signal drains, a second one aborts.

    Raises what made the engine fail, in loading or later, and what `ready` raises.
    """
    server = _Server(app, service, drain)
    service.engine = engine
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.go(engine, sock, ready))
    sock.close()
    if not engine.close(LET_GO):  # it compiles, or the device hangs: nobody can end that thread
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(server.status)
    if server.error is not None:
        raise server.error
    return server.status


class _Connection(H11Protocol):
    """A connection, which ends if a request does not come to the end of its headers."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _look(self) -> None:
        """The clock runs while headers are awaited (after an answer, uvicorn has its own)."""
        awaited = self.cycle is None or self.cycle.response_complete
        if awaited and self._late is None:
            self._late = self.loop.call_later(KEEP_ALIVE, self.transport.close)
        elif not awaited and self._late is not None:
            self._late.cancel()
            self._late = None


class _Server(uvicorn.Server):
    """Uvicorn, with our own way to end."""

    def __init__(self, app: FastAPI, service: Service, drain: float):
        config = uvicorn.Config(
            app,
            log_config=None,  # errors go to standard error, as all of ours
            access_log=False,  # prompts are nobody's business
            lifespan="off",
            server_header=False,
            http=_Connection,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self._service, self._drain = service, drain
        self.status = 0
        self.error: Exception | None = None
        self._ending: asyncio.Task[None] | None = None

    async def go(self, engine: Engine, sock: socket.socket, ready: Callable[[], None]) -> None:
        """Serve; `ready` is called once requests are taken."""
        self._loop = asyncio.get_running_loop()
        self._service.bind()
        engine.on_ready = lambda: self._soon(self._begin, ready)
        engine.on_end = lambda error: self._soon(self._failed, error)
        engine.start()
        await self.serve([sock])

    def _soon(self, call: Callable[..., None], *args: Any) -> None:
        """A call in the loop, from another thread; nothing if the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def _begin(self, ready: Callable[[], None]) -> None:
        try:
            ready()
        except Exception as error:  # say, the output is full
            self._failed(error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. (Uvicorn would end all connections, and then itself by the same signal.)"""
        if self._service.draining:
            self.status = 128 + sig
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._soon(self._begin_to_end)

    def _begin_to_end(self) -> None:
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        """Wait until everything is answered, but no longer than we may."""
        try:
            async with asyncio.timeout(self._drain):
                while self._service.busy:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            self._service.give_up("the server is shutting down")
        await asyncio.sleep(0.05)  # last words are on their way
        self.should_exit = True

    def _failed(self, error: Exception | None) -> None:
        if error is None:
            return
        self._service.failed = True
        self.status, self.error = 1, error
        self._service.draining = True
        self._drain = 1.0
        self._begin_to_end()
