"""The text of one answer, as its tokens come: characters, stop texts, log-probabilities."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transformer_vq.data import StreamDecoder, Tokenizer
from transformer_vq.data.tokenizer import Tokens
from transformer_vq.engine.request import Token
from transformer_vq.engine.scheduler import Scores
from transformer_vq.serve.text import TextStops

LEAST = -9999.0  # a log-probability in JSON, which has no infinity


@dataclass(slots=True)
class Entry:
    """A token in the text."""

    token: int
    name: str  # as `token_name` has it
    start: int  # in the characters of the text
    end: int
    logprob: float | None
    content: bytes  # of the token; empty without log-probabilities, as the name is
    top: dict[str, float] | None  # of alternatives, by name
    top_ids: list[int]  # the same alternatives
    top_contents: list[bytes]


@dataclass
class Piece:
    """What an answer has grown by."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)


def token_name(token: int, content: bytes) -> str:
    r"""A token as text; `bytes:\xe2` if it is no characters, `token_id:0` if it is empty."""
    try:
        return content.decode() or f"token_id:{token}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Writer:
    """Turns the tokens of an answer to what is sent.

    Args:
      tokenizer: the vocabulary.
      before: tokens that the answer goes on from; None: unknown ones.
      stops: texts that end it.
      min_tokens: no stop text is looked for in so many tokens.
      alternatives: how many go with each log-probability; None: no log-probabilities.
      include_stop: the stop text stays in the answer.
      offset: characters before the text that is written here.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: Tokens | None,
        *,
        stops: Iterable[str] = (),
        min_tokens: int = 0,
        alternatives: int | None = None,
        include_stop: bool = False,
        offset: int = 0,
    ):
        self._decoder = StreamDecoder(tokenizer, before)
        self._stops = TextStops(stops)
        self._min_tokens, self._alternatives = min_tokens, alternatives
        self._include_stop = include_stop
        self._seen = offset  # characters of all tokens
        self._sent = offset  # of those that are certain
        self._waiting: list[Entry] = []  # tokens whose text is not certain
        self._count = 0
        self.ended = False  # by a stop text
        self.tokens: list[int] = []  # of the answer: those that are certain

    def echo(self, tokens: Tokens, scores: Scores | None, *, first: bool) -> Piece:
        """The prompt as part of the text. `first`: nothing comes before it."""
        piece = Piece()
        for i, token in enumerate(np.asarray(tokens).tolist()):
            logprob, top = None, None
            if scores is not None and not (first and i == 0):
                logprob = float(scores.logprobs[i])
                best = zip(
                    scores.top_tokens[i].tolist(), scores.top_logprobs[i].tolist(), strict=True
                )
                top = dict(best)
            entry, text = self._entry(token, logprob, top)
            piece.text += text
            piece.entries.append(entry)
        self._sent = self._seen
        return piece

    def push(self, tokens: Iterable[Token]) -> Piece:
        """The next tokens: what is certain to be part of the answer."""
        piece = Piece()
        for token in tokens:
            if self.ended:
                break
            entry, text = self._entry(int(token), token.logprob, token.top_logprobs)
            self._waiting.append(entry)
            self._count += 1
            self._pass(piece, self._stops.push(text) if self._count > self._min_tokens else text)
        return piece

    def flush(self) -> Piece:
        """The answer has ended: the rest of it."""
        piece = Piece()
        if not self.ended:
            self._pass(piece, self._stops.flush(self._decoder.flush()))
        if not self.ended:
            piece.entries += self._release(len(self._waiting))
        return piece

    def _pass(self, piece: Piece, text: str) -> None:
        """So much text is certain, and with it the tokens that it is of."""
        if self._stops.found and not self.ended:
            self.ended = True
            if self._include_stop:
                text += self._stops.stop
        piece.text += text
        self._sent += len(text)
        # A token that ends no character waits for the one that does.
        for count in range(len(self._waiting), 0, -1):
            last = self._waiting[count - 1]
            if last.start < last.end <= self._sent:
                piece.entries += self._release(count)
                return

    def _release(self, count: int) -> list[Entry]:
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        self.tokens += [entry.token for entry in ready]
        return ready

    def _entry(
        self, token: int, logprob: float | None, top: dict[int, float] | None
    ) -> tuple[Entry, str]:
        name, content, named, ids, contents = "", b"", None, [], []
        if self._alternatives is not None:
            content = self._decoder.adds(token)
            name = token_name(token, content)
            if top is not None:
                named, ids = self._named(token, name, logprob, top)
                contents = [self._decoder.adds(other) for other in ids]
        start = self._seen
        text = self._decoder.push(token)
        self._seen += len(text)
        entry = Entry(token, name, start, self._seen, logprob, content, named, ids, contents)
        return entry, text

    def _named(
        self, token: int, name: str, logprob: float | None, top: dict[int, float]
    ) -> tuple[dict[str, float], list[int]]:
        """Alternatives by their text, best first, and the token itself among them; their ids."""
        assert self._alternatives is not None
        named: dict[str, float] = {}
        ids: list[int] = []
        for other, value in list(top.items())[: self._alternatives]:
            key = name
            if other != token:
                key = token_name(other, self._decoder.adds(other))
            if key in named or (key == name and other != token):
                key = f"token_id:{other}"
            named[key] = max(value, LEAST)
            ids.append(other)
        if logprob is not None and self._alternatives and name not in named:
            named[name] = max(logprob, LEAST)
            ids.append(token)
        return named, ids


def logprobs_object(
    entries: Sequence[Entry], alternatives: int, *, ids: bool = False
) -> dict[str, Any]:
    """The `logprobs` of a choice. `ids`: with the ids of the alternatives, in their order."""
    return {
        **({"top_token_ids": [entry.top_ids for entry in entries]} if ids else {}),
        "tokens": [entry.name for entry in entries],
        "token_logprobs": [
            None if entry.logprob is None else max(entry.logprob, LEAST) for entry in entries
        ],
        "top_logprobs": [entry.top for entry in entries] if alternatives else None,
        "text_offset": [entry.start for entry in entries],
    }
