"""One residual unit: attention between projections, and an MLP where the head type has one."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import attention, layers, vq
from transformer_vq.nn.attention import (
    QKV,
    AttentionWeights,
    FullAttentionState,
    UnitState,
)
from transformer_vq.nn.products import OutputMajor, computed_once, matmul
from transformer_vq.nn.timeline import Timeline
from transformer_vq.nn.vq import Places
from transformer_vq.types import Features, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """What training needs of a forward pass besides the features: sums over weighted tokens."""

    commitment: jax.Array  # []: of |k - C_z|^2, over units and heads too
    codebook: Params  # {"sum": [N, G, S, K], "count": [N, G, S]}: of keys, by code
    keys: jax.Array | None = None  # [N, G, S, K]: those at the places that were asked for


def prepare_unit(
    params: Params, codebook: Params, wave: jax.Array, config: ModelConfig, *, fuse: bool = True
) -> Params:
    """The constants of one unit, in the compute dtype: projections side by side, one product for
    all of q, k, v (and g), or apart unless `fuse`; the position table r; the codewords.

    `wave` `[distances, D]`: the sinusoid of each distance.
    """
    dtype = jnp.dtype(config.compute_dtype)
    names = ["w_q", "w_k", "w_v"] + ["w_g"] * (config.head_type == "shga")
    projections = {name: params[name].astype(dtype) for name in names}
    if fuse:
        projections = {"w_in": jnp.concatenate(list(projections.values()), axis=1)}
    scale = config.d_k**-0.25
    heads_k = (config.num_heads, config.d_k)
    r = (wave.astype(dtype) @ params["w_r"].astype(dtype)).reshape(-1, *heads_k)
    prepared = {
        "norm": params["norm"],
        **projections,
        "w_o": params["w_o"].astype(dtype),
        "u": params["u"].astype(dtype).reshape(heads_k) * scale,
        "w": params["w"].astype(dtype).reshape(heads_k) * scale,
        "r": r * scale,
        "words": vq.codewords(codebook),
    }
    if config.head_type != "shga":
        mlp = params["mlp"]
        weights = {name: mlp[name].astype(dtype) for name in ("w_in", "w_out")}
        prepared["mlp"] = {"norm": mlp["norm"], **weights}
    return prepared


def for_few_rows(unit: Params) -> Params:
    """A prepared unit with its matrices as products with few rows want them, which decoding depends
    on; a product with many rows, and its gradient, wants them as they were."""

    def turned(params: Params, *names: str) -> Params:
        return params | {name: OutputMajor(params[name].T) for name in names}

    if "mlp" in unit:
        unit = unit | {"mlp": turned(unit["mlp"], "w_in", "w_out")}
    return turned(unit, "w_in", "w_o")


def no_drop(added: jax.Array, branch: int) -> jax.Array:
    """No dropout: what evaluation and sampling use."""
    return added


def apply_unit(
    unit: Params,
    x: Features,
    state: UnitState,
    timeline: Timeline,
    config: ModelConfig,
    weights: jax.Array | None = None,
    places: Places | None = None,
    drop: Callable[[jax.Array, int], jax.Array] = no_drop,
) -> tuple[Features, UnitState, Statistics | None]:
    """One residual unit. `drop` is the dropout of what branch 0 (attention), 1 (MLP) adds to x."""
    batch, length, _ = x.shape
    heads, groups, d_k, d_v = config.num_heads, config.num_kv_heads, config.d_k, config.d_v
    dtype = x.dtype
    gated = config.head_type == "shga"
    q, k, v, gate = _project_in(unit, layers.norm(unit["norm"], x), config)
    q = q.reshape(batch, length, heads, d_k)
    q = (layers.rms_norm(q) * d_k**-0.25).astype(dtype)
    k = k.reshape(batch, length, groups, d_k)
    k = layers.rms_norm(k) * d_k**-0.25  # stays wide until its code is known
    v = v.reshape(batch, length, groups, d_v)

    constants = AttentionWeights(**{name: unit[name] for name in ("words", "u", "w", "r")})

    statistics = None
    if isinstance(state, FullAttentionState):
        # Training counts every token: a call that fills the state began with an empty one.
        from_empty = weights is not None and length >= state.capacity
        attended = attention.attend_full(
            QKV(q, k.astype(dtype), v), constants, state, timeline, config, from_empty=from_empty
        )
    else:
        one = length == 1 and weights is None  # training takes tokens in blocks, always
        attend = attention.attend_step if one else attention.attend_blocks
        attended = attend(QKV(q, k, v), constants, state, timeline, config)
        codes = attended.codes
        if weights is not None and codes is not None:
            statistics = Statistics(
                commitment=vq.commitment(k, vq.look_up(unit["words"], codes), weights),
                codebook=vq.code_statistics(k, codes, weights, config.codebook_size),
                keys=None if places is None else vq.keys_at(k, places),
            )
    out = attended.out.reshape(batch, length, -1)
    if gate is not None:
        out = out * gate
    x = x + drop(matmul(out, unit["w_o"]), 0)
    if not gated:
        x = x + drop(layers.mlp(unit["mlp"], x), 1)
    return x, attended.state, statistics


def _project_in(
    unit: Params, x: Features, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Queries, keys, values `[B, T, columns]` and, in gated heads, the gate (else None)."""
    heads, groups, d_k, d_v = config.num_heads, config.num_kv_heads, config.d_k, config.d_v
    gated = config.head_type == "shga"
    if "w_q" in unit:
        q, k, v = (x @ unit[name] for name in ("w_q", "w_k", "w_v"))
        return (q, k, jax.nn.silu(v), jax.nn.silu(x @ unit["w_g"])) if gated else (q, k, v, None)
    x = matmul(x, unit["w_in"])
    ends = (heads * d_k, (heads + groups) * d_k, (heads + groups) * d_k + groups * d_v)
    q, k, v, *gate = jnp.split(x, ends[: 2 + gated], axis=-1)
    if not gated:
        return q, k, v, None
    return q, k, computed_once(jax.nn.silu(v)), jax.nn.silu(gate[0])
