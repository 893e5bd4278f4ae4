"""A server beside decoding alone: `python benchmarks/serve.py --run runs/small`.

Starts `tvq serve` of a run on bytes and asks it over HTTP, in turns with a session of the same
model that only decodes, in this process, while the server waits. Prints a markdown table:

- tokens a second of `--slots` streams and of one, as the clients get them, and of `tvq batch`, from
  its start to its end without what a job of one token takes; ratios to decoding at that batch;
- the time to the first token of a prompt of 16 tokens, nothing else running, beside that of 5
  steps and of reading the prompt;
- the longest pause of a stream while a prompt of 10,000 tokens is read, beside a usual one and the
  time that a chunk of the prompt takes;
- how much of a first turn of 4,000 tokens is known in the second;
- with `--draft`, tokens a second of one stream of a second server that drafts, beside the first.

Ratios are medians of those of each turn.
"""

import argparse
import asyncio
import bisect
import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from transformer_vq import SamplingParams, load
from transformer_vq.cli.served import prompt_chunk
from transformer_vq.data import bundled_corpus
from transformer_vq.engine.batch import STEPS_PER_DISPATCH, Session
from transformer_vq.engine.prefill import read as read_prompts
from transformer_vq.nn.model import Model

TVQ = Path(sys.executable).with_name("tvq")
CHUNK = prompt_chunk(None)  # tokens of a prompt that are read at once
SHORT = 16  # tokens of a short prompt
STEPS = 5
SAMPLED: dict[str, Any] = {"top_p": 0.9, "cache": "off"}  # as `tvq bench decode` samples
RNG = np.random.default_rng(0)

Chunks = list[tuple[float, int]]  # when each came, and its tokens


def main() -> None:
    """Start servers, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run on bytes")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1500, help="of each stream")
    parser.add_argument("--prompt", type=int, default=10_000, help="tokens of a long one")
    parser.add_argument("--draft", help="as of tvq serve: text, or a run that guesses")
    parser.add_argument("--only", default="rates,batch,waits", help="some of rates, batch, waits")
    args = parser.parse_args()
    wanted = args.only.split(",")
    print("| what | reached | to compare with | ratio |\n|---|---|---|---|")
    with serving(args, []) as url:
        if "rates" in wanted:
            show(rates(args, url))
        if "batch" in wanted:
            show(batch(args))
        if "waits" in wanted:
            show(asyncio.run(waits(args, url)))
        if args.draft:
            with serving(args, ["--draft", args.draft]) as drafting:
                show(drafts(args, url, drafting))


def show(lines: Iterator[str] | list[str]) -> None:
    """Each line as soon as it is there."""
    for line in lines:
        print(line, flush=True)


@contextlib.contextmanager
def serving(args: argparse.Namespace, options: list[str]) -> Iterator[str]:
    """A server, ready: the address of its completions."""
    command = [TVQ, "serve", "--run", args.run, "--port", "0", "--slots", str(args.slots)]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        found = re.search(r"http://\S+", server.stdout.readline())
        if not found:
            raise SystemExit("the server has not started")
        yield f"{found[0]}/v1/completions"
    finally:
        server.terminate()
        server.wait()


def prompt(length: int) -> list[int]:
    """Tokens that no other prompt has."""
    return RNG.integers(0, 256, length).tolist()


class Alone:
    """A session that decodes so many rows, and nothing else."""

    def __init__(self, model: Model, rows: int):
        params = SamplingParams(max_tokens=10**6, top_p=SAMPLED["top_p"])
        self._session = Session(model, [prompt(SHORT) for _ in range(rows)], params)
        self._rows = rows
        self.rate(32)

    def rate(self, tokens: int) -> float:
        """Tokens a second of all rows, while each writes so many, in whole dispatches."""
        tokens = -(-tokens // STEPS_PER_DISPATCH) * STEPS_PER_DISPATCH
        began = time.perf_counter()
        for _ in itertools.islice(self._session, self._rows * tokens):
            pass
        return self._rows * tokens / (time.perf_counter() - began)


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Of the first numbers, of the second, and of the ratios of the pairs."""
    first, second = map(statistics.median, zip(*pairs, strict=True))
    return first, second, statistics.median(a / b for a, b in pairs)


# Tokens a second.


