"""Vocabularies in files: SentencePiece models and Hugging Face's tokenizer.json.

Both are kept whole in memory, so that a run can have a copy of its own. A text is text: letters
that spell a special token, such as `<|endoftext|>`, are encoded as letters.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from transformer_vq.atomic import write_whole
from transformer_vq.data.compressed import open_binary
from transformer_vq.data.text import DataError
from transformer_vq.data.tokenizer import ByteTokenizer, Tokenizer, Tokens, check_tokens, text_bytes
from transformer_vq.errors import UserError, as_path, to_install

END_OF_TEXT = "<|endoftext|>"
# What vocabularies call the token that ends a text.
_ENDS = (END_OF_TEXT, "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|eos|>", "[SEP]")
_SPACE = "\u2581"  # how SentencePiece writes a space

# What some vocabularies change, and a text that shows it.
_CHANGES = {
    "the beginning of a text": "a",
    "spaces at the ends or side by side": " a  b ",
    "line breaks or tabs": "a\nb\r\n\tc",
    "capital letters": "aBc",
    "punctuation": "a, (b) don't.",
    "accents": "\u00e9 e\u0301",
    "rare characters": "a \u65e5 \U0001d11e",
    "U+2581": "a\u2581b",
}


class FileTokenizer:
    """What the vocabularies in files share. A subclass says how text becomes tokens, and back.

    If the vocabulary has no token that ends a text, there is one more, behind all others.
    """

    file_name: ClassVar[str]  # in the folder of a run

    def __init__(
        self,
        content: bytes,
        library: Any,
        size: int,
        end: int | None,
        *,
        by_bytes: bool = False,
        bytes_of: dict[int, int] | None = None,
    ):
        """`content`: of the file. `size`: tokens in it. `end`: which of them ends a text.

        `bytes_of`: the tokens that are a single byte, of vocabularies that have such for what they
        have no other token for.
        """
        self.content, self._library, self.by_bytes = content, library, by_bytes
        self.name = f"{self.file_name} {hashlib.sha256(content).hexdigest()[:12]}"
        self.vocab_size = size + (end is None)
        self.eos_id = size if end is None else end
        self._single = bytes_of or {}
        line_break = self.encode("\n")
        self.start_id = line_break[0] if len(line_break) == 1 else self.eos_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, in parallel."""
        raise NotImplementedError

    def _text(self, tokens: list[int]) -> str:
        """The text of tokens, as the library has it."""
        raise NotImplementedError

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of `text`. Raises `ValueError` for what is not UTF-8."""
        try:
            return self.encode_batch([text_bytes(text).decode()])[0]
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

    @property
    def changes(self) -> str:
        """What of a text does not come back as it was, in words; empty if all does."""
        return self._changes

    @cached_property
    def _changes(self) -> str:
        found = [what for what, text in _CHANGES.items() if not self._gives_back(text)]
        end = self.decode_end()
        if end and self.eos_id in self.encode(f"a {end} b"):
            found.append(f"the letters {end}")
        return ", ".join(found)

    def decode_end(self) -> str:
        """The letters of the end token; empty if it has none."""
        return ""

    def save(self, folder: Path) -> None:
        """A copy of the file in `folder`, unless it is there."""
        path = folder / self.file_name
        if not path.is_file() or path.read_bytes() != self.content:
            write_whole(path, self.content)

    def _gives_back(self, text: str) -> bool:
        return self.decode(self.encode(text)) == text.encode()

    def _decode(self, tokens: list[int]) -> bytes:
        """The bytes of tokens. The library knows text only: bytes that are none are put in here."""
        out: list[bytes] = []
        for single, group in groupby(tokens, key=self._single.__contains__):
            ids = list(group)
            if single:
                out.append(bytes(self._single[token] for token in ids))
            elif not any(out):
                out.append(self._text(ids).encode(errors="replace"))
            else:  # not the beginning of a text, where a space may be left out
                out.append(self._text([self._letter, *ids])[1:].encode(errors="replace"))
        return b"".join(out)

    @cached_property
    def _letter(self) -> int:
        return next(token for token, byte in self._single.items() if byte == ord("A"))


class HuggingFaceTokenizer(FileTokenizer):
    """A tokenizer.json of the library `tokenizers`."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes):
        values = json.loads(content)
        library = import_library("tokenizers").Tokenizer.from_str(content.decode("utf-8-sig"))
        vocabulary = library.get_vocab()
        self._end = next((token for token in _ENDS if token in vocabulary), "")
        added = values.get("added_tokens") or []
        if any(token["content"] == self._end and not token["special"] for token in added):
            for token in added:
                token["special"] |= token["content"] == self._end
            library = type(library).from_str(json.dumps(values))
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # their letters are text
        decoder = values.get("decoder") or {}
        kinds = {decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))}
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        single = names.keys() <= vocabulary.keys() and "ByteFallback" in kinds
        super().__init__(
            content,
            library,
            max(vocabulary.values()) + 1,
            vocabulary.get(self._end),
            by_bytes=decoder.get("type") == "ByteLevel",
            bytes_of={vocabulary[name]: byte for name, byte in names.items()} if single else None,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare ones
            reason = " ".join(str(error).split())
            raise UserError(
                f"the vocabulary {self.name} cannot express this text: {reason}"
            ) from None
        return [one.ids for one in encoded]

    def decode_end(self) -> str:
        return self._end

    def _text(self, tokens: list[int]) -> str:
        return self._library.decode(tokens, skip_special_tokens=False)

    def _decode(self, tokens: list[int]) -> bytes:
        if self.by_bytes:
            return b"".join(self._bytes_of.get(token, b"") for token in tokens)
        return super()._decode(tokens)

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
        library = import_library("sentencepiece").SentencePieceProcessor(model_proto=content)
        end, size = library.eos_id(), library.get_piece_size()
        single = {
            token: int(library.id_to_piece(token)[3:-1], 16)
            for token in range(size)
            if library.is_byte(token)
        }
        super().__init__(content, library, size, end if end >= 0 else None, bytes_of=single)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._escape and any(_SPACE in text for text in texts):
            return [self._encode_escaped(text) for text in texts]
        return self._library.encode(list(texts))

    def _encode_escaped(self, text: str) -> list[int]:
        """U+2581, which the library writes spaces as, is its bytes: so it comes back as it was."""
        first, *rest = self._library.encode(text.split(_SPACE))
        return first + [token for part in rest for token in (*self._escape, *part)]

    @cached_property
    def _escape(self) -> list[int]:
        """The bytes of U+2581, where a text may be cut there: if spaces stay as they are."""
        token_of = {byte: token for token, byte in self._single.items()}
        pieces = self._library.encode(["", "a", " a ", "  "])
        whole = [self._library.decode(ids) for ids in pieces] == ["", "a", " a ", "  "]
        exact = whole and not self._library.id_to_piece(pieces[1][0]).startswith(_SPACE)
        return [token_of[byte] for byte in _SPACE.encode()] if exact and token_of else []

    def _text(self, tokens: list[int]) -> str:
        return self._library.decode(tokens)


_KINDS = (HuggingFaceTokenizer, SentencePieceTokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary in a file: `.model` of SentencePiece, or Hugging Face's `.json`.

    Raises `DataError` for another file, or one that its library cannot read.
    """
    path = as_path("the vocabulary", path)
    ending = path.suffix.lower()
    kind = next((k for k in _KINDS if ending == Path(k.file_name).suffix), None)
    if kind is None:
        raise DataError(
            f"{path} is no vocabulary: give a tokenizer.json of Hugging Face's tokenizers, or a "
            f".model of SentencePiece"
        )
    try:
        open_binary(path).close()  # it is a file, and no pipe that nobody writes to
        content = path.read_bytes()
        if not content:  # of which a library complains on the terminal
            raise DataError(f"{path} is empty: give a vocabulary")
        return kind(content)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except DataError:
        raise
    except Exception as error:  # these libraries raise bare ones
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no vocabulary of {kind.file_name}'s kind: {reason}") from None


def run_tokenizer(folder: str | Path, expected: str | None = None) -> Tokenizer:
    """The vocabulary that a run keeps in its folder; bytes if there is none.

    `expected`: the name of the one that the run was trained with (`RunInfo.tokenizer`). Raises
    `DataError` if its file is lost, or is another one. (Names that callers of `ops.loop.train` gave
    say nothing of a file.)
    """
    folder = Path(folder)
    found = next((folder / k.file_name for k in _KINDS if (folder / k.file_name).is_file()), None)
    own = next((k.file_name for k in _KINDS if (expected or "").startswith(f"{k.file_name} ")), "")
    if own and (found is None or found.name != own):
        raise DataError(
            f"the run in {folder} was trained with the vocabulary {expected}, and its "
            f"{folder / own} is gone: put it back"
        )
    tokenizer = ByteTokenizer() if found is None else load_tokenizer(found)
    if found is not None and (own or expected == "bytes") and tokenizer.name != expected:
        trained = f"the vocabulary {expected}" if own else "bytes, without a vocabulary"
        raise DataError(
            f"{found} is another vocabulary ({tokenizer.name}) than the run in {folder} was "
            f"trained with ({trained}): {'put its own back' if own else 'remove the file'}"
        )
    return tokenizer


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Let `run_tokenizer` find this vocabulary in a folder, and no other that was there."""
    for kind in _KINDS:
        if not isinstance(tokenizer, kind):
            (folder / kind.file_name).unlink(missing_ok=True)
    tokenizer.save(folder)


def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as: themselves, or from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def import_library(library: str) -> Any:
    """A library that reads or makes vocabularies. Raises `DataError` if it is not installed."""
    try:
        return __import__(library)
    except ImportError:
        raise DataError(f"vocabularies of this kind need {library}: {to_install('text')}") from None
