"""A file of requests, one a line: checked as a whole, then read a line at a time. No JAX."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from transformer_vq.errors import UserError, shown
from transformer_vq.serve.guard import MOST_BODY

FRAME = ("custom_id", "method", "url", "body")  # of OpenAI's batch format
URL = "/v1/completions"
_DIGEST = 16  # bytes of the hash of an id


@dataclass(frozen=True)
class Line:
    """A request."""

    number: int  # of its line in the file, from 1
    custom_id: str  # the line's own, or `line-7`
    body: dict[str, Any]  # of `POST /v1/completions`, not checked


class RequestFile:
    """Requests, one a line; blank lines are none.

    A line is an object of OpenAI's batch format (`custom_id`, `method`, `url`, `body`), the body
    alone, or a prompt as a JSON string. With `text`, each line is a prompt as it is.

    All lines are gone through once when it is made, which takes 16 bytes of memory for each, and
    nothing of them is kept. Raises `UserError` naming the first line that is no request, or two
    lines with the same `custom_id`; `OSError` if the file cannot be read.
    """

    def __init__(self, path: Path, *, text: bool = False):
        self.path, self._text = path, text
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file: requests are read twice, so give a file")
        self._file = path.open("rb")
        try:
            self._check()
        except BaseException:
            self._file.close()
            raise

    def _check(self) -> None:
        self._stamp = self._look()
        content, ids, number = hashlib.sha256(), bytearray(), 0
        for number, line in self._lines():
            content.update(line)
            if request := self._parse(number, line):
                ids += _digest(request.custom_id)
        self.last = number  # of the last line
        self.digest = content.hexdigest()  # of the whole content
        self.count = len(ids) // _DIGEST  # requests
        if not self.count:
            raise UserError(f"{self.path} has no requests: write one a line")
        self._refuse_twins(ids)

    def share(self, index: int, count: int) -> int:
        """How many requests every `count`-th is, from that at `index` on."""
        return len(range(index, self.count, count))

    def read(self, index: int, count: int, done: bytearray) -> Iterator[Line]:
        """Every `count`-th request from that at `index` on, without those of lines that are `done`.

        Raises `UserError` if the file has changed since it was checked.
        """
        place = 0
        for number, line in self._lines():
            if self._look() != self._stamp:
                raise UserError(f"{self.path} has changed while it was answered: start again")
            if line.strip():
                if place % count == index and not done[number]:
                    request = self._parse(number, line)
                    assert request
                    yield request
                place += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    def _look(self) -> tuple[int, int]:
        """What changes when the file does."""
        found = os.stat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """All lines with their numbers, from the first. Raises `UserError` for one without end."""
        self._file.seek(0)
        file: BinaryIO = self._file
        number = 0
        while line := file.readline(MOST_BODY + 1):
            number += 1
            if len(line) > MOST_BODY:
                raise UserError(
                    f"line {number} of {self.path} has more than {MOST_BODY:,} bytes: a request "
                    f"may have no more"
                )
            yield number, line

    def _parse(self, number: int, line: bytes) -> Line | None:
        """A line as a request; None if it is blank. Raises `UserError`."""
        where = f"line {number} of {self.path}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # some editors begin UTF-8 with it
        if not line.strip():
            return None
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8: write it in UTF-8") from None
        if self._text:
            return Line(number, f"line-{number}", {"prompt": text.rstrip("\r\n")})
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", None) or "it cannot be read"
            raise UserError(
                f"{where} is not JSON ({why}): write a request a line, or give --text if each line "
                f"is a prompt as it is"
            ) from None
        if isinstance(value, str):
            return Line(number, f"line-{number}", {"prompt": value})
        if not isinstance(value, dict):
            raise UserError(
                f"{where} is {shown(value)}: it must be a request as an object, or a prompt as a "
                f"string"
            )
        if not any(name in value for name in FRAME):
            return Line(number, f"line-{number}", value)
        return _framed(number, where, value)

    def _refuse_twins(self, ids: bytearray) -> None:
        """Raise `UserError` if two requests have the same id."""
        found = np.sort(np.frombuffer(bytes(ids), f"S{_DIGEST}"))
        twins = np.flatnonzero(found[1:] == found[:-1])
        if not len(twins):
            return
        twin = bytes(found[twins[0]]).ljust(_DIGEST, b"\0")
        same = [
            request
            for number, line in self._lines()
            if (request := self._parse(number, line)) and _digest(request.custom_id) == twin
        ]
        raise UserError(
            f"lines {same[0].number} and {same[1].number} of {self.path} have the same custom_id, "
            f"{shown(same[0].custom_id)}: give each its own"
        )


def _framed(number: int, where: str, value: dict[str, Any]) -> Line:
    """A line of OpenAI's batch format. Raises `UserError`."""
    for name in value:
        if name not in FRAME:
            raise UserError(
                f"{where} has the field {shown(name)} beside {', '.join(FRAME)}: what is asked for "
                f"belongs into the body"
            )
    custom_id = value.get("custom_id", f"line-{number}")
    if not isinstance(custom_id, str) or not custom_id:
        raise UserError(f"{where} has the custom_id {shown(custom_id)}: it must be a text")
    method, url = value.get("method", "POST"), value.get("url", URL)
    if (method, url) != ("POST", URL):
        raise UserError(
            f"{where} asks for {shown(method)} {shown(url)}: only POST {URL} is answered"
        )
    body = value.get("body")
    if not isinstance(body, dict):
        raise UserError(f"{where} has no body: give the fields of {URL} as an object")
    return Line(number, custom_id, body)


def _digest(custom_id: str) -> bytes:
    content = custom_id.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def seed_of(seed: int, custom_id: str) -> int:
    """The seed of a request that has none: of the job's and of its id, below 2^32."""
    content = f"{seed} {custom_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "big")
