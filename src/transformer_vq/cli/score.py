"""`tvq score`: how probable a model finds a text, its lines and its tokens."""

import codecs
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

from transformer_vq.cli.common import CheckpointOption, progress_bar, standard_input, tell
from transformer_vq.cli.models import (
    CHUNK,
    FarOptions,
    RunFolder,
    StateOption,
    WeightsOption,
    diverged,
    local,
    open_model,
    open_run,
)
from transformer_vq.cli.parse import UsageError, option
from transformer_vq.cli.text import printable, show_bytes
from transformer_vq.data import StreamDecoder, Tokenizer, is_compressed, open_binary, text_pieces
from transformer_vq.data.tokenizer import Tokens
from transformer_vq.run.log import to_json

SHOWN = 60  # characters of a line that are shown


@dataclass
class Score:
    """Say how probable a model finds a text: every token given all before it.

    The first token of a text follows nothing, so it has no probability and does not count; with
    --state the text goes on from a saved state, and every token counts. A text of any size is read
    in bounded memory. It is scored as it is: for the splits of a run's data, see `tvq eval`.
    """

    examples: ClassVar[str] = """
  tvq score --run runs/book --text 'It was the best of times'
  tvq score --run runs/book --file page.txt --per line
  tvq score --run runs/book --state book.tvq --text ' Call me Ishmael.' --per token --json
  zcat big.gz | tvq score --run runs/book --file -
"""

    run: RunFolder
    text: Annotated[str, option("text to score", "TEXT", default="none")] = ""
    file: Annotated[
        str | None,
        option("a file to score, compressed or not; -: standard input", "FILE", default="none"),
    ] = None
    per: Annotated[
        Literal["text", "line", "token"],
        option("score each line or token too; a token is of the line that it begins in"),
    ] = "text"
    checkpoint: CheckpointOption = "latest"
    state: StateOption = None
    weights: WeightsOption = "as-saved"
    far: FarOptions = field(default_factory=dict)
    json: Annotated[
        bool, option("print JSON: an object for each line or token, if asked, and one for all")
    ] = False

    def main(self) -> int:
        if self.text and self.file is not None:
            raise UsageError("--text and --file are both given: give one")
        if not self.text and self.file is None:
            raise UsageError("there is no text: give --text or --file (- for standard input)")
        folder = local(self.run)
        info, tokenizer = open_run(folder, self.checkpoint)
        if info.data.image_shape:
            raise UsageError(f"the run in {self.run} is one of pictures: tvq eval scores those")
        with self._open() as file:
            text = _Counted(text_pieces(file))
            model, state = open_model(folder, info, self.far, self.state, self.weights)

            from transformer_vq.engine.score import score_chunks

            began = time.monotonic()
            before = () if state is None else None  # nobody knows the text of a state
            total, lines = _Total(tokenizer), _Lines(tokenizer, before)
            decoder = StreamDecoder(tokenizer, before)
            # What is read must fit a state that is made at the start, if that has a limit.
            limit = CHUNK if model.config.default_capacity is None else sys.maxsize
            chunks = token_chunks(text, tokenizer, limit)
            quiet = self.json or self.per != "text"
            with progress_bar("scoring", quiet=quiet, unit="bytes") as show:
                for tokens, logprobs in score_chunks(model, chunks, state):
                    for token, logprob in zip(tokens, logprobs, strict=True):
                        if logprob is not None and math.isnan(logprob):
                            raise diverged(self.run, info.step)
                        total.add(token, logprob)
                        if self.per == "token":
                            self._tell_token(token, logprob, decoder.push_bytes(token))
                        elif self.per == "line" and (line := lines.push(token, logprob)):
                            self._tell_line(line)
                    show(text.bytes, self._size())
            if self.per == "line" and (line := lines.flush()):
                self._tell_line(line)
        if not total.scored:
            raise UsageError(
                f"the text has {total.tokens} of the two tokens that a score needs: give more, or "
                f"a --state that it goes on from"
            )
        if tokenizer.changes:
            tell(
                f"the score is of the text as the vocabulary has it, which changes "
                f"{tokenizer.changes}"
            )
        record = {"run": str(self.run), "step": info.step, **total.summary(text)}
        record["seconds"] = round(time.monotonic() - began, 3)
        if self.json:
            print(to_json(record))
        else:
            self._tell(record)
        return 0

    def _open(self) -> AbstractContextManager[BinaryIO]:
        if self.file == "-":
            return nullcontext(standard_input())
        if self.file is not None:
            return open_binary(Path(self.file))
        return BytesIO(self.text.encode(errors="surrogateescape"))

    def _size(self) -> int | None:
        """Bytes of the text, if that is known before it is read."""
        if self.file is None or self.file == "-":
            return None
        path = Path(self.file)
        return path.stat().st_size if path.is_file() and not is_compressed(path) else None

    def _tell_token(self, token: int, logprob: float | None, content: bytes) -> None:
        """`content`: what the token adds to the text."""
        if self.json:
            text = content.decode(errors="replace")
            print(to_json({"token": int(token), "text": text, "logprob": logprob}))
        else:
            print(f"{_number(logprob):>9}   {show_bytes(content)}")

    def _tell_line(self, line: dict[str, Any]) -> None:
        if self.json:
            print(to_json(line))
        else:
            logprob = line["logprob"] if line["scored"] else None
            text = printable(line["text"].rstrip("\n").replace("\n", "\\n").replace("\t", " "))
            print(f"{line['line']:6} {_number(logprob):>11}   {text}")

    def _tell(self, record: dict[str, Any]) -> None:
        if self.per != "text":
            print()
        print(f"{printable(record['run'])} at step {record['step']:,}")
        print(
            f"  {record['bits_per_byte']:.4f} bits per byte   "
            f"{record['bits_per_character']:.4f} bits per character   "
            f"perplexity {record['perplexity']:.4f} per token"
        )
        print(
            f"  {record['logprob']:.4f} nats for {record['scored']:,} of {record['tokens']:,} "
            f"tokens, {record['bytes']:,} bytes, in {record['seconds']:.1f} s"
        )


