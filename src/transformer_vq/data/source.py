"""What is trained on, scored and sampled: tokens, where documents begin, and who made them.

`Source` is the one thing that training, evaluation and sampling know of data. Whoever has other
data makes one of these: `Source.of(tokens)` will do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from transformer_vq.data.text import SPLITS, DataError, fingerprint, split
from transformer_vq.data.tokenizer import ByteTokenizer, Tokenizer
from transformer_vq.errors import shown


class Span(NamedTuple):
    """Where a split lies in the tokens."""

    start: int
    stop: int
    num_bytes: int  # of the original data that these tokens stand for


@dataclass(frozen=True, eq=False)
class Source:
    """Tokens and what they are: all of the data, or one split of it.

    Where there are several documents, each begins with `tokenizer.eos_id`, which is also what
    ends the one before. A single document has no such token.

    With `whole_documents` each stands for itself, as pictures do, and episodes of a task: it is a
    row of training, its first token is given and never predicted, and no document is predicted
    from another. With `counted` some tokens count and the others are only read: the loss is that
    of the tokens that count, and so are bits and accuracy.
    """

    tokens: np.ndarray  # integers [N], memory-mapped or not
    starts: np.ndarray  # int64 [documents]: where each begins; the first is 0
    num_bytes: int  # of the original data
    tokenizer: Tokenizer = ByteTokenizer()
    path: str = ""  # where it is from, for people
    spans: Mapping[str, Span] = field(default_factory=dict)  # of the splits; of a split none
    image_shape: tuple[int, int, int] | None = None  # height, width, channels; None for text
    notes: tuple[str, ...] = ()  # what was left out, a sentence each
    digest: str = ""  # SHA-256 of the tokens, if it is known
    whole_documents: bool = False  # pictures always are
    counted: np.ndarray | None = None  # bool [N]: tokens whose prediction counts; None: all

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _flat(self.tokens))
        object.__setattr__(self, "starts", np.asarray(self.starts))
        if self.image_shape:
            object.__setattr__(self, "whole_documents", True)
        if self.counted is not None and self.counted.shape != self.tokens.shape:
            raise DataError(
                f"counted has shape {self.counted.shape}: it must be {self.tokens.shape}, that of "
                f"the tokens"
            )

    @classmethod
    def of(
        cls,
        tokens: np.ndarray | Sequence[int],
        path: str = "",
        tokenizer: Tokenizer | None = None,
    ) -> "Source":
        """Tokens `[N]` of one document, split 90/5/5 by position, a byte each."""
        tokens, spans, start = _flat(tokens), {}, 0
        for name in ("train", "validation", "test"):
            stop = start + len(split(tokens, name))
            spans[name], start = Span(start, stop, stop - start), stop
        starts = np.zeros(1, np.int64)
        tokenizer = tokenizer or ByteTokenizer()
        return cls(tokens, starts, len(tokens), tokenizer, path, spans)

    @property
    def bytes_per_token(self) -> float:
        """Turns bits per token into bits per byte of the original data.

        Exactly 1 for bytes of one document, and for bytes of whole documents, whose start tokens
        are not predicted.
        """
        given = len(self.starts) if self.whole_documents else 0
        return self.num_bytes / max(len(self.tokens) - given, 1)

    @property
    def sequence_len(self) -> int | None:
        """How many tokens of a whole document are predicted, at most: they are a training
        sequence. None for text."""
        if not self.whole_documents:
            return None
        return int(np.diff(self.starts, append=len(self.tokens)).max()) - 1

    @property
    def start_id(self) -> int:
        """What stands before a text that has no prompt, or before the first byte of a picture."""
        several = len(self.starts) > 1
        return self.tokenizer.eos_id if several else self.tokenizer.start_id

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens, in hex. Reads all of them, unless it is known."""
        return self.digest or fingerprint(self.tokens)

    def split(self, name: str) -> "Source":
        """The part called train, validation, test or all: a view.

        Raises `DataError` for another name, and for a split that the data does not have.
        """
        if name not in SPLITS:
            raise DataError(f"unknown split {name!r}: the splits are {', '.join(SPLITS)}")
        if name == "all":
            return self
        if name not in self.spans:
            raise DataError(
                f"{self.path} has no {name} split: it has {', '.join(self.spans)}, and all"
            )
        start, stop, num_bytes = self.spans[name]
        first, last = np.searchsorted(self.starts, (start, stop))
        starts = self.starts[first:last] - start
        if not len(starts) or starts[0]:  # it begins within a document
            starts = np.concatenate([np.zeros(1, np.int64), starts])
        return replace(
            self,
            tokens=self.tokens[start:stop],
            starts=starts,
            num_bytes=num_bytes,
            spans={},
            digest="",
            counted=None if self.counted is None else self.counted[start:stop],
        )


def as_source(data: np.ndarray | Sequence[int] | Source) -> Source:
    """A `Source`, also of bare tokens `[N]`: an array or a list of whole numbers, or bytes.

    Raises `DataError` for anything else.
    """
    return data if isinstance(data, Source) else Source.of(data)


def _flat(data: Any) -> np.ndarray:
    """Tokens `[N]` as an array, a mapped one as it is. Raises `DataError` for what is none."""
    if isinstance(data, bytes | bytearray):
        return np.frombuffer(data, np.uint8)
    try:
        tokens = data if isinstance(data, np.ndarray) else np.asarray(data)
    except (ValueError, TypeError, OverflowError):  # of rows of unequal lengths, say
        tokens = np.empty(0, object)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        of = f"{tokens.dtype} of shape {tokens.shape}" if hasattr(data, "dtype") else shown(data)
        raise DataError(
            f"the tokens are {of}: they must be a flat array of whole numbers, or a Source "
            f"(open_source makes one of files)"
        )
    return tokens
