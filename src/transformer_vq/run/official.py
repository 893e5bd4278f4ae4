"""Weights of the reference implementation, with all that a model of ours has to go with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transformer_vq.config import TrainConfig
from transformer_vq.data import ByteTokenizer, Tokenizer
from transformer_vq.errors import UserError, shown
from transformer_vq.io.export import require_dtype
from transformer_vq.io.official import FIELDS, bytes_first, from_official
from transformer_vq.io.official_files import FLOATS, read_weights
from transformer_vq.run.export import Carried
from transformer_vq.run.folder import DataSource, RunInfo

# Its field of training: ours. What we have no word for is left out.
TRAINING = {
    "global_batch_size": "batch_size",
    "sequence_len": "sequence_len",
    "update_len": "update_len",
    "n_max_step": "steps",
    "n_warmup_step": "warmup_steps",
    "optimizer": "optimizer",
    "lr_max": "learning_rate",
    "lr_schedule": "schedule",
    "wd_lam": "weight_decay",
    "grad_clip": "grad_clip",
}
_SCHEDULES = {"inv_sqrt": "inverse-sqrt"}
_SWITCHES = ("agg_cache", "grad_thru_cache", "pe_abs", "e_tie", "e_preln")
_BYTES = 256
_SPECIAL = 3  # tokens before those of bytes in its vocabulary of bytes
_PG19_BOOKS = 28_602  # each ends with the token that ends a text


def import_official(
    path: Path, fields: Mapping[str, Any], tokenizer: Tokenizer | None = None
) -> Carried:
    """The model in a file of weights (`read_weights`) with these fields of its configuration.

    Fields that are beside the weights count where they are not given; `n_vocab` may be left out.
    Without a `tokenizer` the tokens are bytes, of which 0 to 255 are the first tokens of the model
    that this gives, whatever their order in the file.

    Raises a `UserError` for weights or fields that do not fit each other or this program.
    """
    weights = read_weights(path)
    given = {**weights.fields, **fields}
    params = weights.params
    embedding = params.get("token_embedder/embs")
    if "n_vocab" not in given and embedding is not None and embedding.ndim == 2:
        given["n_vocab"] = embedding.shape[0]
    _check(given)
    if tokenizer is None:
        tokenizer, size = ByteTokenizer(), int(given.get("n_vocab", 0))
        if size == _BYTES + _SPECIAL:
            params = bytes_first(params, _SPECIAL)
        elif size > _BYTES:
            raise UserError(
                f"the model has {size:,} tokens, which are no bytes: give its vocabulary"
            )
    elif tokenizer.vocab_size > given.get("n_vocab", 0):
        raise UserError(
            f"the vocabulary {tokenizer.name} has {tokenizer.vocab_size:,} tokens, and the model "
            f"{given.get('n_vocab', 0):,}: give the one that it was trained with"
        )
    _check_dtype(params, given)
    model = from_official(params, given)
    dataset = str(given.get("dataset", "")) or "unknown data"
    documents = _PG19_BOOKS if dataset == "pg19" else 1
    data = DataSource(dataset, 0, "", documents=documents)
    info = RunInfo(model.config, _training(given), data, tokenizer.name, weights.step)
    return Carried(model, info, tokenizer)


def _check(fields: Mapping[str, Any]) -> None:
    """Raise `UserError` for a value that stands for another one, or for neither 0 nor 1."""
    for name in (*FIELDS, *TRAINING):
        value = fields.get(name)
        if isinstance(value, str) and "$" in value:
            raise UserError(f"{name} is {shown(value)}, a variable of a script: give its value")
        if name in _SWITCHES and value not in (None, 0, 1):
            raise UserError(f"{name} is {shown(value)}: it must be 0 or 1")


def _check_dtype(params: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> None:
    """Raise `UserError` for arrays that are not of `param_dtype`, or that JAX would change."""
    said = str(fields.get("param_dtype", "float32"))
    if said in FLOATS:
        require_dtype(said, "the model")
    for name, array in params.items():
        if array.dtype.name != said:
            raise UserError(
                f"{name} is of {array.dtype.name} and param_dtype is {said}: give the one it was "
                f"trained with"
            )


def _training(fields: Mapping[str, Any]) -> TrainConfig:
    """How it was trained, as far as we have words for it."""
    known = {ours: fields[theirs] for theirs, ours in TRAINING.items() if theirs in fields}
    if "schedule" in known:
        known["schedule"] = _SCHEDULES.get(known["schedule"], known["schedule"])
    return TrainConfig(**known)
