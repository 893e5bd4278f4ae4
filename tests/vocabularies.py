"""Small vocabularies of the kinds that people bring, each made of the same text in an instant."""

import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from transformer_vq.data import open_source, train_tokenizer

MADE_HERE = ("bpe.json", "sp.model")
OTHERS = (
    "default.model",
    "llama.json",
    "metaspace.json",
    "suffix.json",
    "words.json",
    "level.json",
)


def make_vocabularies(folder: Path, text: str) -> Path:
    """Files in `folder`, of the names in MADE_HERE and OTHERS."""
    (folder / "book.txt").write_text(text)
    source = open_source([folder / "book.txt"])
    for name in MADE_HERE:
        train_tokenizer(source, folder / name, 400)
    text = text[:30_000]
    _default(text, folder / "default.model")
    _llama(text).save(str(folder / "llama.json"))
    for name, (model, options, pre, decoder) in _KINDS.items():
        library = tokenizers.Tokenizer(model)
        library.pre_tokenizer, library.decoder = pre, decoder
        special = ["[UNK]", "</s>"] if name != "words.json" else ["[UNK]"]
        trainer = model.get_trainer()
        trainer.special_tokens = [tokenizers.AddedToken(token, special=True) for token in special]
        for option, value in {"show_progress": False, "vocab_size": 300, **options}.items():
            setattr(trainer, option, value)
        library.train_from_iterator([text], trainer)
        library.save(str(folder / name))
    return folder


_KINDS = {
    "metaspace.json": (
        models.BPE(unk_token="[UNK]"), {}, pre_tokenizers.Metaspace(), decoders.Metaspace()
    ),
    "suffix.json": (
        models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"),
        {"end_of_word_suffix": "</w>"},
        pre_tokenizers.Whitespace(),
        decoders.BPEDecoder("</w>"),
    ),
    "words.json": (
        models.WordPiece(unk_token="[UNK]"), {}, pre_tokenizers.Whitespace(), decoders.WordPiece()
    ),
    "level.json": (
        models.WordLevel(unk_token="[UNK]"), {}, pre_tokenizers.WhitespaceSplit(), None
    ),
}  # fmt: skip


def _default(text: str, path: Path) -> None:
    """SentencePiece as the library makes it, with bytes for rare characters."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=written,
        vocab_size=450,
        byte_fallback=True,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())


def _llama(text: str) -> tokenizers.Tokenizer:
    """A SentencePiece model turned into a tokenizer.json, as that of Llama 2."""
    normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )  # fmt: skip
    plain = tokenizers.Tokenizer(models.BPE())
    plain.normalizer = normalizer
    plain.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    plain.train_from_iterator(
        text.splitlines(), trainers.BpeTrainer(vocab_size=250, show_progress=False)
    )
    model = json.loads(plain.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [tuple(pair) for pair in model["merges"]]
    library = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    library.add_special_tokens(names[:3])
    library.normalizer = normalizer
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return library
