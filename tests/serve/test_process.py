"""How a server ends, without a model: its engine fails, or is still loading."""

import contextlib
import errno
import os
import signal
import socket
import threading
from unittest.mock import MagicMock

import pytest

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")

import httpx
import uvicorn
from uvicorn.server import ServerState

from tests.serve.fakes import loaded
from transformer_vq.engine.engine import Engine
from transformer_vq.errors import UserError
from transformer_vq.serve.process import KEEP_ALIVE, _Connection, listen, run
from transformer_vq.serve.server import make_app
from transformer_vq.serve.service import Service


class Client(threading.Thread):
    """Does something with the server's address, beside it. A server that should end by that ends
    by a signal else: the test fails, and does not wait for ever."""

    def __init__(self, act, sock):
        super().__init__(daemon=True)
        self._act, self._url = act, f"http://127.0.0.1:{sock.getsockname()[1]}"
        self.found, self.over = [], threading.Event()

    def run(self):
        self._act(self._url, self.found)
        if not self.over.wait(20):
            os.kill(os.getpid(), signal.SIGTERM)


def serve(make, act):
    """Run a server in this thread: its status and what the client found."""
    service, sock = Service(), listen("127.0.0.1", 0)
    engine = Engine(lambda: make(service), service.deliver)
    client = Client(act, sock)
    app = make_app(service)
    try:
        status = run(app, service, engine, sock, drain=5, ready=client.start)
    except Exception as error:
        status = error
    client.over.set()
    if client.ident:
        client.join(30)
    return status, client.found


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(stream):
    """Who waits is told, and the error comes out of `run`."""

    def ask(url, found):
        body = {"prompt": "x", "stream": stream, "max_tokens": 8}
        found.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30))

    status, (response,) = serve(loaded, ask)
    assert isinstance(status, RuntimeError) and str(status) == "the device has gone"
    assert "the engine has ended" in response.text
    assert response.status_code == (200 if stream else 500)
    if stream:
        assert response.text.startswith('data: {"error"')
        assert response.text.endswith("data: [DONE]\n\n")


def test_what_full_attention_cannot_hold_and_a_signal():
    """Nothing of it reaches the engine; then SIGTERM ends a server that has nothing to do."""

    def ask(url, found):
        body = {"prompt": "123", "max_tokens": 7}
        found.append(httpx.post(f"{url}/v1/completions", json=body).json()["error"])
        found.append(httpx.get(url).headers["content-security-policy"])
        found.append(httpx.get(f"{url}/page.js").status_code)
        found.append(httpx.get(f"{url}/metrics").text)
        os.kill(os.getpid(), signal.SIGTERM)

    status, (error, policy, page, metrics) = serve(loaded, ask)
    assert status == 0 and page == 200
    assert "would have 10 tokens" in error["message"] and "takes 9" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert 'tvq_responses_total{status="400"} 1.0' in metrics


def test_before_it_is_ready():
    """`/health` answers at once, nothing else; and what loading finds comes out."""

    def make(service):
        url = f"http://127.0.0.1:{port[0]}"
        for path in ("/health", "/ready", "/v1/models"):
            found.append(httpx.get(url + path, timeout=30))
        raise UserError("there is no such run")

    found, port = [], []
    service, sock = Service(), listen("127.0.0.1", 0)
    port.append(sock.getsockname()[1])
    engine = Engine(lambda: make(service), service.deliver)
    with pytest.raises(UserError, match="there is no such run"):
        run(make_app(service), service, engine, sock, drain=5, ready=lambda: None)
    assert [response.status_code for response in found] == [200, 503, 503]
    assert "the model is being loaded" in found[1].text and found[0].json()["model"] is None


def test_a_full_output_ends_it():
    """Nobody would know of its address."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    service, sock = Service(), listen("127.0.0.1", 0)
    engine = Engine(lambda: loaded(service), service.deliver)
    with pytest.raises(OSError, match="No space left on device"):
        run(make_app(service), service, engine, sock, drain=5, ready=full)


def test_what_is_written_is_sent_at_once():
    def delays(listening):
        with (
            contextlib.closing(listening),
            socket.create_connection(listening.getsockname()),
            listening.accept()[0] as accepted,
        ):
            return not accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert not delays(listen("127.0.0.1", 0))
    assert delays(socket.create_server(("127.0.0.1", 0)))  # control


def test_addresses_that_cannot_be_used():
    with pytest.raises(UserError, match=r"cannot listen at 192\.0\.2\.1, port 80: "):
        listen("192.0.2.1", 80)


def test_headers_that_never_end():
    """The clock runs from the start of a connection to the end of its first headers, and again
    while others come in pieces."""
    loop, transport = MagicMock(), MagicMock()
    loop.create_task.side_effect = lambda answer, **_: answer.close() or MagicMock()
    transport.get_extra_info.return_value = None
    connection = _Connection(uvicorn.Config(MagicMock(), log_config=None), ServerState(), {}, loop)
    connection.connection_made(transport)
    loop.call_later.assert_called_once_with(KEEP_ALIVE, transport.close)
    connection.data_received(b"GET /health HT")
    late = loop.call_later.return_value
    late.cancel.assert_not_called()
    connection.data_received(b"TP/1.1\r\nHost: localhost\r\n\r\n")
    late.cancel.assert_called_once_with()
    connection.cycle.response_complete = True
    connection.data_received(b"GET /")
    assert loop.call_later.call_count == 2
    connection.connection_lost(None)
    assert late.cancel.call_count == 2
