"""Tokens as people give them: lists, arrays, bytes, text. No JAX here."""

import numbers
import operator
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from transformer_vq.data.tokenizer import Tokens
from transformer_vq.errors import UserError, is_listed, shown

BYTES = 256  # the vocabulary of which text is tokens as it is: its bytes in UTF-8


def token_list(name: str, given: Any) -> list[int]:
    """The tokens of a list, an array or of bytes, as Python's whole numbers.

    Raises `UserError`, with the name of the list, for anything else.
    """
    if isinstance(given, bytes | bytearray | memoryview):
        return list(bytes(given))
    if isinstance(given, str | Mapping) or not is_listed(given):
        raise UserError(f"{name} is {shown(given)}: it must be a list of tokens (whole numbers)")
    tokens = given.tolist() if hasattr(given, "tolist") else list(given)  # NumPy's and JAX's
    if set(map(type, tokens)) <= {int}:
        return tokens
    return [whole_token(name, token) for token in tokens]


def whole_token(name: str, token: Any) -> int:
    """One token, of Python or of a library, as Python's whole number."""
    try:
        if isinstance(token, bool | np.bool_):
            raise TypeError
        return operator.index(token)
    except TypeError:
        raise UserError(f"{name} has {shown(token)}: tokens are whole numbers") from None


def text_tokens(name: str, text: str) -> list[int]:
    """The tokens of a text for a model of bytes: its UTF-8."""
    try:
        return list(text.encode(errors="surrogateescape"))
    except UnicodeEncodeError:
        raise UserError(f"{name} is {shown(text)}: it has half a character (a surrogate)") from None


def prompt_lists(prompts: Any, vocab_size: int, what: str = "prompt") -> list[list[int]]:
    """Prompts as lists of tokens. Text is its bytes for a model of bytes (256 tokens).

    Raises `UserError` for what is no list of prompts, or if a token is none of the model's. `what`:
    the word for a prompt.
    """
    one = f"{what}s is one {what}, {shown(prompts)}: give a list of them, [{what}]"
    if isinstance(prompts, str | bytes | bytearray | memoryview):
        raise UserError(one)
    if isinstance(prompts, Mapping | Set) or not is_listed(prompts):
        raise UserError(f"{what}s is {shown(prompts)}: it must be a list of {what}s")
    given = list(prompts)
    if given and all(map(_is_number, given)):
        raise UserError(one)
    if not given:
        raise UserError(f"there are no {what}s: give at least one")
    return [_prompt(f"{what} {i}", prompt, vocab_size) for i, prompt in enumerate(given)]


def _is_number(value: Any) -> bool:
    """Python's, or an array without axes."""
    return isinstance(value, numbers.Number) or getattr(value, "ndim", 1) == 0


def _prompt(name: str, prompt: Any, vocab_size: int) -> list[int]:
    if isinstance(prompt, Set):
        raise UserError(f"{name} is {shown(prompt)}: a set has no order, give a list of tokens")
    if isinstance(prompt, str):
        if vocab_size != BYTES:
            raise UserError(
                f"{name} is text, and the {vocab_size} tokens of this model are not bytes: encode "
                f"it with the vocabulary of its run, transformer_vq.data.run_tokenizer(folder)"
            )
        return text_tokens(name, prompt)
    tokens = token_list(name, prompt)
    check_vocabulary(name, tokens, vocab_size)
    return tokens


def check_vocabulary(name: str, tokens: Tokens, vocab_size: int) -> None:
    """Raise `UserError`, with the name of the list, for a token that the model does not have."""
    if isinstance(tokens, np.ndarray):  # one that is wrong is enough
        tokens = tokens[(tokens < 0) | (tokens >= vocab_size)][:1].tolist()
    if not len(tokens) or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return
    bad = next(t for t in tokens if not 0 <= t < vocab_size)
    raise UserError(
        f"{name} has the token {shown(bad)}, outside of the vocabulary: tokens go from 0 to "
        f"{vocab_size - 1}"
    )
