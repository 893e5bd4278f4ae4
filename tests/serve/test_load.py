"""Many clients at once, well-behaved and not: nothing is lost, and nothing stays behind."""

import asyncio
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.helpers import make_run
from tests.serve.conftest import KEYS, Server

pytestmark = pytest.mark.slow
CLIENTS, JOBS = 500, 40
HEADERS = {"Authorization": f"Bearer {KEYS[0]}"}
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def busy(tmp_path_factory, server_env):
    """A server with room for all, and 2 MB for the states that it keeps."""
    folder = tmp_path_factory.mktemp("busy")
    make_run(folder / "run")
    (folder / "keys").write_text("\n".join(KEYS))
    options = ("--slots", "4", "--max-queue", "600", "--state-cache", "2")
    made = Server(folder, server_env, *options)
    try:
        yield made.wait()
    finally:
        made.close()


def job(i: int) -> dict:
    rng = random.Random(i)
    prompt = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 200)))
    return dict(prompt=prompt, seed=i, max_tokens=rng.randint(1, 80))


def address(server) -> tuple[str, int]:
    return "127.0.0.1", int(server.url.rsplit(":", 1)[1])


def raw(body: str) -> bytes:
    """A request as bytes."""
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    head += ["Content-Type: application/json", f"Authorization: {HEADERS['Authorization']}"]
    return "\r\n".join([*head, "", body]).encode()


async def streamed(client, server, body, *, pause=0.0, most=None):
    """The text of a stream, read with pauses, and closed after so many chunks."""
    text, count = "", 0
    async with client.stream(
        "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, headers=HEADERS
    ) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = httpx.Response(200, content=line[6:]).json()
            text += chunk["choices"][0]["text"]
            count += 1
            if count == most:
                return None
            await asyncio.sleep(pause)
    return text


async def whole(client, server, body):
    response = await client.post(f"{server.url}/v1/completions", json=body, headers=HEADERS)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


async def cut_short(server, rng):
    """Half of a request, or a whole one of which nothing is read; then a reset."""
    port = int(server.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"prompt": "x", "max_tokens": 100000, "stream": true}'
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    )
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    content = head.encode() + body
    writer.write(content[: rng.choice([20, len(head) + 5, len(content)])])
    await writer.drain()
    await asyncio.sleep(rng.random())
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def one(client, server, i, alone):
    """A client: what it got that is not what it should have got."""
    rng = random.Random(1000 + i)
    await asyncio.sleep(2 * rng.random())
    body, expected = job(i % JOBS), alone[i % JOBS]
    long = {**body, "max_tokens": 100_000}
    kind = i % 6
    if kind == 0:
        found = await whole(client, server, body)
    elif kind == 1:
        found = await streamed(client, server, body)
    elif kind == 2:
        found = await streamed(client, server, body, pause=0.2)
    elif kind == 3:
        await streamed(client, server, long, most=rng.randint(1, 3))
        return []
    elif kind == 4:
        try:
            await asyncio.wait_for(whole(client, server, long), rng.random())
        except TimeoutError:
            return []
        return ["an answer of 100,000 tokens"]
    else:
        await cut_short(server, rng)
        return []
    return [] if found == expected else [(i, found, expected)]


KILLED = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key=sys.argv[2], max_retries=0)
streams = [
    client.completions.create(model="run", prompt="x", max_tokens=10**8, stream=True)
    for _ in range(6)
]
print("begun", flush=True)
for chunk in streams[0]:
    pass
