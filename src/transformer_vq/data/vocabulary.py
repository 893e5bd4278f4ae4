"""Vocabularies in files: SentencePiece models and Hugging Face's tokenizer.json; made here too.

Both are kept whole in memory, so that a run can have a copy of its own.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformer_vq.data.source import Source
from transformer_vq.data.text import DataError
from transformer_vq.data.tokenizer import ByteTokenizer, Tokenizer, Tokens, check_tokens
from transformer_vq.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# What vocabularies call the token that ends a text.
_ENDS = (END_OF_TEXT, "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|eos|>", "[SEP]")
_PIECE = 1 << 20  # bytes of text given to a trainer at once


class FileTokenizer:
    """What the vocabularies in files share. A subclass says how text becomes tokens, and back.

    If the vocabulary has no token that ends a text, there is one more, behind all others.
    """

    file_name: ClassVar[str]  # in the folder of a run

    def __init__(self, content: bytes, library: Any, size: int, end: int | None, by_bytes: bool):
        """`content`: of the file. `size`: tokens in it. `end`: which of them ends a text."""
        self.content, self._library, self.by_bytes = content, library, by_bytes
        self.name = f"{self.file_name} {hashlib.sha256(content).hexdigest()[:12]}"
        self.vocab_size = size + (end is None)
        self.eos_id = size if end is None else end
        line_break = self.encode("\n")
        self.start_id = line_break[0] if len(line_break) == 1 else self.eos_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, in parallel."""
        raise NotImplementedError

    def _decode(self, tokens: list[int]) -> bytes:
        raise NotImplementedError

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of `text`. Raises `ValueError` for what is not UTF-8."""
        if isinstance(text, str):
            text = text.encode(errors="surrogateescape")
        try:
            return self.encode_batch([text.decode()])[0]
        except UnicodeDecodeError as error:
            raise UserError(
                f"the text is not UTF-8 at byte {error.start:,}, and this vocabulary has no other "
                f"bytes: give text"
            ) from None

    def decode(self, tokens: Tokens) -> bytes:
        """The bytes of the text. Raises `ValueError` as `check_tokens` does."""
        ids = check_tokens(tokens, self.vocab_size).tolist()
        return self._decode([token for token in ids if token != self.eos_id])

    def decode_text(self, tokens: Tokens) -> str:
        """`decode` as text; what is not UTF-8 becomes U+FFFD."""
        return self.decode(tokens).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """A copy of the file in `folder`, unless it is there."""
        path = folder / self.file_name
        if not path.is_file() or path.read_bytes() != self.content:
            draft = folder / f".{self.file_name}.new"
            draft.write_bytes(self.content)
            draft.replace(path)


class HuggingFaceTokenizer(FileTokenizer):
    """A tokenizer.json of the library `tokenizers`."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes):
        library = _import("tokenizers").Tokenizer.from_str(content.decode())
        library.no_truncation()
        library.no_padding()
        vocabulary = library.get_vocab()
        end = next((vocabulary[token] for token in _ENDS if token in vocabulary), None)
        decoder = json.loads(content).get("decoder") or {}
        by_bytes = decoder.get("type") == "ByteLevel"
        super().__init__(content, library, max(vocabulary.values()) + 1, end, by_bytes)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def _decode(self, tokens: list[int]) -> bytes:
        if self.by_bytes:
            return b"".join(self._bytes_of.get(token, b"") for token in tokens)
        return self._library.decode(tokens, skip_special_tokens=False).encode()

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        """What each token stands for, where the vocabulary writes bytes as characters."""
        byte_of = _byte_of_character()
        added = self._library.get_added_tokens_decoder()

        def content(token: str, index: int) -> bytes:
            if index in added or not all(c in byte_of for c in token):
                return token.encode()
            return bytes(byte_of[c] for c in token)

        return {index: content(token, index) for token, index in self._library.get_vocab().items()}


