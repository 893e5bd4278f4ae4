"""Programs that a process finds ready on disk, so that it does not even trace them.

JAX's own cache saves compiling. But to find a program there it must be traced and lowered first,
which takes a start longer than all that the program then does. Here a program is found by what
determines it: the function, the shapes and the structure of its arguments, our sources, JAX's
versions and settings, and the processor.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import serialize_executable

from transformer_vq.engine.kept import read_kept, write_kept
from transformer_vq.engine.program import compiled_now

_kept_in: Path | None = None
_programs: dict[Any, Callable[..., Any]] = {}


def keep_programs(folder: str | os.PathLike | None) -> None:
    """Keep the programs of `call` in a folder that is there, and whose content is trusted as code;
    None: nowhere."""
    global _kept_in
    _kept_in = Path(folder) if folder and os.path.isdir(folder) else None
    _programs.clear()


def call(function: Any, *args: Any, **static: Any) -> Any:
    """`function(*args, **static)`, a function of `jax.jit`: by a program on disk, if one is there;
    else by one that is there for the next process. On a mesh, or within a trace, as ever.

    Of the arguments, all static ones are given by name, and no other.
    """
    if _kept_in is None or static.get("mesh") is not None:
        return function(*args, **static)
    leaves, tree = jax.tree.flatten(args)
    device = jax.devices()[0]
    shapes = tuple(_shape(leaf, device) for leaf in leaves)
    default = jax.config.jax_default_device  # pyright: ignore
    if None in shapes or default not in (None, device):
        return function(*args, **static)
    key = function.__module__, function.__qualname__, tree, shapes, tuple(sorted(static.items()))
    if key not in _programs:
        name = hashlib.sha256((_circumstances() + repr(key)).encode()).hexdigest()
        path = _kept_in / f"tvq-{function.__name__}-{name}"
        _programs[key] = _loaded(path, device) or _saved(path, function.lower(*args, **static))
    return _programs[key](*args)


def _shape(leaf: Any, device: Any) -> tuple | None:
    """What a program depends on of an argument; None: it is no array, or not of this device."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, leaf.dtype.name
    known = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if known and leaf.devices() == {device}:
        return repr(leaf.aval), str(leaf.sharding)
    return None


def _loaded(path: Path, device: Any) -> Callable[..., Any] | None:
    """The program in a file; None if there is none, or it is damaged."""
    kept = read_kept(path)
    if kept is None:
        return None
    with contextlib.suppress(Exception):
        content, given, made = pickle.loads(kept)
        return serialize_executable.deserialize_and_load(
            content, given, made, device.client, [device]
        )
    return None


def _saved(path: Path, lowered: jax.stages.Lowered) -> Callable[..., Any]:
    """The program compiled, and written to a file if that can be."""
    with compiled_now():  # one that comes from JAX's cache cannot be written again
        program = lowered.compile()
    with contextlib.suppress(Exception):  # else the next process makes it again
        write_kept(path, pickle.dumps(serialize_executable.serialize(program)))
    return program


@functools.cache
def _circumstances() -> str:
    """What else decides what a program is, in this process."""
    sources = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        sources.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    device = jax.devices()[0]
    flags = {k: v for k, v in os.environ.items() if k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    settings = sorted((name, repr(value)) for name, value in jax.config.values.items())
    about = (
        sources.hexdigest(), platform.python_version(), jax.__version__, version("jaxlib"),
        np.__version__, device.platform, device.device_kind, device.client.platform_version,
        jax.device_count(), flags, settings, _processor(),
    )  # fmt: skip
    return repr(about)


def _processor() -> str:
    """The instructions that the processor has, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = "model name", "flags", "Features"
    return repr(sorted({line for line in lines if line.startswith(kinds)}))
