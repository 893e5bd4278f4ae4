"""A `State` on disk: one safetensors file, tied to its model by a hash and checked when read."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from transformer_vq.config import FOR_CODES, ModelConfig
from transformer_vq.errors import UserError, as_path, require_kind
from transformer_vq.nn.model import Model, State, init_state

# Fields of a configuration that states were saved without, and the value that changes nothing.
LATER_FIELDS = (
    FOR_CODES
    | dict.fromkeys(("key_shift", "score_gain", "sink"), False)
    | dict(zero_outputs=False, embedding_shortcut=False, logit_cap=0, products="float32")
)
VERSION = 2  # 1 had no spare rows in its tables
FORMAT = "transformer-vq state"
_MOST_HEADER = 1 << 24  # bytes of a header: a line for each array
_FAR = "far"  # the name of the bounds of the far part, in the header
_NOTE = "note."  # what the names of notes begin with, in the header


class StateError(UserError):
    """A state file that cannot be used, and why, in one sentence."""


class OtherModel(StateError):
    """A state of another model."""


def model_hash(model: Model) -> str:
    """SHA-256 of a model: its configuration and every byte of its arrays."""
    config = model.config.to_dict()
    for name, off in LATER_FIELDS.items():  # what older states know nothing of, if it is off
        if config[name] == off:
            del config[name]
    if model.config.forget == "none":
        del config["forget_horizon"]
        config.pop("long_units", None)
    digest = hashlib.sha256(json.dumps(config, indent=2).encode())
    for path, array in jax.tree.leaves_with_path((model.params, model.codebook)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(array)).tobytes())
    return digest.hexdigest()


def save_state(path: str | os.PathLike, state: State, model: Model) -> None:
    """Write a state of this model to a file, whole or not at all.

    Raises `StateError` if the state is of another model, the folder missing or the disk full; an
    older file then stays.
    """
    path = as_path("path", "." if isinstance(path, str) and not path else path)
    require_kind("state", state, State)
    require_kind("model", model, Model)
    if not path.name or (os.path.exists(path) and not os.path.isfile(path)):
        kind = "a directory" if os.path.isdir(path) else "a pipe or a device"
        raise StateError(f"cannot write the state to {path}, {kind}: give the name of a file")
    data = pack_state(state, model)
    partial = path.with_name(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StateError(f"cannot write the state to {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # gone already, if all went well
            partial.unlink()


def load_state(path: str | os.PathLike, model: Model) -> State:
    """Read a state that `save_state` wrote for this very model.

    Raises `StateError` for a missing, damaged or foreign file, or a state of another model.
    """
    path = as_path("path", path)
    require_kind("model", model, Model)
    try:
        data = _read(path)
    except OSError as error:
        raise StateError(f"cannot read the state {path}: {error.strerror or error}") from None
    return unpack_state(data, model, name=str(path))[0]


def pack_state(
    state: State, model: Model, *, digest: str | None = None, notes: Mapping[str, str] = {}
) -> bytes:
    """The content of a state file. Raises `StateError` if the state is of another model.

    `digest`: `model_hash(model)`, where it is known. `notes`: texts by name that go with the state.
    """
    _require_fit(state, model)
    arrays = {
        jax.tree_util.keystr(key): _as_bits(np.asarray(jax.device_get(array)))
        for key, array in jax.tree.leaves_with_path(state)
    }
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": digest or model_hash(model),
        "state_dtype": _dtype(state),
        _FAR: _far(model.config),
        **{_NOTE + name: text for name, text in notes.items()},
    }
    header["hash"] = _hash(header, arrays)
    return save(arrays, metadata=header)


def unpack_state(
    data: bytes, model: Model, *, digest: str | None = None, name: str = "the state"
) -> tuple[State, dict[str, str]]:
    """The state in the content of a file (`name` in errors), and its notes.

    Raises `StateError` for what is damaged or foreign, or of another model. `digest`: as above.
    """
    damaged = StateError(f"{name} is damaged or not a state file: make it again with save_state")
    size = int.from_bytes(data[:8], "little")
    header, end = _metadata(data[8 : 8 + size]) if size <= _MOST_HEADER else ({}, 0)
    if header.get("format") != FORMAT or end != len(data) - 8 - size:
        raise damaged
    if header.get("version") != str(VERSION):
        raise StateError(
            f"{name} has version {header.get('version')} of the format, and this program reads "
            f"version {VERSION}: make it again"
        )
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise damaged from None
    if header.pop("hash", "") != _hash(header, arrays):
        raise damaged
    if header.get("model") != (digest or model_hash(model)):
        made, here = header.get(_FAR), _far(model.config)
        if made and made != here:
            raise OtherModel(
                f"{name} is the state of another model: it was made with {made}, and here it is "
                f"{here}"
            )
        raise OtherModel(
            f"{name} is the state of another model: use the one it was made with (far_decay, "
            f"far_cap, and the rounding of products and weights included)"
        )
    positions = arrays.get(".position", np.zeros(1))
    keys = arrays.get(".units[0].keys")  # of full attention: as long as the state's capacity
    room = None if keys is None else keys.shape[2]
    expected, tree = _expected(model, len(positions), header["state_dtype"], room)
    if sorted(key for key, _, _ in expected) != sorted(arrays):
        raise damaged
    restored = [jax.device_put(arrays[key].view(dtype)) for key, _, dtype in expected]
    notes = {key.removeprefix(_NOTE): x for key, x in header.items() if key.startswith(_NOTE)}
    return jax.tree.unflatten(tree, restored), notes


def _read(path: Path) -> bytes:
    """The bytes of a file, or as many as tell that it is no state.

    Whatever the file is, no more is read than its header says. Raises `StateError` for what is no
    regular file (a pipe or a device may never end), and `OSError`.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise StateError(f"cannot read the state {path}: it is {what}, and no regular file")
    with path.open("rb") as file:
        size = int.from_bytes(start := file.read(8), "little")
        if size > _MOST_HEADER:
            return start
        start += (text := file.read(size))
        metadata, end = _metadata(text)
        if metadata.get("format") != FORMAT or end != os.fstat(file.fileno()).st_size - len(start):
            return start
        return start + file.read(end)


