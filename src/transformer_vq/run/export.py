"""From a run to a folder that stands by itself (`io/export.py`), whole or not at all."""

import dataclasses
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from transformer_vq.atomic import whole_folder
from transformer_vq.data import ByteTokenizer, Tokenizer, run_tokenizer
from transformer_vq.errors import cut
from transformer_vq.io.export import (
    CONFIG_FILE,
    FILES,
    MODEL_FILE,
    ExportError,
    cast_model,
    is_export,
    save_model,
    write_config,
)
from transformer_vq.io.hub import local_folder
from transformer_vq.nn.model import Model
from transformer_vq.nn.products import Weights
from transformer_vq.run.folder import RunInfo, find_step, load_run, read_environment
from transformer_vq.run.log import Record, read_metrics, to_json
from transformer_vq.run.weights import Cost, load_cost, save_cost

_OURS = {*FILES, "report.html"}  # that of `tvq report`


@dataclass(frozen=True, eq=False)
class Carried:
    """A model with all that goes with it."""

    model: Model
    info: RunInfo
    tokenizer: Tokenizer = ByteTokenizer()
    records: list[Record] = field(default_factory=list)  # what its training measured
    environment: dict[str, Any] = field(default_factory=dict)  # versions and devices of it
    costs: dict[Weights, Cost] = field(default_factory=dict)  # of rounding its weights

    @property
    def is_finite(self) -> bool:
        """Whether all numbers of the model are: those of a run that diverged are not."""
        leaves = jax.tree.leaves((self.model.params, self.model.codebook))
        return all(np.isfinite(jax.device_get(x)).all() for x in leaves)


def gather(run: str | os.PathLike, checkpoint: str = "latest", dtype: str | None = None) -> Carried:
    """A trained model with all that goes with it; in another `dtype`, if one is given.

    `run`, `checkpoint`: as of `transformer_vq.load`. Raises a `UserError` as that does.
    """
    folder = local_folder(run)
    model, info = load_run(folder, find_step(folder, checkpoint))
    costs = {weights: load_cost(folder, info, weights) for weights in get_args(Weights)}
    if dtype and dtype != info.config.param_dtype:
        costs.clear()  # they were of other weights
        model = cast_model(model, dtype)
    return Carried(
        model,
        dataclasses.replace(info, config=model.config),
        run_tokenizer(folder, info.tokenizer),
        [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] <= info.step],
        read_environment(folder),
        {weights: cost for weights, cost in costs.items() if cost},
    )


def write(carried: Carried, out: str | os.PathLike, card: str, *, overwrite: bool = False) -> int:
    """Write the folder of an exported model, and return how many bytes its arrays take.

    `card`: the text of README.md. Raises `ExportError` if `out` holds anything, unless it is an
    exported model and may be overwritten, and if it cannot be written, say for a full disk; what
    was there then stays.
    """
    out = Path(out)
    require_free(out, overwrite=overwrite)
    info = carried.info.to_dict()
    del info["config"]
    content = {"training": info.pop("train"), **info, "environment": carried.environment}
    lines = "".join(to_json(record) + "\n" for record in carried.records)
    try:
        with whole_folder(out, replace=overwrite and os.path.exists(out)) as folder:
            size = save_model(folder, carried.model)
            write_config(folder, carried.model.config, content)
            carried.tokenizer.save(folder)
            if lines:
                (folder / "metrics.jsonl").write_text(lines, "utf-8")
            for weights, cost in carried.costs.items():
                save_cost(folder, weights, cost)
            (folder / "README.md").write_text(card, "utf-8")
            return size
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = ": free some space" if full else ""
        raise ExportError(
            f"cannot write {cut(str(out), 300)}: {error.strerror or error}{advice}"
        ) from None


def require_free(out: Path, *, overwrite: bool = False) -> None:
    """Raise `ExportError` unless a model may be exported to this folder."""
    name = cut(str(out), 300)
    try:
        names = set(os.listdir(out))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ExportError(f"cannot export to {name}: {error.strerror}") from None
    if not names:
        return
    if not is_export(out) or not {CONFIG_FILE, MODEL_FILE} <= names:
        raise ExportError(f"{name} is not empty, and holds no exported model: give a new folder")
    if others := sorted(names - _OURS):
        raise ExportError(
            f"{name} holds {cut(others[0])} beside an exported model: give a new folder, or move "
            f"that away"
        )
    if not overwrite:
        raise ExportError(
            f"{name} already holds an exported model: give a new folder, or --overwrite it"
        )
