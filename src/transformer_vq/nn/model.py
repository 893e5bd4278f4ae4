"""The model: its arrays and its state."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.config import DEFAULT_CAPACITY, DType, ModelConfig
from transformer_vq.errors import UserError, require_kind, shown
from transformer_vq.fields import require_count
from transformer_vq.nn import attention, layers, vq
from transformer_vq.nn.attention import AttentionState, FullAttentionState
from transformer_vq.nn.forget import forget_start
from transformer_vq.nn.layers import ArraySpec
from transformer_vq.nn.products import Weights
from transformer_vq.types import Params


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "codebook"],
    meta_fields=["config", "weights"],
)
@dataclass(frozen=True, eq=False)
class Model:
    """A model: `params` are trained by gradient, `codebook` by moving average.

    Arrays of the residual units are stacked along a leading axis N.
    """

    params: Params
    codebook: Params  # {"sum": [N, G, S, K], "count": [N, G, S]}
    config: ModelConfig
    weights: Weights = "as-saved"  # how its matrices are rounded, and kept for decoding


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class State:
    """All that a model remembers of B sequences. Rows are independent of each other.

    Structure, shapes and dtypes never change, whatever was consumed.
    """

    position: jax.Array  # int32 [B]: tokens consumed
    document_start: jax.Array  # int32 [B]: position of the first token of the current document
    document_id: jax.Array  # int32 [B]: id of the current document
    logits: jax.Array  # float32 [B, vocab_size]: prediction of the next token; zeros at first
    units: tuple[AttentionState | FullAttentionState, ...]  # N of them

    @property
    def capacity(self) -> int | None:
        """How many tokens the state can hold; None: there is no limit."""
        unit = self.units[0]
        return unit.capacity if isinstance(unit, FullAttentionState) else None


def score_gain_start(config: ModelConfig) -> float:
    """Where learned factors on scores begin: a key that matches a query gets a score of
    `sqrt(128)`, whatever the width of keys, as it does by itself with the paper's `d_k` of 128."""
    return (128 / config.d_k) ** 0.5


def model_specs(config: ModelConfig) -> tuple[Params, Params]:
    """Declarations of all arrays of a model: `(params, codebook)`, as trees of `ArraySpec`."""
    d, n = config.d_model, config.num_units
    heads, groups = config.num_heads, config.num_kv_heads
    k, v = config.d_k, config.d_v

    def weight(rows: int, columns: int, axes=("embed", "heads")) -> ArraySpec:
        return ArraySpec((n, rows, columns), ("unit", *axes), scale=rows**-0.5)

    def adds(spec: ArraySpec) -> ArraySpec:  # to the residual stream
        return dataclasses.replace(spec, init="zeros") if config.zero_outputs else spec

    gated = config.head_type == "shga"  # its values and gates are what an MLP's hidden units are
    out, value = ("hidden", "hidden") if gated else ("heads", "kv_heads")
    units = {
        "norm": layers.norm_specs((n,), d),
        "w_q": weight(d, heads * k),
        "w_k": weight(d, groups * k, ("embed", "kv_heads")),
        "w_v": weight(d, groups * v, ("embed", value)),
        "w_r": weight(d, heads * k),
        "u": ArraySpec((n, heads * k), ("unit", "heads"), "zeros"),
        "w": ArraySpec((n, heads * k), ("unit", "heads"), "zeros"),
        "w_o": adds(weight(heads * v, d, (out, "embed"))),
    }
    if config.forget != "none":
        units["b_forget"] = ArraySpec((n, groups), ("unit", "kv_heads"), forget_start(config))
    if config.forget == "gated":
        axes = ("unit", "embed", "kv_heads")
        units["w_forget"] = ArraySpec((n, d, groups), axes, "zeros", gate=True)
    if config.key_shift:
        units["key_shift"] = ArraySpec((n, groups * k), ("unit", "kv_heads"), "zeros")
    if config.score_gain:
        start = np.full((n, heads), score_gain_start(config))
        units["score_gain"] = ArraySpec((n, heads), ("unit", "heads"), start)
    if config.sink:
        units["sink"] = ArraySpec((n, heads), ("unit", "heads"), "zeros")
    if config.embedding_shortcut:
        shares = np.tile([1.0, 0.0], (n, 1))
        units["shortcut"] = ArraySpec((n, 2), ("unit", None), shares)
    if gated:
        units["w_g"] = weight(d, heads * v, ("embed", "hidden"))
    else:
        units["mlp"] = layers.mlp_specs((n,), d, config.d_mlp)
        units["mlp"]["w_out"] = adds(units["mlp"]["w_out"])
    params: Params = {
        "embedding": ArraySpec((config.vocab_size, d), ("vocab", "embed")),
        "units": units,
        "output_bias": ArraySpec((config.vocab_size,), ("vocab",), "zeros"),
    }
    if config.absolute_positions:
        params["position_scale"] = ArraySpec((), (), "zeros")
    if config.final_norm:
        params["final_norm"] = layers.norm_specs((), d)
    if not config.tie_embeddings:
        shape = (d, config.vocab_size)
        params["w_out"] = ArraySpec(shape, ("embed", "vocab"), scale=d**-0.5)
    return params, vq.codebook_specs(n, groups, config.codebook_size, k)


