"""An exported model: a folder that stands by itself, its arrays in one safetensors file.

DIR/
  config.json        sizes of the model, training, data, vocabulary; format, version and product
  model.safetensors  the arrays under their paths (`params.units.w_q`, `codebook.sum`), with a hash
                     of all of them and of the sizes in config.json
  metrics.jsonl      what the training measured, where that is known
  weights.json       what rounding the weights costs, where that is known
  tokenizer.json or tokenizer.model   the vocabulary, unless the tokens are bytes
  README.md          the model card

All of it is read as JSON, numbers and text: nothing in such a folder can run.
"""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.config import ModelConfig
from transformer_vq.errors import UserError, shown
from transformer_vq.io.state import model_hash
from transformer_vq.nn.layers import is_spec
from transformer_vq.nn.model import Model, model_specs

FORMAT = "transformer-vq model"
VERSION = 1
CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
FILES = (
    CONFIG_FILE,
    MODEL_FILE,
    "metrics.jsonl",
    "weights.json",
    "tokenizer.json",
    "tokenizer.model",
    "README.md",
)

_MOST_CONFIG = 1 << 20  # bytes
_MOST_HEADER = 1 << 24  # bytes: a line for each array
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {name: kind for kind, name in _TYPES.items()}


class ExportError(UserError):
    """An exported model cannot be written or read; one sentence says why and what to do."""


def is_export(folder: Path) -> bool:
    """Whether a folder is to be read as an exported model, sound or not, and not as a run."""
    if os.path.isdir(folder / "checkpoints"):
        return False
    if os.path.exists(folder / MODEL_FILE):
        return True
    try:
        return "config" not in _read_json(folder / CONFIG_FILE)  # that of a run has
    except (OSError, ValueError):
        return False


# What it is.


