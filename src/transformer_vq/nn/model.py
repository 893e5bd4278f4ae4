"""The model: its arrays, its state, and the forward pass over many tokens."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.errors import UserError
from transformer_vq.nn import attention, layers, pieces, products, vq
from transformer_vq.nn.attention import AttentionState, FullAttentionState
from transformer_vq.nn.layers import ArraySpec
from transformer_vq.nn.pieces import Piece
from transformer_vq.nn.timeline import Timeline, make_timeline
from transformer_vq.nn.unit import Statistics, apply_unit, prepare_unit
from transformer_vq.nn.vq import Places
from transformer_vq.sharding import cuts_columns, keep_rows, whole_columns
from transformer_vq.types import Features, Key, Params, PerRow, Tokens

DEFAULT_CAPACITY = 4096  # tokens that a state of full attention holds, unless told otherwise


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "codebook"], meta_fields=["config"]
)
@dataclass(frozen=True, eq=False)
class Model:
    """A model: `params` are trained by gradient, `codebook` by moving average.

    Arrays of the residual units are stacked along a leading axis N.
    """

    params: Params
    codebook: Params  # {"sum": [N, G, S, K], "count": [N, G, S]}
    config: ModelConfig


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DropoutKeys:
    """Randomness of one training call: masks that are drawn anew, and masks of a sequence.

    Every row draws for itself, but for sinusoids, whose mask is one for all: so the rows of a batch
    may go through the model in any parts.
    """

    call: Key
    sequence: Key  # the same in all calls that continue one sequence
    rows: jax.Array  # int32 [B]: which rows of the batch those of the call are


def model_specs(config: ModelConfig) -> tuple[Params, Params]:
    """Declarations of all arrays of a model: `(params, codebook)`, as trees of `ArraySpec`."""
    d, n = config.d_model, config.num_units
    heads, groups = config.num_heads, config.num_kv_heads
    k, v = config.d_k, config.d_v

    def weight(rows: int, columns: int, axes=("embed", "heads")) -> ArraySpec:
        return ArraySpec((n, rows, columns), ("unit", *axes), scale=rows**-0.5)

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
        "w_o": weight(heads * v, d, (out, "embed")),
    }
    if gated:
        units["w_g"] = weight(d, heads * v, ("embed", "hidden"))
    else:
        units["mlp"] = layers.mlp_specs((n,), d, config.d_mlp)
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
    params, codebook = model_specs(config)
    params_key, codebook_key = jax.random.split(layers.as_key(key))
    return Model(
        params=layers.init_arrays(params, params_key, config.param_dtype),
        codebook=layers.init_arrays(codebook, codebook_key, config.param_dtype),
        config=config,
    )


def init_state(
    config: ModelConfig, batch_size: int, dtype: Any = None, *, capacity: int | None = None
) -> State:
    """The state of `batch_size` sequences of which nothing was consumed.

    `dtype` overrides `config.state_dtype`. `capacity` is for `attention = "full"` only: how many
    tokens its key/value cache can hold (4096 by default). A vq state holds any number.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    dtype = dtype or config.state_dtype
    if config.attention == "full":
        capacity = DEFAULT_CAPACITY if capacity is None else capacity
        if capacity < 1:
            raise UserError(f"capacity is {capacity}: it must be at least 1")
        make = functools.partial(attention.init_full_state, config, batch_size, capacity, dtype)
    elif capacity is not None:
        raise UserError('capacity is for attention = "full": a vq state has no limit')
    else:
        make = functools.partial(attention.init_attention_state, config, batch_size, dtype)
    return State(
        position=jnp.zeros(batch_size, jnp.int32),
        document_start=jnp.zeros(batch_size, jnp.int32),
        document_id=jnp.zeros(batch_size, jnp.int32),
        logits=jnp.zeros((batch_size, config.vocab_size), logits_dtype(config)),
        units=tuple(make() for _ in range(config.num_units)),
    )


def logits_dtype(config: ModelConfig) -> Any:
    """float32, or float64 where the computation is."""
    return jnp.promote_types(config.compute_dtype, jnp.float32)


# From tokens to features to logits.


def distance_wave(config: ModelConfig, state: State) -> jax.Array:
    """Sinusoids of all distances that get a position bias, `[distances, D]`."""
    first = state.units[0]
    distances = first.capacity if isinstance(first, FullAttentionState) else config.ring_len
    return layers.sinusoid(
        jnp.arange(distances), config.d_model, config.max_wavelength, config.compute_dtype
    )


def embed(params: Params, tokens: Tokens, timeline: Timeline, config: ModelConfig) -> Features:
    """The input of the first unit. Positions count from the start of the document."""
    dtype = jnp.dtype(config.compute_dtype)
    x = whole_columns(params["embedding"])[tokens].astype(dtype)
    if config.absolute_positions:
        position = config.ring_len + jnp.arange(tokens.shape[1]) - timeline.first
        wave = layers.sinusoid(position, config.d_model, config.max_wavelength, dtype)
        x = x + (params["position_scale"] * wave).astype(dtype)
    return x