def init_model(config: ModelConfig, key: Any) -> Model:
    """A model with random parameters.

    `key`: a JAX key (typed or raw), numpy data of one, or a whole number.
    """
    require_kind("config", config, ModelConfig)
    params, codebook = model_specs(config)
    params_key, codebook_key = jax.random.split(layers.as_key(key))
    return Model(
        params=layers.init_arrays(params, params_key, config.param_dtype),
        codebook=layers.init_arrays(codebook, codebook_key, config.param_dtype),
        config=config,
    )


def _state_dtype(dtype: Any) -> Any:
    try:
        named = jnp.dtype(dtype)
    except (TypeError, ValueError):
        named = None
    if named is None or named.name not in get_args(DType):
        raise UserError(f"dtype is {shown(dtype)}: it must be one of {', '.join(get_args(DType))}")
    return named


def init_state(
    config: ModelConfig,
    batch_size: int,
    dtype: Any = None,
    *,
    capacity: int | None = None,
    room: int | None = None,
) -> State:
    """The state of `batch_size` sequences of which nothing was consumed.

    `dtype` overrides `config.state_dtype`. `room` is how many tokens the state must be able to
    take: with `attention = "full"` this is the capacity of its key/value cache (4096 by default); a
    vq state takes any number. `capacity` is the same, but refused for vq.

    Raises:
      UserError: for sizes below 1, a dtype that no state has, a `capacity` of a vq state, or both
        `capacity` and `room`.
    """
    require_kind("config", config, ModelConfig)
    require_count("batch_size", batch_size)
    if capacity is not None and room is not None:
        raise UserError(f"capacity is {capacity} and room is {room}: give one of them")
    if room is not None:
        require_count("room", room)
    dtype = config.state_dtype if dtype is None else _state_dtype(dtype)
    if config.attention == "full":
        if capacity is None:
            capacity = DEFAULT_CAPACITY if room is None else room
        require_count("capacity", capacity)
        make = functools.partial(attention.init_full_state, config, batch_size, capacity, dtype)
    elif capacity is not None:
        raise UserError('capacity is for attention = "full": a vq state has no limit')
    else:
        make = functools.partial(attention.init_attention_state, config, batch_size, dtype)
    return State(
        position=jnp.zeros(batch_size, jnp.int32),
        document_start=jnp.zeros(batch_size, jnp.int32),
        document_id=jnp.zeros(batch_size, jnp.int32),
        logits=jnp.zeros((batch_size, config.vocab_size), layers.wide_dtype(config.compute_dtype)),
        units=tuple(make() for _ in range(config.num_units)),
    )
