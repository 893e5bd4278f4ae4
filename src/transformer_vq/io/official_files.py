"""Files of the reference implementation: its weights as arrays by path, its fields by name.

It saves a flax `TrainState` (flax 0.6.11, `checkpoints.save_checkpoint_multiprocess`), which is
msgpack: nested dictionaries with `step`, `params` and `opt_state`. That is a file
`checkpoint_STEP`, or a folder of this name with one file `checkpoint` where flax saves by orbax.
An array is msgpack again (shape, dtype, bytes), as an extension of type 1, and one of more than
2^30 bytes is in chunks. An .npz with an array for each path will do, too.

Nothing that is read here can run: msgpack has no objects, and .npz is read without pickles.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgpack
import numpy as np

from transformer_vq.errors import UserError, cut, shown

_ARRAY, _SCALAR = 1, 3  # extension types of flax
FLOATS = ("bfloat16", "float16", "float32", "float64")
_TYPES = {
    *FLOATS,
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "bool",
}
# What is raised of bytes that make no sense, by libraries that take them for sound.
_WRONG = (ValueError, TypeError, AttributeError, OverflowError, RuntimeError)
_MOST_FIELDS = 1 << 20  # bytes of a file of fields
_FIELD = re.compile(r"\s*(?:--|config\.|- )?(\w+)\s*[:=]\s*(.*?)[\s\\]*")


class OfficialError(UserError):
    """A file of the reference implementation cannot be used; one sentence says why."""


class Weights(NamedTuple):
    """What a file of weights holds."""

    params: dict[str, np.ndarray]  # by path, as `out_proj/kernel`
    step: int  # updates done; 0 if it does not say
    fields: dict[str, Any]  # of the configuration, if they are beside the arrays


def read_weights(path: Path) -> Weights:
    """The weights in a checkpoint of flax or in an .npz; of a folder of checkpoints, the newest.

    Raises `OfficialError` for what is neither, and `OSError`.
    """
    path = _file(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    weights = _read_npz(path) if is_zip else _read_msgpack(path)
    if not weights.params:
        raise OfficialError(f"{path} has no parameters: give a checkpoint of the train state")
    for name, array in weights.params.items():
        if array.dtype.name not in FLOATS:
            raise OfficialError(f"{path}: {name} is of type {array.dtype.name}: it must be floats")
    return weights


def _file(path: Path) -> Path:
    """The file of a checkpoint that may be a folder, or one of many in a folder."""
    if not path.is_dir():
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise OfficialError(f"{path} {what}: give a checkpoint or an .npz")
        return path
    if (path / "checkpoint").is_file():
        return path / "checkpoint"
    found = {
        int(m[1]): p
        for p in path.iterdir()
        if (m := re.fullmatch(r"checkpoint_(\d{1,18})", p.name))
    }
    if not found:
        raise OfficialError(f"{path} holds no checkpoint of flax (checkpoint_STEP): give its file")
    newest = found[max(found)]
    if newest.is_dir() and not (newest / "checkpoint").is_file():
        raise OfficialError(f"{newest} has no file checkpoint, in which flax keeps the arrays")
    return _file(newest)


def _read_npz(path: Path) -> Weights:
    file = path.open("rb")
    try:
        with file, np.load(file, allow_pickle=False) as arrays:
            inside = [name for name in arrays.files if name.startswith("params/")]
            names = inside or [name for name in arrays.files if name != "config_json"]
            params = {name.removeprefix("params/"): arrays[name] for name in names}
            text = str(arrays["config_json"]) if "config_json" in arrays.files else "{}"
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive makes its libraries raise what they will
        raise OfficialError(f"{path} cannot be read as .npz: {cut(str(error), 200)}") from None
    return Weights(params, 0, fields_of_text(text))


def _read_msgpack(path: Path) -> Weights:
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, strict_map_key=True)
        if not isinstance(tree, dict):
            raise ValueError("it holds no dictionary")
    except (*_WRONG, msgpack.UnpackException) as error:
        raise OfficialError(
            f"{path} is damaged or no checkpoint of flax: {cut(str(error), 200) or 'cut short'}"
        ) from None
    step = tree.get("step", 0)
    params = tree
    while isinstance(params, dict) and "params" in params:
        params = params["params"]
    whole = isinstance(step, int | np.integer | np.ndarray) and np.ndim(step) == 0
    return Weights(dict(_leaves(params, path)), int(step) if whole else 0, {})


def _extension(code: int, data: bytes) -> Any:
    """An array, or nothing for what no parameter is."""
    if code not in (_ARRAY, _SCALAR):
        return None
    shape, name, content = msgpack.unpackb(data, raw=True)
    if name.decode() not in _TYPES:
        raise ValueError(f"an array is of type {shown(name.decode())}")
    return np.frombuffer(content, jnp.dtype(name.decode())).reshape(shape)


def _leaves(tree: Any, path: Path, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of nested dictionaries by their paths. Raises `OfficialError` for other leaves."""
    if isinstance(tree, dict) and "__msgpack_chunked_array__" in tree:
        try:
            shape = [tree["shape"][str(i)] for i in range(len(tree["shape"]))]
            chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
            yield name, np.concatenate(chunks).reshape(shape)
        except (KeyError, ValueError, TypeError):
            raise OfficialError(f"{path}: the chunks of {name} are damaged") from None
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, path, f"{name}/{key}" if name else str(key))
    elif isinstance(tree, np.ndarray):
        yield name, tree
    else:
        elsewhere = isinstance(tree, str) and tree.startswith("PLACEHOLDER:")
        why = "lies in files of its own, which are not read" if elsewhere else "is no array"
        raise OfficialError(f"{path}: {cut(name or 'the content')} {why}: save it as one file")


# Fields of its configuration.


def read_fields(path: Path) -> dict[str, Any]:
    """The fields in a file: JSON, or a line for each, as `d_model: 768` or `--d_model=768`.

    So its scripts, what it prints when it starts, and the config.yaml of wandb can be given.
    Raises `OfficialError`, and `OSError`.
    """
    if path.exists() and not path.is_file():  # a pipe that nobody writes to is waited for
        raise OfficialError(f"{path} is no regular file: give JSON, or a line for each field")
    with path.open("rb") as file:
        data = file.read(_MOST_FIELDS + 1)
    if len(data) > _MOST_FIELDS:
        raise OfficialError(f"{path} has more than {_MOST_FIELDS:,} bytes: it is no configuration")
    try:
        fields = fields_of_text(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise OfficialError(f"{path} is not text: give JSON, or a line for each field") from None
    if not fields:
        raise OfficialError(f"{path} has no fields: give JSON, or a line for each field")
    return fields


def fields_of_text(text: str) -> dict[str, Any]:
    """The fields in a text (see `read_fields`), without those that are None."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = dict(_field_lines(text))
    fields = content if isinstance(content, Mapping) else {}
    return {name: value for name, value in fields.items() if value is not None}


def _field_lines(text: str) -> Iterator[tuple[str, Any]]:
    above = ""  # a name whose value is in a line below, as in config.yaml of wandb
    for line in text.splitlines():
        found = _FIELD.fullmatch(line.partition(" #")[0])
        if found is None:
            continue
        name, value = found.groups()
        if not value:
            above = name
        elif name == "value" and above:
            yield above, field_value(value)
        else:
            yield name, field_value(value)


def field_value(text: str) -> Any:
    """A value as people write it: a number, true or false, None, or text."""
    text = text.strip().rstrip(",").strip("'\"").removeprefix("jnp.")
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text in ("", "None", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
