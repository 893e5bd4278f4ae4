"""A `State` on disk: one safetensors file, tied to its model by a hash and checked when read."""

import contextlib
import hashlib
import json
import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from transformer_vq.config import FOR_CODES
from transformer_vq.errors import UserError, as_path, require_kind
from transformer_vq.nn.model import Model, State, init_state

# Fields of a configuration that states were saved without, and the value that changes nothing.
MEMORY_FIELDS = FOR_CODES | dict.fromkeys(("key_shift", "score_gain", "sink"), False)
VERSION = 2  # 1 had no spare rows in its tables
FORMAT = "transformer-vq state"
_MOST_HEADER = 1 << 24  # bytes of a header: a line for each array


class StateError(UserError):
    """A state file that cannot be used, and why, in one sentence."""


def model_hash(model: Model) -> str:
    """SHA-256 of a model: its configuration and every byte of its arrays."""
    config = model.config.to_dict()
    for name, off in MEMORY_FIELDS.items():  # what older states know nothing of, if it is off
        if config[name] == off:
            del config[name]
    if model.config.forget == "none":
        del config["forget_horizon"]
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
    path = as_path("path", path if path != "" else ".")
    require_kind("state", state, State)
    require_kind("model", model, Model)
    if not path.name or (os.path.exists(path) and not os.path.isfile(path)):
        kind = "a directory" if os.path.isdir(path) else "a pipe or a device"
        raise StateError(f"cannot write the state to {path}, {kind}: give the name of a file")
    _require_fit(state, model)
    arrays = {
        jax.tree_util.keystr(key): _as_bits(np.asarray(jax.device_get(array)))
        for key, array in jax.tree.leaves_with_path(state)
    }
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": model_hash(model),
        "state_dtype": _dtype(state),
    }
    header["hash"] = _hash(header, arrays)
    partial = path.with_name(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(save(arrays, metadata=header))
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
    damaged = StateError(f"{path} is damaged or not a state file: make it again with save_state")
    try:
        data, header = _read(path)
    except OSError as error:
        raise StateError(f"cannot read the state {path}: {error.strerror or error}") from None
    if header.get("format") != FORMAT:
        raise damaged
    if header.get("version") != str(VERSION):
        raise StateError(
            f"{path} has version {header.get('version')} of the format, and this program reads "
            f"version {VERSION}: make it again"
        )
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise damaged from None
    if header.pop("hash", "") != _hash(header, arrays):
        raise damaged
    if header.get("model") != model_hash(model):
        raise StateError(
            f"{path} is the state of another model: use the one it was made with, with the same "
            f"far_decay and far_cap"
        )
    positions = arrays.get(".position", np.zeros(1))
    keys = arrays.get(".units[0].keys")  # of full attention: as long as the state's capacity
    room = None if keys is None else keys.shape[2]
    like = init_state(model.config, len(positions), header["state_dtype"], room=room)
    leaves, tree = jax.tree.flatten_with_path(like)
    names = [jax.tree_util.keystr(key) for key, _ in leaves]
    if sorted(names) != sorted(arrays):
        raise damaged
    restored = [
        jnp.asarray(arrays[name].view(leaf.dtype))
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, restored)


def _read(path: Path) -> tuple[bytes, dict[str, str]]:
    """The bytes of a file and its metadata, which is empty if it is no state.

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
            return b"", {}
        start += (text := file.read(size))
        try:
            header = json.loads(text)
            metadata = header.pop("__metadata__")
            end = max(array["data_offsets"][1] for array in header.values())
            if metadata["format"] != FORMAT or end != os.fstat(file.fileno()).st_size - len(start):
                return b"", {}
            return start + file.read(end), metadata
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return b"", {}


def _require_fit(state: State, model: Model) -> None:
    """Raise `StateError` unless the state has the structure and shapes of the model's states."""
    other = StateError("the state is of another model: save it with the one that made it")
    like = init_state(model.config, state.position.shape[0], _dtype(state), room=state.capacity)

    def described(tree: State) -> list:
        leaves = jax.tree.leaves_with_path(tree)
        return [(jax.tree_util.keystr(key), x.shape, x.dtype) for key, x in leaves]

    if described(state) != described(like):
        raise other


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
