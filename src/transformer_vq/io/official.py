"""Weights of the reference implementation (research code of arXiv 2309.16354) as our `Model`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.config import ModelConfig
from transformer_vq.errors import UserError
from transformer_vq.nn.layers import is_spec
from transformer_vq.nn.model import Model, model_specs

# Its configuration field: ours. Fields that concern training only are not listed.
FIELDS = {
    "n_vocab": "vocab_size",
    "d_model": "d_model",
    "d_k": "d_k",
    "d_v": "d_v",
    "n_head": "num_heads",
    "n_code": "codebook_size",
    "n_layer": "num_layers",
    "block_len": "block_len",
    "mem_len": "window_len",
    "agg_cache": "use_cache",
    "grad_thru_cache": "grad_through_cache",
    "pe_abs": "absolute_positions",
    "pe_lam": "max_wavelength",
    "e_tie": "tie_embeddings",
    "e_preln": "final_norm",
    "e_scale": "logit_scale",
    "c_beta": "commit_coefficient",
    "c_gamma": "codebook_decay",
    "p_dropemb": "dropout_embedding",
    "p_dropsin": "dropout_sinusoid",
    "p_dropres": "dropout_residual",
    "p_droplyr": "dropout_layer",
    "dtype": "compute_dtype",
    "param_dtype": "param_dtype",
}
REQUIRED = (
    "n_vocab",
    "d_model",
    "d_k",
    "d_v",
    "n_head",
    "n_code",
    "n_layer",
    "block_len",
    "mem_len",
)


def official_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our configuration for one of the reference implementation.

    Raises `ValueError` for a missing field, or for MLPs, which its gated models do not have.
    """
    for name in REQUIRED:
        if name not in config:
            raise UserError(f"the configuration has no field {name!r}")
    if config.get("d_ff"):
        raise UserError(f"d_ff is {config['d_ff']}: gated models with MLPs are not supported")
    fields = {ours: config[theirs] for theirs, ours in FIELDS.items() if theirs in config}
    for name in ("use_cache", "grad_through_cache", "absolute_positions"):
        if name in fields:
            fields[name] = bool(fields[name])
    for name in ("tie_embeddings", "final_norm"):
        if name in fields:
            fields[name] = bool(fields[name])
    double = str(fields.get("compute_dtype")) == "float64"
    return ModelConfig(**fields, head_type="shga", state_dtype="float64" if double else "float32")


def from_official(params: Mapping[str, Any], config: Mapping[str, Any]) -> Model:
    """Our model with the parameters of the reference implementation.

    Args:
      params: path to array, as `transformer_layers_0/scanned_attn1/q_proj/kernel`.
      config: its configuration, field to value. Training fields are not used.

    Raises:
      ValueError: for a parameter that is missing or has another shape than the configuration says.

    Made of array operations only, so that gradients pass through it to `params`.
    """
    ours = official_config(config)
    used = set()

    def take(path: str) -> jax.Array:
        if path not in params:
            raise UserError(f"the parameters have no {path!r}")
        used.add(path)
        return jnp.asarray(params[path])

    heads, d_k, d_v = ours.num_heads, ours.d_k, ours.d_v

    def unit(prefix: str) -> tuple[dict, dict]:
        kvg = take(f"{prefix}/kvg_proj/kernel")
        sizes = [heads * d_k, heads * (d_k + d_v)]
        w_k, w_v, w_g = jnp.split(kvg, sizes, axis=1)
        arrays = {
            "norm": {
                "gain": take(f"{prefix}/input_ln/g"),
                "bias": take(f"{prefix}/input_ln/b"),
            },
            "w_q": take(f"{prefix}/q_proj/kernel"),
            "w_k": w_k,
            "w_v": w_v,
            "w_g": w_g,
            "w_r": take(f"{prefix}/r_proj/kernel"),
            "u": take(f"{prefix}/u"),
            "w": take(f"{prefix}/v"),
            "w_o": take(f"{prefix}/res_proj/kernel"),
        }
        codebook = {
            "sum": take(f"{prefix}/quantizer/c_sum"),
            "count": take(f"{prefix}/quantizer/c_count"),
        }
        return arrays, codebook

    units = [
        unit(f"transformer_layers_{layer}/scanned_attn{half}")
        for layer in range(ours.num_layers)
        for half in (1, 2)
    ]
    unit_params, codebook = jax.tree.map(lambda *arrays: jnp.stack(arrays), *units)
    tree = {"embedding": take("token_embedder/embs"), "units": unit_params}
    if ours.tie_embeddings:
        tree["output_bias"] = take("token_embedder/bias_out")
    else:
        tree["w_out"] = take("out_proj/kernel")
        tree["output_bias"] = take("out_proj/bias")
    if ours.final_norm:
        tree["final_norm"] = {"gain": take("out_ln/g"), "bias": take("out_ln/b")}
    if ours.absolute_positions:
        tree["position_scale"] = take("position_embedder/scale")
    unused = sorted(set(params) - used - {"token_embedder/bias_out"})
    if unused:
        raise UserError(f"the configuration has no place for the parameter {unused[0]!r}")

    specs = jax.tree.flatten_with_path(model_specs(ours), is_leaf=is_spec)[0]
    arrays = jax.tree.leaves((tree, codebook))
    for (path, spec), array in zip(specs, arrays, strict=True):
        if array.shape != spec.shape:
            raise UserError(
                f"{jax.tree_util.keystr(path)} has shape {array.shape}, and the configuration "
                f"says {spec.shape}"
            )
    return Model(params=tree, codebook=codebook, config=ours)


# Where its parameters have an axis of tokens.
_TOKEN_AXES = {
    "token_embedder/embs": 0,
    "token_embedder/bias_out": 0,
    "out_proj/kernel": 1,
    "out_proj/bias": 0,
}


def bytes_first(params: Mapping[str, np.ndarray], special: int) -> dict[str, np.ndarray]:
    """Its parameters with the first `special` tokens behind all others.

    Its vocabulary of bytes has three tokens before them (padding, end of text, unknown), so that
    byte b is token b + 3. Ours are the bytes themselves.
    """
    return {
        name: np.roll(array, -special, _TOKEN_AXES[name]) if name in _TOKEN_AXES else array
        for name, array in params.items()
    }
