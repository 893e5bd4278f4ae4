"""Text of the command line, and text for terminals."""

import math
import re
import shutil
import textwrap
from typing import TYPE_CHECKING

from transformer_vq.data import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from transformer_vq import Token

_ESCAPES = dict(zip("abefnrtv0\\", b"\a\b\x1b\f\n\r\t\v\0\\", strict=True))
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[abefnrtv0\\])")


def unescape(text: str) -> str:
    r"""A text of the command line with \n, \r, \t and the like as what they mean.

    Shells make line breaks hard to type. \xHH is a byte, \uHHHH and \UHHHHHHHH are characters; what
    is none of these stays as it is. Bytes that are no UTF-8 are as in arguments: lone surrogates.
    """

    def meant(match: re.Match[bytes]) -> bytes:
        name = match[1].decode()
        if name[0] == "x":
            return bytes([int(name[1:], 16)])
        if name[0] in "uU":
            code = int(name[1:], 16)
            surrogate = 0xD800 <= code < 0xE000 or code > 0x10FFFF
            return match[0] if surrogate else chr(code).encode()
        return bytes([_ESCAPES[name]])

    content = text.encode(errors="surrogateescape")
    return re.sub(_ESCAPE.pattern.encode(), meant, content).decode(errors="surrogateescape")


def printable(text: str) -> str:
    """The text with control characters as ^A, so that none of them reaches a terminal."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: f"^{chr(code ^ 64)}" for code in (*range(32), 127) if chr(code) not in "\n\t"}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def broken(text: str) -> str:
    """A line as lines that a terminal does not break in the middle of a word."""
    width = max(shutil.get_terminal_size().columns, 20)
    return textwrap.fill(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def show_token(token: int, tokenizer: Tokenizer, decoder: StreamDecoder) -> str:
    """What a token would add to a text, between quotes as Python has it; half a character as 0xe2.

    `decoder`: where the text is.
    """
    if token >= tokenizer.vocab_size:
        return f"<{token}>"  # of the model, not of the vocabulary
    return show_bytes(decoder.adds(token))


def show_bytes(content: bytes) -> str:
    """Bytes between quotes, as Python has them; one that is no text as a number."""
    if len(content) == 1 and not 32 <= content[0] < 127:
        return f"0x{content[0]:02x}"
    return repr(content.decode(errors="replace"))


def logprob_line(token: "Token", tokenizer: Tokenizer, decoder: StreamDecoder) -> str:
    """A token, its log-probability in nats, and the likeliest tokens with their probabilities.

    `decoder`: where the text is before it.
    """
    best = list((token.top_logprobs or {}).items())[:4]
    others = "  ".join(f"{show_token(t, tokenizer, decoder)} {math.exp(p):.3f}" for t, p in best)
    return f"{show_token(token, tokenizer, decoder):6} {token.logprob:9.4f}   {others}\n"
