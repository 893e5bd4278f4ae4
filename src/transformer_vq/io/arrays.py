"""Arrays of a checkpoint as numpy, read as orbax stores them: by tensorstore alone."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorstore


def read(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of these names, all at once."""
    context = tensorstore.Context()  # the files are opened once

    def opened(name: str) -> tensorstore.Future:
        folder = {"driver": "file", "path": f"{path}/"}
        files = {"driver": "ocdbt", "base": folder, "path": name + "/"}
        # What is not there is an error: else tensorstore takes a part that it does not find, of a
        # checkpoint that is deleted meanwhile, for zeros.
        spec = {"driver": "zarr", "kvstore": files, "fill_missing_data_reads": False}
        return tensorstore.open(spec, open=True, read=True, context=context)

    opening = {name: opened(name) for name in names}
    reading = {name: future.result().read() for name, future in opening.items()}
    return {name: np.asarray(future.result()) for name, future in reading.items()}