def token_chunks(pieces: Iterator[bytes], tokenizer: Tokenizer, limit: int) -> Iterator[list[int]]:
    """The tokens of a text that comes in pieces of bytes, so many of them at once."""
    waiting: list[int] = []
    for piece in pieces:
        waiting += tokenizer.encode(piece)
        whole = len(waiting) // limit * limit
        for start in range(0, whole, limit):
            yield waiting[start : start + limit]
        waiting = waiting[whole:]
    if waiting:
        yield waiting


class _Counted:
    """Pieces of a text, whose bytes and characters are counted as they are taken."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.bytes = self._characters = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        piece = next(self._pieces)
        self.bytes += len(piece)
        self._characters += len(self._utf8.decode(piece))
        return piece

    @property
    def characters(self) -> int:
        """Of the pieces taken; what is not UTF-8 counts as U+FFFD."""
        return self._characters + len(self._utf8.decode(b"", final=True))


class _Total:
    """What all tokens come to."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.tokens = self.scored = 0
        self.logprob = 0.0
        self._unscored: list[int] = []

    def add(self, token: int, logprob: float | None) -> None:
        self.tokens += 1
        if logprob is None:
            self._unscored.append(token)
        else:
            self.scored += 1
            self.logprob += logprob

    def summary(self, text: _Counted) -> dict[str, Any]:
        """In JSON's terms; bits are over the bytes and characters of the tokens that count."""
        given = self._tokenizer.decode(self._unscored)
        bits = -self.logprob / math.log(2)
        return {
            "tokens": self.tokens,
            "scored": self.scored,
            "bytes": text.bytes,
            "characters": text.characters,
            "logprob": self.logprob,
            "bits_per_byte": bits / max(text.bytes - len(given), 1),
            "bits_per_character": bits
            / max(text.characters - len(given.decode(errors="ignore")), 1),
            "perplexity": _exp(-self.logprob / self.scored),
        }


class _Lines:
    """The score of each line, once it is whole. `before`: as of `StreamDecoder`."""

    def __init__(self, tokenizer: Tokenizer, before: Tokens | None):
        self._decoder, self._line = StreamDecoder(tokenizer, before), 1
        self._begin()

    def _begin(self) -> None:
        self._text, self._tokens, self._scored, self._logprob = "", 0, 0, 0.0

    def push(self, token: int, logprob: float | None) -> dict[str, Any] | None:
        """The line that this token ends, or None."""
        text = self._decoder.push(token)
        self._text = (self._text + text)[:SHOWN]
        self._tokens += 1
        self._scored += logprob is not None
        self._logprob += logprob or 0.0
        return self._end(text.count("\n")) if "\n" in text else None

    def flush(self) -> dict[str, Any] | None:
        """The last line, if it has no end."""
        self._text = (self._text + self._decoder.flush())[:SHOWN]
        return self._end(1) if self._tokens else None

    def _end(self, lines: int) -> dict[str, Any]:
        line = {
            "line": self._line,
            "text": self._text,
            "tokens": self._tokens,
            "scored": self._scored,
            "logprob": self._logprob,
        }
        self._line += lines
        self._begin()
        return line


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _number(logprob: float | None) -> str:
    return "" if logprob is None else f"{logprob:.4f}"
