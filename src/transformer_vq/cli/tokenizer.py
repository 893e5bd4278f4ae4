"""`tvq tokenizer train`: a vocabulary from text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional

from transformer_vq.cli.common import check_file, open_data, say, size
from transformer_vq.cli.interrupts import interruptible
from transformer_vq.cli.parse import DataPaths, UsageError, flat, option, require_whole
from transformer_vq.data import ByteTokenizer, OnError, train_tokenizer


@dataclass
class Tokenizer:
    """Make a vocabulary from text, for `tvq train --tokenizer`.

    A name that ends with .json gives byte-level BPE of Hugging Face's tokenizers, which any bytes
    can be made of; .model gives SentencePiece's BPE. Only the training split is looked at.
    """

    examples: ClassVar[str] = """
  tvq tokenizer train --data book.txt --out tokenizer.json --vocab-size 4096
  tvq train --data book.txt --tokenizer tokenizer.json --out runs/book
"""

    action: Annotated[Positional[Literal["train"]], option("what to do")]
    data: Annotated[DataPaths, option("files or folders, as for tvq train", "PATH")]
    out: Annotated[Path, option("where to write it: .json or .model", "FILE")]
    vocab_size: Annotated[int, option("tokens, at most")] = 8192
    text_column: Annotated[str, option("where .jsonl and .parquet have the text", "NAME")] = "text"
    on_error: Annotated[OnError, option("at a document that cannot be read")] = "stop"

    def main(self) -> int:
        require_whole("--vocab-size", self.vocab_size, high=10_000_000)
        if not flat(self.data):
            raise UsageError("--data is missing: give it (see tvq tokenizer --help)")
        check_file("--out", self.out)
        source = open_data(
            flat(self.data),
            tokenizer=ByteTokenizer(),
            text_column=self.text_column,
            on_error=self.on_error,
        )
        tokenizer = interruptible(lambda: train_tokenizer(source, self.out, self.vocab_size))
        sample = source.split("validation").tokens[: 1 << 20].tobytes().decode(errors="ignore")
        count = len(tokenizer.encode(sample))
        say(f"{self.out}: {tokenizer.vocab_size:,} tokens, made of {size(source.num_bytes)}")
        if count:
            print(f"{len(sample.encode()) / count:.2f} bytes of held-out text per token")
        return 0
