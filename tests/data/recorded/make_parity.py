"""What the tests read of the recorded numbers of the reference implementation, as small files.

    python tests/data/recorded/make_parity.py FOLDER    # of recordings, `.npz`: see README.md

A file is safetensors in gzip. Texts are arrays of UTF-8 bytes, whole numbers are int8, and of a
nucleus stands only which tokens were kept.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

CASE = ("config_json", "inputs", "targets", "loss_mask", "logprobs", "loss", "l_lm", "l_commit")
METRICS = ("loss_lm_per_token_unscaled", "loss_commit_per_token")


def wanted(name: str, key: str) -> bool:
    """Whether a test reads this array of this recording."""
    if name == "nucleus":
        return True
    if name == "f32_train_op":
        texts = ("config_json", "optimizer_json")
        return key in texts or key.startswith(("params_", "batch_")) or key.endswith(METRICS)
    return key in CASE or key.startswith(("params/", "grads/"))


def small(key: str, array: np.ndarray) -> np.ndarray:
    """The array in the fewest bytes that keep what it says."""
    if array.dtype.kind == "U":
        return np.frombuffer(str(array).encode(), np.uint8)
    if key.startswith("nucleus_"):
        return array > -1e9  # others are -1e10
    if array.dtype.kind == "i":
        assert np.abs(array).max() < 128, key
        return array.astype(np.int8)
    return np.asarray(array, order="C")


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.npz")):
        recorded = np.load(path)
        keys = [key for key in recorded if wanted(path.stem, key)]
        content = save({key: small(key, recorded[key]) for key in keys})
        out = Path(__file__).with_name(f"{path.stem}.safetensors.gz")
        out.write_bytes(gzip.compress(content, 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
