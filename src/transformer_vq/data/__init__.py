"""From a file to batches of tokens: vocabularies, files and splits, training and evaluation feeds.

NumPy and grain only: nothing here knows about models or devices.
"""

from transformer_vq.data.compressed import free_memory, is_compressed, load_bytes, open_binary
from transformer_vq.data.files import find_files
from transformer_vq.data.loader import Batch, Batches, EvalChunk, eval_chunks, row_starts
from transformer_vq.data.prepare import OnError, open_source
from transformer_vq.data.source import Source, as_source
from transformer_vq.data.tasks import Task, is_task
from transformer_vq.data.text import (
    DataError,
    bundled_corpus,
    fingerprint,
    require_length,
    split,
    text_pieces,
)
from transformer_vq.data.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer, check_tokens
from transformer_vq.data.vocabulary import (
    keep_tokenizer,
    load_tokenizer,
    run_tokenizer,
)
from transformer_vq.data.vocabulary_trainer import train_tokenizer

__all__ = [
    "Batch",
    "Batches",
    "ByteTokenizer",
    "DataError",
    "EvalChunk",
    "OnError",
    "Source",
    "StreamDecoder",
    "Task",
    "Tokenizer",
    "as_source",
    "bundled_corpus",
    "check_tokens",
    "eval_chunks",
    "find_files",
    "fingerprint",
    "free_memory",
    "is_compressed",
    "is_task",
    "keep_tokenizer",
    "load_bytes",
    "load_tokenizer",
    "open_binary",
    "open_source",
    "require_length",
    "row_starts",
    "run_tokenizer",
    "split",
    "text_pieces",
    "train_tokenizer",
]
