"""A real server, as a process of its own."""

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import TVQ, make_run

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")
pytest.importorskip("openai", reason="NOT TESTED: the openai client is not installed")

import httpx
from httpx._config import DEFAULT_TIMEOUT_CONFIG

for part in ("connect", "read", "write", "pool"):  # 5 seconds are little on a busy machine
    setattr(DEFAULT_TIMEOUT_CONFIG, part, 60.0)

KEYS = ("first-key", "second-key")


class Server:
    """`tvq serve` of an untrained model with two slots and a queue of four, ready for requests."""

    def __init__(self, folder: Path, env: dict[str, str], *options: str):
        self.folder, self.run = folder, folder / "run"
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._err = open(folder / "err", "w+")  # noqa: SIM115 (as long as the process)
        arguments = ["--run", self.run, "--port", port, "--slots", 2, "--max-queue", 4]
        arguments += ["--prompt-chunk", 16, "--exact", "--api-key-file", folder / "keys"]
        arguments += ["--state-dir", folder / "states", "--state-disk", 10, *options]
        self.process = subprocess.Popen(
            [TVQ, "serve", *map(str, arguments)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=self._err,
            text=True,
        )
        self._started = self._err.tell()
        self._clients: list[Any] = []

    def wait(self) -> "Server":
        """Until requests are taken."""
        assert self.process.stdout
        self.said = self.process.stdout.readline()
        assert self.said, self.errors()
        self._started = os.path.getsize(self.folder / "err")
        return self

    def errors(self, *, since_ready: bool = False) -> str:
        """What it has written to standard error."""
        text = (self.folder / "err").read_text()
        return text[self._started :] if since_ready else text

    def client(self, key: str = KEYS[0], **options):
        """The OpenAI client, unmodified; it is closed with the server."""
        import openai

        self._clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options))
        return self._clients[-1]

    def metric(self, name: str) -> float:
        """A number of `/metrics`."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    def becomes(self, name: str, value: float) -> bool:
        """Wait for a number of `/metrics`."""
        for _ in range(1200):
            if self.metric(name) == value:
                return True
            time.sleep(0.05)
        return False

    def close(self) -> None:
        """The end of it, if it has not ended."""
        for client in self._clients:
            client.close()
        self.process.kill()
        self.process.communicate()
        self._err.close()


def auth(key=KEYS[0]):
    return {"Authorization": f"Bearer {key}"}


def complete(server, key=KEYS[0], **fields):
    """A response as it is, by `httpx`."""
    return httpx.post(
        f"{server.url}/v1/completions",
        json=fields,
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )


def endless(server, **fields):
    """A stream that has begun and goes on for ever, until it is closed."""
    stream = server.client(max_retries=0).completions.create(
        model="run", prompt="x", max_tokens=10**8, stream=True, **fields
    )
    next(stream)
    return stream


@pytest.fixture(scope="module")
def server_env(tmp_path_factory):
    """A user's environment, in which little is optimised and a second start compiles nothing."""
    cache = tmp_path_factory.mktemp("cache")
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_LOG_COMPILES": "1",
        "TVQ_CACHE": str(cache),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory, server_env):
    folder = tmp_path_factory.mktemp("serve")
    make_run(folder / "run")
    (folder / "keys").write_text("\n".join(KEYS) + "\n\n")
    made = Server(folder, server_env)
    try:
        yield made.wait()
    finally:
        made.close()


@pytest.fixture(scope="module")
def replica(server, server_env, tmp_path_factory):
    """Another server of the same run, with the same keys and the same folder of states."""
    folder = tmp_path_factory.mktemp("replica")
    for name in ("run", "keys", "states"):
        (folder / name).symlink_to(server.folder / name)
    made = Server(folder, server_env)
    try:
        yield made.wait()
    finally:
        made.close()