async def read(
    url: str, given: str | list[int], tokens: int, chunks: Chunks, **body: Any
) -> Chunks:
    """Read a stream: its chunks, as they come.

    By hand, and looked into at its end: a client's work takes the processors from the server's.
    """
    body = {**SAMPLED, "prompt": given, "max_tokens": tokens, "return_token_ids": True, **body}
    content = json.dumps({**body, "stream": True}).encode()
    address = urlsplit(url)
    assert address.hostname
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 24)
    parts: list[tuple[float, bytes]] = []
    try:
        head = f"POST {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        kind = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write((head + kind).encode() + content)
        while part := await reader.read(1 << 20):
            parts.append((time.perf_counter(), part))
    finally:
        writer.close()
        chunks += chunks_of(parts)
    return chunks


def chunks_of(parts: list[tuple[float, bytes]]) -> Chunks:
    """The chunks in what has come: each came with the end of its line."""
    text = b"".join(part for _, part in parts)
    if not text.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"the server refuses a stream: {text.decode()}")
    ends = list(itertools.accumulate(len(part) for _, part in parts))
    chunks: Chunks = []
    for found in re.finditer(rb"^data: (\{.*\})\n", text, re.MULTILINE):
        (choice,) = json.loads(found[1])["choices"]
        came, _ = parts[bisect.bisect_left(ends, found.end())]
        chunks.append((came, len(choice["token_ids"])))
    return chunks


def streams(url: str, given: list[str] | list[list[int]], tokens: int, **body: Any) -> float:
    """Tokens a second of some streams, while all of them write."""

    async def gather() -> list[Chunks]:
        return await asyncio.gather(*(read(url, one, tokens, [], **body) for one in given))

    found = asyncio.run(gather())
    began, ended = max(chunks[0][0] for chunks in found), min(chunks[-1][0] for chunks in found)
    written = sum(n for chunks in found for at, n in chunks if began < at <= ended)
    return written / (ended - began)


