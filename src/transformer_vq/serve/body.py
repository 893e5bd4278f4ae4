"""Large requests, read in slices and aside, so that others are answered meanwhile. No JAX here.

Python's JSON is read by one call that lets no other thread run, a second for each 30 MB of numbers.
So the numbers of a long list are read some thousands at a time, in a thread, and become an array.
"""

import json
import re
from collections.abc import Callable
from json.decoder import JSONDecoder
from json.scanner import make_scanner
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from transformer_vq.serve.aside import LARGE, aside

SLICE = 1 << 16  # characters that are read at once
MOST_ITEMS = 1024  # of a list that are read one by one: texts, and lists of tokens
TOKENS = ("prompt", "tokens")  # fields that may be arrays
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBERS = re.compile(r"[-0-9, \t\n\r]*")
_scan = make_scanner(JSONDecoder())  # pyright: ignore[reportArgumentType]


class LargeBodies(APIRoute):
    """A route whose requests are read aside if they are large."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_large(request: Request) -> Response:
            return await handle(_LargeRequest(request.scope, request.receive))

        return handle_large


class _LargeRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        return await aside(len(body), parse, body)


def parse(body: bytes) -> Any:
    """What JSON says, as `json.loads` has it, but that long lists of tokens are arrays, int32.

    Raises `ValueError`, and `RecursionError` for what is nested too deeply.
    """
    if len(body) <= LARGE:
        return json.loads(body)
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    found = _object(text)
    return json.loads(text) if found is None else found


def _object(text: str) -> dict[str, Any] | None:
    """An object whose lists are short, or of tokens, texts, or lists of tokens; None for anything
    else, errors included."""
    found: dict[str, Any] = {}
    at = _after(text, 0, "{")
    while at is not None:
        try:
            key, at = _scan(text, at)
            at = _after(text, at, ":")
            if at is None or not isinstance(key, str):
                return None
            value, at = _list(text, at) if text.startswith("[", at) else _scan(text, at)
        except (StopIteration, ValueError):  # no JSON, or not what is read here
            return None
        found[key] = value if key in TOKENS else _plain(value)
        following = _after(text, at, ",")
        if following is None:
            end = _after(text, at, "}")
            return found if end == len(text) else None
        at = following
    return None


def _plain(value: Any) -> Any:
    """The same without arrays."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _after(text: str, at: int, sign: str) -> int | None:
    """Where something begins after a sign; None if the sign is not there."""
    at = _end(_SPACE, text, at)
    return _end(_SPACE, text, at + 1) if text.startswith(sign, at) else None


def _end(pattern: re.Pattern[str], text: str, at: int, last: int | None = None) -> int:
    """The end of what fits a pattern that fits nothing, too."""
    fits = pattern.match(text, at, len(text) if last is None else last)
    assert fits
    return fits.end()


def _list(text: str, at: int, depth: int = 0) -> tuple[Any, int]:
    """The list that begins here, and where it ends. Raises `ValueError` for one that is odd."""
    at = _end(_SPACE, text, at + 1)
    if text.startswith("]", at):
        return np.zeros(0, np.int32) if depth else [], at + 1
    if text[at : at + 1] in "-0123456789":
        return _numbers(text, at)
    items: list[Any] = []
    while True:
        if text.startswith("[", at) and not depth:
            item, at = _list(text, at, depth + 1)
        else:
            item, at = _scan(text, at)
        items.append(item)
        if len(items) > MOST_ITEMS:
            raise ValueError("this is read as a whole")
        following = _after(text, at, ",")
        if following is None:
            end = _end(_SPACE, text, at)
            if not text.startswith("]", end):
                raise ValueError("the list does not end")
            return items, end + 1
        at = following


def _numbers(text: str, at: int) -> tuple[Any, int]:
    """The rest of a list of numbers: an array if all are tokens."""
    parts: list[np.ndarray] = []
    while True:
        end = _end(_NUMBERS, text, at, min(len(text), at + SLICE))
        last = text.startswith("]", end)
        cut = end if last else text.rfind(",", at, end)
        if cut < at:
            raise ValueError("these are no whole numbers")
        numbers = json.loads(f"[{text[at:cut]}]")
        least, most = min(numbers), max(numbers)
        if least < 0 or most >= 1 << 31:
            raise ValueError("these are no tokens")
        parts.append(np.array(numbers, np.int32))
        if last:
            return np.concatenate(parts), end + 1
        at = cut + 1
