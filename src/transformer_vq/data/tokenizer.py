"""Text to token ids and back, whole or as the tokens arrive."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from transformer_vq.errors import UserError, shown

Tokens = Sequence[int] | np.ndarray


class Tokenizer(Protocol):
    """What a vocabulary can do. Others than bytes are in `vocabulary.py`."""

    @property
    def name(self) -> str:
        """What tells it from others: a run does not go on with another one."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def start_id(self) -> int:
        """What stands before a text that has no prompt."""
        ...

    @property
    def eos_id(self) -> int:
        """What stands between documents. It decodes to nothing, but for bytes."""
        ...

    @property
    def by_bytes(self) -> bool:
        """Whether every token is always the same bytes, whatever is around it."""
        ...

    @property
    def changes(self) -> str:
        """What of a text does not come back as it was, in words; empty if all does."""
        ...

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of `text`. Raises `ValueError` for what the vocabulary cannot express."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each: of many at once it is faster."""
        ...

    def decode(self, tokens: Tokens) -> bytes:
        """The bytes that `tokens` stand for. Raises `ValueError` as `check_tokens` does."""
        ...

    def decode_text(self, tokens: Tokens) -> str:
        """`decode` as text; what is not UTF-8 becomes U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Leave in `folder` what `run_tokenizer` makes it from."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """Every byte is its own token, so any file can be modelled and nothing is out of vocabulary."""

    name: str = field(default="bytes", init=False)
    vocab_size: int = field(default=256, init=False)
    by_bytes: bool = field(default=True, init=False)
    changes: str = field(default="", init=False)
    start_id: int = 10  # a newline: what stands before a text that has no prompt
    eos_id: int = 0  # NUL: the one byte that ordinary text never holds

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of `text`, as UTF-8 if it is a `str`.

        Undecodable bytes that Python smuggles into a `str` (file names, command-line arguments)
        come out as the bytes they were. Raises `UnicodeEncodeError`, a `ValueError`, for other
        lone surrogates.
        """
        return list(text_bytes(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Tokens) -> bytes:
        """The bytes that `tokens` stand for. Raises `ValueError` as `check_tokens` does."""
        return check_tokens(tokens, self.vocab_size).astype(np.uint8).tobytes()

    def decode_text(self, tokens: Tokens) -> str:
        """`decode` as text; what is not UTF-8 becomes U+FFFD."""
        return self.decode(tokens).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing: bytes need no file."""


def text_bytes(text: str | bytes) -> bytes:
    """A text as UTF-8, with undecodable bytes as they were. Raises `UserError` for what is none."""
    if isinstance(text, str):
        return text.encode(errors="surrogateescape")
    if not isinstance(text, bytes | bytearray | memoryview):
        raise UserError(f"the text is {shown(text)}: it must be text or bytes")
    return bytes(text)


_BYTES = {token: bytes([token]) for token in range(256)}


class StreamDecoder:
    """Text from tokens one at a time: a character appears when its last byte does.

    `before`: the tokens that the stream goes on from. Many vocabularies write a space as part of
    the word after it, and leave it out where a text begins: what is streamed is what the tokens add
    to the text of those before. None: unknown ones, such as those of a saved state.

    All pieces joined, `flush` included, equal `decode_text` of all tokens, less that of `before`.
    """

    def __init__(self, tokenizer: Tokenizer = ByteTokenizer(), before: Tokens | None = ()) -> None:
        if not hasattr(tokenizer, "by_bytes"):
            raise UserError(
                f"tokenizer is {shown(tokenizer)}: it must be a vocabulary, as load gives"
            )
        self._tokenizer, self._before = tokenizer, before
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._word = [] if tokenizer.by_bytes else _word(tokenizer)
        # Of tokens that came, where they are always the same.
        self._bytes = dict(_BYTES) if isinstance(tokenizer, ByteTokenizer) else {}
        self._begin()

    def push(self, token: int) -> str:
        """The characters that `token` completes: often one, maybe none.

        Raises `ValueError` as `check_tokens` does, with the position in the stream.
        """
        return self._utf8.decode(self.push_bytes(token))

    def push_bytes(self, token: int) -> bytes:
        """The bytes that `token` adds, whole characters or not. Use it, or `push`: not both."""
        if token not in self._bytes:
            check_tokens([token], self._tokenizer.vocab_size, self._position)
        self._position += 1
        if self._tokenizer.by_bytes:
            return self.adds(token)
        self._tokens.append(int(token))
        text = self._unseen()
        if text.endswith(_REPLACEMENT) and len(self._tokens) - self._shown < _MOST_OF_CHARACTER:
            return b""  # what is no character yet, in vocabularies that do not tell its bytes
        self._take(text)
        return text

    def adds(self, token: int) -> bytes:
        """The bytes that `token` would add now; the stream stays where it is."""
        if self._tokenizer.by_bytes:
            if (found := self._bytes.get(token)) is None:
                found = self._bytes[token] = self._tokenizer.decode([token])
            return found
        here = [*(self._word if self._begun else []), *self._tokens]
        before = self._tokenizer.decode(here)
        return self._tokenizer.decode([*here, int(token)])[len(before) :]

    def flush(self) -> str:
        """U+FFFD if the stream stopped inside a character; the decoder is as new afterwards."""
        text = self._utf8.decode(self._unseen(), final=True)
        self._utf8.reset()
        self._begin()
        return text

    def _begin(self) -> None:
        self._position = 0
        # The tokens shown last, as many as tell how the next is written; then those that wait.
        self._tokens: list[int] = []
        self._shown = 0
        self._begun = self._before is None  # whether there is text before
        if self._before is not None and not self._tokenizer.by_bytes:
            parts = (self._before[i : i + 1024] for i in range(0, len(self._before), 1024))
            self._begun = any(self._tokenizer.decode(part) for part in parts)
            self._tokens = [int(token) for token in self._before[-_KEPT:]]
            self._shown = len(self._tokens)

    def _unseen(self) -> bytes:
        """What the waiting tokens add to the text of those before them."""
        before = self._word if self._begun else []
        shown = self._tokenizer.decode([*before, *self._tokens[: self._shown]])
        return self._tokenizer.decode([*before, *self._tokens])[len(shown) :]

    def _take(self, text: bytes) -> None:
        """The waiting tokens, which add this text, become those that were shown last."""
        # What follows a word does not depend on what came before it.
        self._tokens = self._tokens[self._shown if text else 0 :][-_KEPT:]
        self._shown = len(self._tokens)
        self._begun = self._begun or bool(text)


_KEPT = 16  # tokens before the next, of which some add nothing to the text
_REPLACEMENT = "\ufffd".encode()
_MOST_OF_CHARACTER = 4  # tokens of a character, if each is a byte


def _word(tokenizer: Tokenizer) -> list[int]:
    """Tokens of some word: what follows it is in the middle of a text."""
    tokens = tokenizer.encode("a")
    if tokenizer.decode(tokens).strip():
        return tokens
    some = ([token] for token in range(min(tokenizer.vocab_size, 4096)))
    return next((token for token in some if tokenizer.decode(token).strip()), [])


def check_tokens(tokens: Tokens, vocab_size: int, first_position: int = 0) -> np.ndarray:
    """`tokens` as an integer array `[T]`, each of them known to be in the vocabulary.

    Raises `ValueError` naming the first token outside 0 to `vocab_size` - 1, its position
    (counted from `first_position`) and the limit.
    """
    array = np.asarray(tokens)
    if not array.size:
        return np.zeros(0, np.int32)  # an empty list would come out as float64
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"tokens must be a flat sequence of whole numbers, "
            f"not {array.dtype} of shape {array.shape}"
        )
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        position = int(outside[0])
        raise UserError(
            f"token {array[position]} at position {first_position + position} is outside "
            f"the vocabulary: it must be 0 to {vocab_size - 1}"
        )
    return array
