"""Where the command line keeps what takes time to make: compiled programs, tokens of data."""

import os
import sys
import warnings
from pathlib import Path

_JAX_FOLDER = "JAX_COMPILATION_CACHE_DIR"


def cache_folder(kind: str) -> Path | None:
    """The folder for `jax` or `data`; None: nowhere, by wish (`TVQ_CACHE` empty) or without a home.

    Compiled programs lie in the folder that `TVQ_CACHE` names, data in its subfolder.
    """
    given = os.environ.get("TVQ_CACHE")
    if given is not None:
        return (Path(given) / ("" if kind == "jax" else kind)) if given else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (
            (Path(base) if os.path.isabs(base) else Path.home() / ".cache")
            / "transformer-vq"
            / kind
        )
    except RuntimeError:  # the user has no home folder
        return None


def compilation_cache() -> Path | None:
    """The folder of the user's for compiled programs; None: nowhere, by wish, or because it cannot
    be written to."""
    folder = cache_folder("jax")
    if folder is None or os.environ.get(_JAX_FOLDER, str(folder)) != str(folder):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def use_compilation_cache() -> None:
    """Let JAX keep compiled programs in that folder."""
    folder = compilation_cache()
    if folder is None:
        return
    # An entry that cannot be written, or is damaged, costs time and nothing else.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        # Small ones too: a start has dozens, and to compile them takes longer than to read them.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    if "jax" in sys.modules:
        import jax

        for name, value in settings.items():
            jax.config.update(name, value)
    else:  # JAX reads these when it is imported
        os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    from transformer_vq.engine.kept import keep_entries_whole

    keep_entries_whole()
