"""Vocabularies made of text, by the libraries that read them."""

import io
from collections.abc import Iterator
from pathlib import Path

from transformer_vq.atomic import write_whole
from transformer_vq.data.source import Source
from transformer_vq.data.text import DataError
from transformer_vq.data.tokenizer import Tokenizer
from transformer_vq.data.vocabulary import END_OF_TEXT, import_library, load_tokenizer
from transformer_vq.errors import as_path, require_kind
from transformer_vq.fields import require_count

MAX_VOCAB_SIZE = 1_000_000  # trainers take memory for all at once
_PIECE = 1 << 20  # bytes of text given to a trainer at once


def train_tokenizer(source: Source, path: str | Path, vocab_size: int) -> Tokenizer:
    """Make a vocabulary of at most so many tokens from the training split of a source of bytes.

    `path` says which: `.json` is byte-level BPE, of which any bytes can be made; `.model` is
    SentencePiece's BPE, with bytes for rare characters, spaces and line breaks as they are.
    Raises `DataError` for another name, too small or large a size, or a text that is not UTF-8;
    `OSError` if the file cannot be written.
    """
    require_kind("source", source, Source, "which open_source makes of files")
    path = as_path("the file of the vocabulary", path)
    require_count("the vocabulary size", vocab_size)
    if path.suffix.lower() not in (".json", ".model"):
        raise DataError(f"{path} must end with .json (Hugging Face) or .model (SentencePiece)")
    if vocab_size > MAX_VOCAB_SIZE:
        raise DataError(
            f"the vocabulary size is {vocab_size}: it must be at most {MAX_VOCAB_SIZE:,}"
        )
    texts = _texts(source.split("train"))
    if path.suffix.lower() == ".json":
        content = _train_bpe(texts, vocab_size)
    else:
        content = _train_sentencepiece(texts, vocab_size)
    write_whole(path, content)
    return load_tokenizer(path)


def _train_bpe(texts: Iterator[str], vocab_size: int) -> bytes:
    library = import_library("tokenizers")
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
        import_library("sentencepiece").SentencePieceTrainer.train(
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
        reason = str(error).split("] ")[-1].strip() or "it does not say why"
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