def write_config(folder: Path, config: ModelConfig, content: Mapping[str, Any]) -> None:
    """Write config.json: the format, the sizes of the model, and what else there is to tell."""
    version = importlib.metadata.version("transformer-vq")
    head = {"format": FORMAT, "version": VERSION, "product": f"transformer-vq {version}"}
    text = json.dumps({**head, "model": config.to_dict(), **content}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", "utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """All that config.json tells. Raises `ExportError` for what is not of this format."""
    path = folder / CONFIG_FILE
    try:
        content = _read_json(path)
    except FileNotFoundError:
        raise ExportError(
            f"{folder} holds no exported model: it has a {MODEL_FILE} and no {CONFIG_FILE}"
        ) from None
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ExportError(f"{path} is damaged ({error}): export the model again") from None
    if content.get("format") != FORMAT:
        raise ExportError(
            f"{path} is of another program: give a folder that tvq export or tvq import-official "
            f"wrote"
        )
    if content.get("version") != VERSION:
        raise ExportError(
            f"{path} has version {shown(content.get('version'))} of the format, and this program "
            f"reads version {VERSION}: export the model again, or update this program"
        )
    return content


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises `OSError`, and `ValueError` for what is none."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        data = file.read(_MOST_CONFIG + 1)
    if len(data) > _MOST_CONFIG:
        raise ValueError(f"it has more than {_MOST_CONFIG:,} bytes")
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


# Its arrays.


def cast_model(model: Model, dtype: str) -> Model:
    """The model with its parameters and codebooks in another dtype."""
    if model.config.param_dtype == dtype:
        return model
    params, codebook = jax.tree.map(lambda x: x.astype(dtype), (model.params, model.codebook))
    return Model(params, codebook, model.config.replace(param_dtype=dtype))


def require_dtype(dtype: str, name: str) -> None:
    """Raise `ExportError` for a dtype that JAX would change in silence: float64, unless enabled."""
    if jnp.asarray(np.zeros(0, jnp.dtype(dtype))).dtype != dtype:
        raise ExportError(f"{name} is of {dtype}, which takes jax_enable_x64: set that for JAX")


def save_model(folder: Path, model: Model) -> int:
    """Write model.safetensors, and return how many bytes it has. Raises `OSError`."""
    arrays = {name: np.asarray(jax.device_get(x)) for name, x in _named(model).items()}
    header: dict[str, Any] = {"__metadata__": _metadata(model)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        kind = _NAMES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / MODEL_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(_bytes_of(np.ascontiguousarray(array)))
        return file.tell()


def load_model(folder: Path, config: ModelConfig) -> Model:
    """The model of these sizes in model.safetensors.

    Raises `ExportError` for a file that is missing, cut, damaged, of another program, or does not
    belong to `config`.
    """
    path = folder / MODEL_FILE
    if not os.path.isfile(path):
        what = "is no regular file" if os.path.exists(path) else "is missing"
        raise ExportError(f"{path} {what}: export the model again")
    try:
        with path.open("rb") as file:
            metadata, entries = _read_header(file, path)
            params, codebook = _read_arrays(file, path, entries, config)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from None
    model = Model(params, codebook, config)
    if metadata != _metadata(model):
        raise ExportError(
            f"{path} is damaged, or {CONFIG_FILE} beside it was changed: the arrays and the sizes "
            f"are not those that were exported, so export the model again"
        )
    params, codebook = jax.tree.map(jnp.asarray, (params, codebook))
    return Model(params, codebook, config)


def _metadata(model: Model) -> dict[str, str]:
    return {"format": FORMAT, "version": str(VERSION), "model": model_hash(model)}


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a model, or of what describes one, by their paths."""
    leaves = jax.tree.leaves_with_path((tree.params, tree.codebook), is_leaf=is_spec)
    parts = ("params", "codebook")
    return {
        ".".join([parts[path[0].idx], *(str(key.key) for key in path[1:])]): leaf
        for path, leaf in leaves
    }


def _read_header(file: BufferedReader, path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What a safetensors file says of itself and of its arrays, which lie side by side to its end.

    Raises `ExportError`.
    """
    size = int.from_bytes(file.read(8), "little")
    room = os.fstat(file.fileno()).st_size - 8 - size
    try:
        if not 0 < size <= _MOST_HEADER or room < 0:
            raise ValueError
        header = json.loads(file.read(size).decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        end = 0
        for start, stop in spans:
            if not (isinstance(stop, int) and start == end <= stop):
                raise ValueError
            end = stop
        if end != room:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ExportError(
            f"{path} is damaged, cut or no safetensors file: export the model again"
        ) from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ExportError(
            f"{path} is of another program: give a folder that tvq export or tvq import-official "
            f"wrote"
        )
    return metadata, header


def _read_arrays(
    file: BufferedReader, path: Path, entries: dict[str, Any], config: ModelConfig
) -> tuple[Any, Any]:
    """`(params, codebook)` as numpy arrays. Raises `ExportError` for the first misfit."""
    specs = model_specs(config)
    wanted = _named(Model(*specs, config))
    beside = f"and {CONFIG_FILE} says"
    for name in (*wanted, *entries):
        said = f"{path}: {shown(name)}"
        if name not in entries:
            raise ExportError(f"{said} is missing, {beside} {wanted[name].shape}: export it again")
        if name not in wanted:
            raise ExportError(f"{said} has no place in the model of {CONFIG_FILE}: export it again")
        found = (entries[name].get("dtype"), entries[name].get("shape"))
        right = (_NAMES[config.param_dtype], list(wanted[name].shape))
        if found != right:
            raise ExportError(
                f"{said} is {shown(found[0])} {shown(found[1])}, {beside} {right[0]} {right[1]}: "
                f"export it again"
            )
    require_dtype(config.param_dtype, str(path))
    dtype, begin = jnp.dtype(config.param_dtype), file.tell()
    arrays = []
    for name, spec in wanted.items():
        start, stop = entries[name]["data_offsets"]
        array = np.empty(spec.shape, dtype)
        file.seek(begin + start)
        if stop - start != array.nbytes or file.readinto(_bytes_of(array)) != array.nbytes:
            raise ExportError(f"{path} is damaged at {name}: export the model again")
        arrays.append(array)
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), arrays)


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of an array, which is contiguous."""
    return array.reshape(-1).view(np.uint8).data
