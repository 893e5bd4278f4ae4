"""Transformer-VQ: generative models over very long sequences, at linear cost.

`__init__.pyi` lists the public names. Each is imported when it is first asked for, so that
`tvq --help` and readers of configurations do not wait for JAX.
"""

import ast
import importlib
from pathlib import Path
from typing import Any


def _homes() -> dict[str, str]:
    """Public name: the module it lives in."""
    index = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))
    imports = [node for node in index.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


_HOMES = _homes()
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
