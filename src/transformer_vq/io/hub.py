"""Models on the Hugging Face Hub: `hf:OWNER/NAME`, or `hf:OWNER/NAME@REVISION`.

They are exported models (`io/export.py`), fetched by the library `huggingface_hub` into its cache;
of a repository nothing else is fetched than the files of one.
"""

import os
import re
from pathlib import Path

from transformer_vq.errors import UserError, as_path, cut, plain, shown, to_install
from transformer_vq.io.export import FILES

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


class HubError(UserError):
    """A model cannot be had from the Hub; one sentence says why and what to do."""


def is_remote(run: str | os.PathLike) -> bool:
    """Whether this names a model on the Hub, and no folder."""
    return isinstance(run, str | os.PathLike) and str(run).startswith(PREFIX)


def local_folder(run: str | os.PathLike, name: str = "folder") -> Path:
    """The folder of a run or an exported model; one on the Hub is fetched first.

    `HF_HOME` says where it is kept and `HF_HUB_OFFLINE=1` that only what is kept there counts, as
    with everything that uses `huggingface_hub`. `name`: of the argument, in errors.

    Raises `HubError` for a name that cannot be one, without the library, and if the Hub does not
    give it.
    """
    if not is_remote(run):
        return as_path(name, run)
    found = _NAME.fullmatch(str(run))
    if found is None:
        raise HubError(
            f"the model is {shown(str(run))}: it must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise HubError(
            f"{cut(str(run), 300)} needs huggingface_hub, which is not installed: "
            f"{to_install('hub')}"
        ) from None
    owner_and_name, revision = found.groups()
    try:
        return Path(snapshot_download(owner_and_name, revision=revision, allow_patterns=[*FILES]))
    except Exception as error:  # of many kinds, and of several libraries
        reason = cut(plain(" ".join(str(error).split())) or type(error).__name__, 400)
        raise HubError(f"cannot get {run}: {reason}") from None
