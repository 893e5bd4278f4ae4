"""A hook of mkdocs: formulas become MathML, which browsers draw by themselves."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with its formulas drawn."""
    content = INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
    return BLOCK.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)