def to_logits(params: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits of features `[..., D]`: `[..., vocab_size]`, in wide precision."""
    dtype = logits_dtype(config)
    if config.final_norm:
        x = layers.norm(params["final_norm"], x)
    tied = config.tie_embeddings
    w_out = products.OutputMajor(params["embedding"]) if tied else params["w_out"]
    w_out = jax.tree.map(lambda a: a.astype(dtype), w_out)
    logits = products.matmul(x.astype(dtype), w_out) + params["output_bias"].astype(dtype)
    return logits * config.logit_scale


def forward(
    model: Model,
    state: State,
    tokens: Tokens,
    *,
    lengths: PerRow | None = None,
    document_ids: Tokens | None = None,
    weights: jax.Array | None = None,
    places: Places | None = None,
    dropout: DropoutKeys | None = None,
    remat: bool = False,
) -> tuple[Features, State, Statistics | None]:
    """Features of T new tokens per row, before the output projection, and the new state.

    This is `extend` (which see for the arguments) with what training needs: units are scanned, so
    compile time does not grow with depth, and tokens are taken in blocks.

    `weights` `[B, T]`: how much each token counts in the statistics; none are made without it.
    `places`: tokens whose keys the statistics are to hold.
    `remat`: recompute each unit in the backward pass instead of keeping its activations.
    """
    config, params = model.config, model.params
    batch, length = tokens.shape
    if lengths is None:
        lengths = jnp.full(batch, length, jnp.int32)
    timeline, document_start, document_id = make_timeline(
        config, state, lengths, length, document_ids
    )
    x = keep_rows(embed(params, tokens, timeline, config))
    wave = distance_wave(config, state)

    unit_keys, rows = None, jnp.arange(batch)
    if dropout is not None:
        rows = dropout.rows
        if config.dropout_embedding:
            key = jax.random.fold_in(dropout.call, config.num_units)
            row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
            drop_row = functools.partial(layers.dropout, rate=config.dropout_embedding)
            x = jax.vmap(drop_row)(row_keys, x)
        unit_keys = jax.vmap(
            lambda i: (
                jax.random.fold_in(dropout.call, i),
                jax.random.fold_in(dropout.sequence, i),
            )
        )(jnp.arange(config.num_units))
    plan = pieces.plan(config, batch, length)

    def body(x, xs):
        unit_params, codebook, unit_state, keys = xs
        unit_wave = wave
        if keys is not None:
            sinusoid_key, layer_key = jax.random.split(keys[1])
            keys = (keys[0], layer_key)
            unit_wave = layers.dropout(sinusoid_key, wave, config.dropout_sinusoid)
        # Parts of a product that devices share cannot stand side by side where columns are cut.
        unit = prepare_unit(unit_params, codebook, unit_wave, config, fuse=not cuts_columns())

        def one_piece(unit_state, piece: Piece):
            if not config.grad_through_cache:
                unit_state = jax.lax.stop_gradient(unit_state)

            def drop(added, branch):
                return added if keys is None else pieces.drop(keys, branch, added, piece, config)

            x, unit_state, statistics = apply_unit(
                unit,
                piece.x,
                unit_state,
                piece.timeline,
                config,
                piece.weights,
                piece.places,
                drop,
            )
            return unit_state, (x, statistics)

        if remat:  # what is dear to make again is kept: the outputs of attention
            keep = jax.checkpoint_policies.save_only_these_names(*attention.SAVED, "codes")
            one_piece = jax.checkpoint(one_piece, policy=keep)

        def one_group(unit_state, group: Piece):
            if plan.pieces == 1:
                unit_state, (x, statistics) = one_piece(unit_state, group)
                return x, unit_state, statistics
            keeps = unit_state.keys is not None
            carried = attention.window_keys(unit_state, unit["words"], config.compute_dtype)
            unit_state = replace(unit_state, keys=carried)  # as codes, no gradient would pass
            cut = pieces.cut_time(plan, group, config)
            unit_state, (x, statistics) = jax.lax.scan(one_piece, unit_state, cut)
            unit_state = unit_state if keeps else replace(unit_state, keys=None)
            x = pieces.join_time(x, length)
            return x, unit_state, jax.tree.map(lambda a: a.sum(0), statistics)

        whole = Piece(x, timeline, weights, places, rows, jnp.int32(0))
        x, unit_state, statistics = pieces.map_groups(plan, one_group, unit_state, whole)
        return keep_rows(x), (unit_state, statistics)

    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *state.units)
    xs = (params["units"], model.codebook, stacked, unit_keys)
    x, (stacked, statistics) = jax.lax.scan(body, x, xs)
    units = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(config.num_units)]
    if statistics is not None:
        statistics = replace(statistics, commitment=statistics.commitment.sum())

    last = jnp.take_along_axis(x, jnp.clip(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = to_logits(params, last, config)
    state = State(
        position=state.position + lengths,
        document_start=document_start,
        document_id=document_id,
        logits=jnp.where(lengths[:, None] > 0, logits, state.logits),
        units=tuple(units),
    )
    return x, state, statistics
