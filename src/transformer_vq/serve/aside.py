"""What has much to do is done in a thread, and in slices. No HTTP, no JAX.

Python's threads take turns only between its own steps: one call on a list of millions, such as
`min` or `json.loads`, holds up all of them. So long lists are gone through in slices, and tokens
are kept as arrays, of which every call is short.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from transformer_vq.data import ByteTokenizer, Tokenizer

LARGE = 1 << 16  # bytes, characters or tokens, of which more are handled aside
SLICE = 1 << 15  # items of a list

Found = TypeVar("Found")


async def aside(size: int, call: Callable[..., Found], *args: Any) -> Found:
    """A call, in a thread if it has much to do: it goes through `size` characters or tokens."""
    if size <= LARGE:
        return call(*args)
    return await asyncio.to_thread(call, *args)


def token_array(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Tokens, which fit, as an array, int32."""
    if isinstance(tokens, np.ndarray):
        return tokens.astype(np.int32, copy=False)
    starts = range(0, len(tokens), SLICE)
    parts = [np.asarray(tokens[start : start + SLICE], np.int32) for start in starts]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of a text, int32. Raises `ValueError` as `Tokenizer.encode` does."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype(np.int32)
    return token_array(tokenizer.encode(text))


def json_list(numbers: np.ndarray) -> str:
    """Whole numbers as JSON."""
    starts = range(0, len(numbers), SLICE)
    parts = (",".join(map(str, numbers[start : start + SLICE].tolist())) for start in starts)
    return f"[{','.join(parts)}]"


def json_text(content: Any, size: int, *, ascii: bool = False) -> str:
    """JSON as a response has it. Of a large content it is slower, and lets others go on."""
    encoder = json.JSONEncoder(ensure_ascii=ascii, allow_nan=False, separators=(",", ":"))
    return encoder.encode(content) if size <= LARGE else "".join(encoder.iterencode(content))
