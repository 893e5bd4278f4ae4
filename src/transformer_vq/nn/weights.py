"""Weights in few bits, for decoding where reading them is the cost.

A model with rounded weights is a model like any other: prompts, scores and states are its own. Only
its decoder keeps the large matrices in as many bits as they need.
"""

import functools
from dataclasses import replace
from typing import get_args

import jax

from transformer_vq.errors import UserError, require_kind, shown
from transformer_vq.nn.model import Model
from transformer_vq.nn.products import Weights, narrow, wide_dtype, widened
from transformer_vq.types import Params

UNIT_MATRICES = ("w_q", "w_k", "w_v", "w_g", "w_o")  # of units, `[in, out]`; those of an MLP too


def round_weights(model: Model, weights: Weights | str) -> Model:
    """The model with the matrices that decoding reads rounded to bfloat16, or to int8 with one
    scale for each output column, as float32 or more. Its decoder is small.

    What the rounding costs is the difference of two evaluations. States are of one of the models:
    a saved state is refused by the other. "as-saved" gives the model back.

    Raises `UserError` for other names, and for a model that is rounded already.
    """
    require_kind("model", model, Model, "from init_model or of a run (load)")
    names = get_args(Weights)
    if not isinstance(weights, str) or weights not in names:
        raise UserError(f"weights is {shown(weights)}: it must be one of {', '.join(names)}")
    if weights == "as-saved":
        return model
    if model.weights != "as-saved":
        raise UserError(
            f"the weights of the model are rounded to {model.weights} already: round those of the "
            f"model as it was saved"
        )
    params = _rounded(model.params, weights=weights, tied=model.config.tie_embeddings)
    return replace(model, params=params, weights=weights)


@functools.partial(jax.jit, static_argnames=("weights", "tied"))
def _rounded(params: Params, *, weights: Weights, tied: bool) -> Params:
    """The parameters of a model with the matrices rounded that `prepare` keeps narrow."""

    def rounded(matrix: jax.Array) -> jax.Array:
        few, dtype = narrow(matrix, weights), wide_dtype(matrix.dtype)
        wide = widened(few.numbers).astype(dtype)
        if few.scale is not None:
            wide = wide * few.scale[..., None, :].astype(dtype)
        return wide

    units: Params = {
        name: rounded(array) if name in UNIT_MATRICES else array
        for name, array in params["units"].items()
    }
    if "mlp" in units:
        mlp = units["mlp"]
        units["mlp"] = {**mlp, "w_in": rounded(mlp["w_in"]), "w_out": rounded(mlp["w_out"])}
    params = {**params, "units": units}
    if tied:  # its rows are the columns of the product that makes logits
        params["embedding"] = rounded(params["embedding"].T).T
    else:
        params["w_out"] = rounded(params["w_out"])
    return params
