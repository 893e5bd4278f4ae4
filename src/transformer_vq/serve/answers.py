"""A file of answers, which only grows, a whole line at a time. No JAX.

The id of an answer is `batch_req_INPUT-OPTIONS-MODEL-LINE`: hashes that say of which job it is, and
the line of the request. So the file alone tells what is left to do, and no part of it can be of
another job; parts can be put together, or lines deleted that are to be answered anew.
"""

import contextlib
import errno
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, Self

from transformer_vq.errors import UserError
from transformer_vq.serve.lines import RequestFile

PREFIX = "batch_req_"
_ID = re.compile(PREFIX + r"([0-9a-f]{12})-([0-9a-f]{12})-([0-9a-f]{12})-([1-9]\d{0,15})")
_BEGINS = b'{"id": "batch_req_'  # how every line does


class AnswerFile:
    """The answers to a file of requests: those that are there, and more.

    What a process that was killed has written of a line is cut off. One process at a time has the
    file. Raises `UserError` for a file of another job, one that is damaged, or one that another
    process has; `OSError` if it cannot be opened.

    Args:
      path: the file; made if it is not there.
      requests: what is answered.
      options: a hash of all options that change answers.
      model: a hash of the model.
    """

    def __init__(self, path: Path, requests: RequestFile, *, options: str, model: str):
        self.path = path
        self._requests = requests
        self._job = (requests.digest[:12], options[:12], model[:12])
        self.done = bytearray(requests.last + 1)  # by line: whether it has its answer
        self.answered = self.failed = 0
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{path} is {kind}: give the name of a file for the answers")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._number = os.open(path, flags, 0o666)
        try:
            self._lock()
            with open(self._number, "rb", closefd=False) as file:
                self._size = self._read(file)
            os.truncate(self._number, self._size)
        except BaseException:
            os.close(self._number)
            raise

    def add(self, line: int, custom_id: str, status: int, body: dict[str, Any]) -> None:
        """Write the answer to a line. Raises `UserError` if it cannot be; no part of it is left."""
        tail = f"{'-'.join(self._job)}-{line}"
        if status == 200:
            body = {**body, "id": f"cmpl-{tail}"}
        response = {"status_code": status, "request_id": f"req_{tail}", "body": body}
        answer = {"id": PREFIX + tail, "custom_id": custom_id, "response": response, "error": None}
        content = (json.dumps(answer) + "\n").encode("ascii")
        written = 0
        try:
            while written < len(content):
                written += os.write(self._number, content[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._number, self._size)
            raise self._not_written(error) from None
        self._size += len(content)
        self._note(line, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        """What was written is on the disk. Raises `UserError` if it is not."""
        try:
            os.fsync(self._number)
        except OSError as error:
            if kind is None:
                raise self._not_written(error) from None
        finally:
            os.close(self._number)

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path}: {error.strerror}; the {self.answered:,} answers before are "
            f"there, and once that is mended the same command goes on"
        )

    def _none(self, number: int) -> UserError:
        return UserError(
            f"line {number} of {self.path} is no answer of tvq batch: give another --out"
        )

    def _note(self, line: int, status: int) -> None:
        self.done[line] = True
        self.answered += 1
        self.failed += status != 200

    def _lock(self) -> None:
        """Be the one who writes, until the file is closed. Raises `UserError`."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without locks
                return
            raise UserError(
                f"{self.path} is being written by another process: wait until that has ended, or "
                f"give another --out"
            ) from None

    def _read(self, file: BinaryIO) -> int:
        """Note all answers that are there: the bytes that they take. Raises `UserError`."""
        size = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if line.startswith(_BEGINS) or _BEGINS.startswith(line):
                    break  # the process was killed in the middle of it
                raise self._none(number)
            self._note(*self._answer(number, line))
            size += len(line)
        return size

    def _answer(self, number: int, line: bytes) -> tuple[int, int]:
        """The line that an answer is to, and its status. Raises `UserError`."""
        where = f"line {number} of {self.path}"
        try:
            value = json.loads(line)
            found = _ID.fullmatch(value["id"])
            status = int(value["response"]["status_code"])
        except (ValueError, TypeError, KeyError, RecursionError):
            found, status = None, 0
        if found is None:
            raise self._none(number)
        for given, own, (what, way_out) in zip(found.groups(), self._job, _DIFFERENT, strict=False):
            if given != own:
                raise UserError(f"{self.path} has answers {what}: {way_out}, or another --out")
        answered = int(found[4])
        if answered >= len(self.done):
            raise UserError(f"{where} is damaged: delete it")
        if self.done[answered]:
            raise UserError(f"{where} is a second answer to line {answered}: delete one of them")
        return answered, status


_DIFFERENT = (
    ("to another input", "give the one that it was begun with"),
    (
        "with other options",
        "give the same --body, --seed, --text, --prompt-chunk, --exact, and with it --slots",
    ),
    ("of another model", "give the same --run, --checkpoint, --weights and --far-* options"),
)