def rates(args: argparse.Namespace, url: str) -> Iterator[str]:
    """Streams beside decoding."""
    model, _ = load(args.run)
    for count in (args.slots, 1):
        alone, pairs = Alone(model, count), []
        for _ in range(args.turns):
            served = streams(url, [prompt(SHORT) for _ in range(count)], args.tokens)
            pairs.append((served, alone.rate(args.tokens // 4)))
        reached, known, ratio = medians(pairs)
        plural = "streams" if count > 1 else "stream"
        yield (
            f"| {count} {plural}, tokens/s | {reached:,.0f} | decoding at batch {count}: "
            f"{known:,.0f} | {ratio:.2f} |"
        )


def batch(args: argparse.Namespace) -> Iterator[str]:
    """A job of `tvq batch` beside decoding."""
    model, _ = load(args.run)
    alone, pairs = Alone(model, args.slots), []
    lengths = RNG.integers(args.tokens // 8, args.tokens // 2, 8 * args.slots).tolist()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            least = job(args, Path(folder), f"least-{turn}", [1])
            took = job(args, Path(folder), f"job-{turn}", lengths) - least
            pairs.append((sum(lengths) / took, alone.rate(args.tokens // 4)))
    reached, known, ratio = medians(pairs)
    yield (
        f"| `tvq batch`, {len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens, "
        f"tokens/s | {reached:,.0f} | decoding at batch {args.slots}: {known:,.0f} | {ratio:.2f} |"
    )


def job(args: argparse.Namespace, folder: Path, name: str, lengths: list[int]) -> float:
    """Seconds of a job of requests, each of which writes so many tokens."""
    asked = [{"prompt": prompt(SHORT), "max_tokens": n, "top_p": 0.9} for n in lengths]
    given = folder / f"{name}.jsonl"
    given.write_text("".join(json.dumps(one) + "\n" for one in asked), "utf-8")
    command = [TVQ, "batch", "--run", args.run, "--slots", str(args.slots), "--input", given]
    began = time.perf_counter()
    subprocess.run([*command, "--out", folder / f"{name}-out.jsonl"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - began


def drafts(args: argparse.Namespace, url: str, drafting: str) -> Iterator[str]:
    """One stream of a server that drafts, beside one that does not."""
    book = bundled_corpus().read_text("utf-8")
    for what, text, temperature in (
        ("a text that repeats itself, greedily", book[200_000:200_048] * 8, 0.0),
        ("prose at temperature 0.8", book[200_000:200_600], 0.8),
    ):
        pairs = []
        for turn in range(args.turns + 1):
            with_and_without = [
                streams(to, [text], args.tokens, temperature=temperature, top_p=1.0, seed=turn)
                for to in (drafting, url)
            ]
            if turn:  # the first one finds out what drafts bring
                pairs.append(tuple(with_and_without))
        reached, known, ratio = medians(pairs)
        yield (
            f"| `--draft`, {what}, tokens/s | {reached:,.0f} | without: {known:,.0f} | "
            f"{ratio:.2f} |"
        )


# How long who waits.


async def waits(args: argparse.Namespace, url: str) -> list[str]:
    """The first token, pauses, a second turn."""
    async with httpx.AsyncClient(timeout=None) as client:
        return [
            await first_token(args, client, url),
            await pauses(args, client, url),
            await second_turn(client, url),
        ]


async def ask(
    client: httpx.AsyncClient, url: str, tokens: list[int], **body: Any
) -> tuple[float, dict[str, Any]]:
    """An answer that is not streamed, and its seconds."""
    began = time.perf_counter()
    response = await client.post(url, json={**SAMPLED, "prompt": tokens, **body})
    response.raise_for_status()
    return time.perf_counter() - began, response.json()


async def first_token(args: argparse.Namespace, client: httpx.AsyncClient, url: str) -> str:
    """Of a short prompt, where nothing else runs."""
    model, _ = load(args.run)
    alone, pairs, over_http = Alone(model, 1), [], []
    read_prompts(model, None, [prompt(SHORT)])
    for _ in range(4 * args.turns):
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        chunks = await read(url, prompt(SHORT), 20, [])
        first = chunks[0][0] - began
        over_http.append((await ask(client, url, prompt(SHORT), max_tokens=0))[0])
        began = time.perf_counter()
        read_prompts(model, None, [prompt(SHORT)]).logits.block_until_ready()
        piece = time.perf_counter() - began
        pairs.append((first, STEPS / alone.rate(64) + piece))
    first, least, ratio = medians(pairs)
    return (
        f"| first token, ms | {1e3 * first:.1f} | {STEPS} steps and reading {SHORT} tokens, "
        f"without a server: {1e3 * least:.1f} (a request that writes nothing: "
        f"{1e3 * statistics.median(over_http):.1f}) | {ratio:.2f} |"
    )


async def pauses(args: argparse.Namespace, client: httpx.AsyncClient, url: str) -> str:
    """Of a stream, while a long prompt is read."""
    pairs = []
    for _ in range(args.turns):
        chunks: Chunks = []
        running = asyncio.create_task(read(url, prompt(SHORT), 10**6, chunks))
        await asyncio.sleep(2)
        long, began = prompt(args.prompt), time.perf_counter()
        await ask(client, url, long, max_tokens=1)
        ended = time.perf_counter()
        await asyncio.sleep(0.3)
        running.cancel()
        await asyncio.wait({running})
        short, full = [(await ask(client, url, prompt(n * CHUNK), max_tokens=0))[0] for n in (1, 5)]
        inside, outside = [], []
        for (before, _), (after, _) in itertools.pairwise(chunks[1:]):
            apart = before > ended or after < began
            (outside if apart else inside).append(after - before)
        pairs.append((max(inside), statistics.median(outside) + (full - short) / 4))
    longest, usual, ratio = medians(pairs)
    return (
        f"| longest pause of a stream while {args.prompt:,} tokens are read, ms | "
        f"{1e3 * longest:.0f} | a usual one and a chunk of {CHUNK:,}: {1e3 * usual:.0f} | "
        f"{ratio:.2f} |"
    )


async def second_turn(client: httpx.AsyncClient, url: str) -> str:
    """How much of a conversation is not read again."""
    turn = prompt(3900)
    _, answer = await ask(client, url, turn, max_tokens=100, cache="any", return_token_ids=True)
    turn += answer["choices"][0]["token_ids"]
    _, second = await ask(client, url, [*turn, *prompt(100)], max_tokens=1, cache="any")
    known = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    return (
        f"| tokens known in a second turn | {known:,} | {len(turn):,} | {known / len(turn):.2f} |"
    )


if __name__ == "__main__":
    main()