def _metadata(text: bytes) -> tuple[dict[str, str], int]:
    """What the header of a file says beside its arrays, and how many bytes those have.

    Nothing, if it is no header.
    """
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        metadata["format"]
        return metadata, max(array["data_offsets"][1] for array in header.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return {}, 0


def _require_fit(state: State, model: Model) -> None:
    """Raise `StateError` unless the state has the structure and shapes of the model's states."""
    rows, dtype, room = state.position.shape[0], _dtype(state), state.capacity
    leaves = jax.tree.leaves_with_path(state)
    described = [(jax.tree_util.keystr(key), x.shape, x.dtype) for key, x in leaves]
    if described != _expected(model, rows, dtype, room)[0]:
        raise StateError("the state is of another model: save it with the one that made it")


def _expected(
    model: Model, rows: int, dtype: str, room: int | None
) -> tuple[list[tuple[str, tuple[int, ...], Any]], Any]:
    """Path, shape and dtype of every array of the model's states, and their tree. Makes none."""
    found: Any = None

    def leaves() -> list[jax.Array]:
        nonlocal found
        pairs, tree = jax.tree.flatten_with_path(init_state(model.config, rows, dtype, room=room))
        found = [(jax.tree_util.keystr(key), x.shape, x.dtype) for key, x in pairs], tree
        return [x for _, x in pairs]

    jax.eval_shape(leaves)
    return found


def _far(config: ModelConfig) -> str:
    """The bounds of the far part, in words."""
    return f"far_decay {config.far_decay:g} and far_cap {config.far_cap}"


def _dtype(state: State) -> str:
    return str(state.units[0].values.dtype)


def _as_bits(array: np.ndarray) -> np.ndarray:
    """bfloat16, which numpy's safetensors cannot read, as whole numbers of the same bits."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _hash(header: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