class SentencePieceTokenizer(FileTokenizer):
    """A `.model` of the library `sentencepiece`."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes):
        library = _import("sentencepiece").SentencePieceProcessor(model_proto=content)
        end = library.eos_id()
        super().__init__(
            content, library, library.get_piece_size(), end if end >= 0 else None, by_bytes=False
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._library.encode(list(texts))

    def _decode(self, tokens: list[int]) -> bytes:
        return self._library.decode(tokens).encode(errors="replace")


_KINDS = (HuggingFaceTokenizer, SentencePieceTokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary in a file: `.model` of SentencePiece, or Hugging Face's `.json`.

    Raises `DataError` for another file, or one that its library cannot read.
    """
    path = Path(path)
    kind = next((k for k in _KINDS if path.suffix == Path(k.file_name).suffix), None)
    if kind is None:
        raise DataError(
            f"{path} is no vocabulary: give a tokenizer.json of Hugging Face's tokenizers, or a "
            f".model of SentencePiece"
        )
    try:
        return kind(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except DataError:
        raise
    except Exception as error:  # these libraries raise bare ones
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no vocabulary of {kind.file_name}'s kind: {reason}") from None


def run_tokenizer(folder: Path) -> Tokenizer:
    """The vocabulary that a run keeps in its folder; bytes if there is none."""
    for kind in _KINDS:
        if (folder / kind.file_name).is_file():
            return load_tokenizer(folder / kind.file_name)
    return ByteTokenizer()


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Let `run_tokenizer` find this vocabulary in a folder, and no other that was there."""
    for kind in _KINDS:
        if not isinstance(tokenizer, kind):
            (folder / kind.file_name).unlink(missing_ok=True)
    tokenizer.save(folder)


# Making one.


def train_tokenizer(source: Source, path: Path, vocab_size: int) -> Tokenizer:
    """Make a vocabulary of at most so many tokens from the training split of a source of bytes.

    `path` says which: `.json` is byte-level BPE, of which any bytes can be made; `.model` is
    SentencePiece's BPE, with bytes for rare characters, spaces and line breaks as they are.
    Raises `DataError` for another name, too small a size, or a text that is not UTF-8.
    """
    if path.suffix not in (".json", ".model"):
        raise DataError(f"{path} must end with .json (Hugging Face) or .model (SentencePiece)")
    texts = _texts(source.split("train"))
    if path.suffix == ".json":
        content = _train_bpe(texts, vocab_size)
    else:
        content = _train_sentencepiece(texts, vocab_size)
    path.write_bytes(content)
    return load_tokenizer(path)


def _train_bpe(texts: Iterator[str], vocab_size: int) -> bytes:
    library = _import("tokenizers")
    if vocab_size < 257:
        raise DataError(f"the vocabulary size is {vocab_size}: bytes and an end take 257")
    level = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode()


def _train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    written = io.BytesIO()
    try:
        _import("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines(keepends=True)),
            model_writer=written,
            vocab_size=vocab_size,
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).split("] ")[-1]
        raise DataError(
            f"SentencePiece cannot make {vocab_size} tokens of this text: {reason}"
        ) from None
    return written.getvalue()


def _texts(source: Source) -> Iterator[str]:
    """The documents of a source of bytes as text, long ones in pieces that end with a line."""
    ends = [*source.starts[1:], len(source.tokens)]
    separated = len(source.starts) > 1
    for start, end in zip(source.starts, ends, strict=True):
        place = int(start) + (separated and source.tokens[start] == source.tokenizer.eos_id)
        while place < end:
            piece = source.tokens[place : min(place + _PIECE, end)].tobytes()
            if place + len(piece) < end:
                piece = piece[: piece.rfind(b"\n") + 1] or piece
            place += len(piece)
            yield _decode(piece, source.path)


def _decode(piece: bytes, path: str) -> str:
    """As text; the halves of characters at either end do not count."""
    begin = next((i for i in range(min(4, len(piece))) if piece[i] & 0xC0 != 0x80), 0)
    try:
        return piece[begin:].decode()
    except UnicodeDecodeError as error:
        if begin + error.start < len(piece) - 3:
            raise DataError(
                f"{path} is not UTF-8, say at {piece[begin:][error.start : error.start + 8]!r}: a "
                f"vocabulary is made of text"
            ) from None
        return piece[begin : begin + error.start].decode()


def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as: themselves, or from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _import(library: str) -> Any:
    try:
        return __import__(library)
    except ImportError:
        raise DataError(
            f"vocabularies of this kind need {library}: pip install 'transformer-vq[text]'"
        ) from None