"""


def complaints(server) -> list[str]:
    """What it has said since it was ready, but for what JAX tells of its work."""
    lines = server.errors(since_ready=True).splitlines()
    # It depends on what else is imported whether a line says who wrote it.
    told = [line.removeprefix("WARNING:jax._src.dispatch:") for line in lines]
    return [line for line in told if not line.startswith("Finished ")]


def open_files(server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def test_500_clients_at_once(busy):
    alone = []
    with httpx.Client(timeout=60) as client:
        for i in range(JOBS):
            answer = client.post(f"{busy.url}/v1/completions", json=job(i), headers=HEADERS)
            alone.append(answer.json()["choices"][0]["text"])
    assert len(set(alone)) > JOBS // 2
    files = open_files(busy)
    killed = [
        subprocess.Popen([sys.executable, "-c", KILLED, busy.url, KEYS[0]], stdout=subprocess.PIPE)
        for _ in range(2)
    ]

    async def all_of_them():
        # 500 clients, so 500 connections: none is used again, while the server may be closing it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            clients = [one(client, busy, i, alone) for i in range(CLIENTS)]
            working = asyncio.ensure_future(asyncio.gather(*clients))
            await asyncio.sleep(1)
            for process in killed:
                process.send_signal(signal.SIGKILL)
            return await working

    try:
        for process in killed:
            assert process.stdout.readline() == b"begun\n"
        wrong = [fault for faults in asyncio.run(all_of_them()) for fault in faults]
    finally:
        for process in killed:
            process.kill()
            process.communicate()
    assert wrong == []
    for name in ("tvq_rows_running", "tvq_requests_waiting", "tvq_requests"):
        assert busy.becomes(name, 0), name
    for _ in range(100):
        if open_files(busy) <= files + 2:
            break
        time.sleep(0.1)
    assert open_files(busy) <= files + 2
    assert complaints(busy) == []


def test_who_reads_nothing_is_dropped(busy):
    """A stream that is not read ends, and its row is free, before all is written."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(busy.url.rsplit(":", 1)[1])))
        body = b'{"prompt": "x", "max_tokens": 1000000, "stream": true, "logprobs": 20}'
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        )
        head += f"Authorization: Bearer {KEYS[0]}\r\nContent-Type: application/json\r\n\r\n"
        sock.sendall(head.encode() + body)
        assert busy.becomes("tvq_rows_running", 1)
        for _ in range(1200):
            if busy.metric("tvq_rows_running") == 0:
                break
            time.sleep(0.1)
        assert busy.metric("tvq_generated_tokens") < 1_000_000
        assert busy.metric("tvq_rows_running") == busy.metric("tvq_requests") == 0
    assert complaints(busy) == []


def memory(server) -> int:
    """Bytes of the process that are in memory."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_memory_stays(busy):
    """1,000 requests: as much after 200 as in the end, and states no larger than their room."""
    rng = random.Random(5)
    cached, sizes = [], []
    with httpx.Client(timeout=60, headers=HEADERS) as client:
        for i in range(1000):
            if i in (200, 999):
                sizes.append(memory(busy))
            body = {**job(rng.randrange(10**6)), "max_tokens": rng.randint(1, 12)}
            body |= rng.choice([{}, {"n": 2}, {"logprobs": 5}, {"echo": True, "logprobs": 1}])
            if i % 3 == 0:
                body["stream"] = True
            client.post(f"{busy.url}/v1/completions", json=body).raise_for_status()
            if i % 20 == 0:
                cached.append(busy.metric("tvq_state_cache_bytes"))
    assert 0 < max(cached) <= 2 * MEGABYTE
    assert sizes[1] - sizes[0] < 20 * MEGABYTE, sizes
    assert complaints(busy) == []


def test_a_second_turn_reads_only_what_is_new(busy):
    """All tokens of a first turn of 4,000 are known in the second."""
    first = [random.Random(6).randrange(256) for _ in range(3900)]
    with httpx.Client(timeout=60, headers=HEADERS) as client:

        def ask(prompt):
            body = dict(prompt=prompt, max_tokens=100, seed=1, cache="any", return_token_ids=True)
            return client.post(f"{busy.url}/v1/completions", json=body).json()

        answer = ask(first)
        turn = [*first, *answer["choices"][0]["token_ids"]]
        usage = ask([*turn, *b" and then?"])["usage"]
    assert (len(turn), usage["prompt_tokens"]) == (4000, 4010)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4000
