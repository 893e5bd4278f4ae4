"""Servers for clients that are tested as they are. `make test-clients` runs this.

It runs in an environment of its own, without JAX: `tvq serve` is a process of the project's, whose
command TVQ names.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TVQ = Path(os.environ.get("TVQ") or ROOT / ".venv/bin/tvq").absolute()
# Telemetry and downloads have no place in tests.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
TEMPLATE = """{%- set stop = ["\\n\\nUser:"] -%}
{%- for message in messages %}{{ message.role | capitalize }}: {{ message.content }}

{% endfor %}Assistant:"""


class Server:
    """`tvq serve` of a model, ready for requests."""

    def __init__(self, run: Path, folder: Path, *options: str):
        self.run = run
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.url = f"{self.address}/v1"
        self._err = open(folder / "err", "w+")  # noqa: SIM115 (as long as the process)
        given = ["--run", run, "--port", port, "--prompt-chunk", 16, "--exact", *options]
        self.process = subprocess.Popen(
            [TVQ, "serve", *map(str, given)],
            env=_environment(folder.parent),
            stdout=subprocess.PIPE,
            stderr=self._err,
            text=True,
        )
        assert self.process.stdout
        self.said = self.process.stdout.readline()  # once requests are taken
        assert self.said, (folder / "err").read_text()

    def close(self) -> None:
        """The end of it: it has nothing left to do, and nothing was wrong but what was sent."""
        self.process.terminate()
        status = self.process.wait(60)
        self._err.seek(0)
        usual = ("tvq: loading ", "Invalid HTTP request")
        said = "".join(x for x in self._err if not any(part in x for part in usual))
        self._err.close()
        assert (status, said) == (0, "")


def _environment(cache: Path) -> dict[str, str]:
    """Of the project's processes: programs are made quickly, and once."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    return {
        **os.environ,
        "XLA_FLAGS": flags.strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TVQ_CACHE": str(cache / "cache"),
    }


def project(folder: Path, *arguments: str, given: object = None) -> str:
    """What `tests/clients/project.py` prints."""
    python = TVQ.with_name("python")
    command = [python, "-m", "tests.clients.project", *arguments]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=_environment(folder),
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    assert TVQ.is_file(), f"there is no {TVQ}: `make test-clients` makes it"
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="session")
def runs(folder):
    """Folders of two untrained models: `bytes`, and `bpe` with a vocabulary of 400 tokens."""
    project(folder, "make", str(folder))
    return folder


@contextlib.contextmanager
def serving(run: Path, name: str, *options: str):
    """A server, and a folder of its own."""
    folder = run.parent / name
    folder.mkdir()
    server = Server(run, folder, *options)
    try:
        yield server
    except BaseException:
        server.process.kill()
        raise
    server.close()


@pytest.fixture(scope="session")
def server(runs):
    """The model of bytes, which chats too."""
    options = ("--slots", "4", "--max-queue", "8", "--chat-template", TEMPLATE)
    with serving(runs / "bytes", "serve-bytes", *options) as server:
        yield server


@pytest.fixture(scope="session")
def bpe_server(runs):
    with serving(runs / "bpe", "serve-bpe", "--slots", "4") as server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser of the system's packages. Skips where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        pytest.skip("NOT TESTED: there is no chromium; apt install chromium")
    return found
