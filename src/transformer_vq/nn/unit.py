"""One residual unit: attention between projections, and an MLP where the head type has one.

`prepare_unit` makes what does not depend on the tokens; `apply_unit` applies it to some of them.
`read_unit` does so for a few, of which the state takes in what is to stay (`commit_unit`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from transformer_vq.config import ModelConfig
from transformer_vq.nn import attention, layers, products, vq
from transformer_vq.nn.attention import (
    QKV,
    AttentionWeights,
    FullAttentionState,
    NewFullKeys,
    NewKeys,
    UnitState,
)
from transformer_vq.nn.forget import ForgetGate, fades
from transformer_vq.nn.layers import Mlp, iota
from transformer_vq.nn.products import Matrix, Rounding, Weights, computed_once, matmul
from transformer_vq.nn.shift import key_mix, last_key, shift_keys
from transformer_vq.nn.timeline import Timeline
from transformer_vq.nn.vq import SamplePositions
from transformer_vq.types import Features, HeadScore, KeyMix, Keys, LastKey, Outputs, Params

Layout = Literal["fused", "separate", "decode"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fused:
    """The projections of the input as one matrix."""

    w_in: Matrix  # [D, columns]: of q, k, v and, in gated heads, the gate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Separate:
    """The projections of the input as matrices of their own."""

    w_q: Matrix  # [D, H K]
    w_k: Matrix  # [D, G K]
    w_v: Matrix  # [D, G V]
    w_g: Matrix | None  # [D, H V]; in gated heads only


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedUnit:
    """The constants of one unit, matrices in the compute dtype."""

    norm: Params
    project: Fused | Separate
    attention: AttentionWeights
    w_o: Matrix  # [H V, D]
    mlp: Mlp | None  # None in gated heads
    gain: HeadScore | None = None  # [H]: factor on the scores; in u and w already
    key_mix: KeyMix | None = None  # [G, K]: share of the key before
    forget: ForgetGate | None = None
    shortcut: jax.Array | None = None  # [2]: shares of the stream and of the embedded input


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """What training needs of a forward pass besides the features: sums over weighted tokens."""

    commitment: jax.Array  # []: of |k - C_z|^2, over units and heads too
    codebook: Params  # {"sum": [N, G, S, K], "count": [N, G, S]}: of keys, by code
    keys: jax.Array | None = None  # [N, G, S, K]: those at the sample positions, if there are any


class UnitTraining(NamedTuple):
    """What a unit needs in training."""

    weights: jax.Array  # [B, T]: how much each token counts in the statistics
    samples: SamplePositions | None  # tokens whose keys the statistics are to hold
    drop: Callable[[jax.Array, int], jax.Array]  # dropout of what branch 0, 1 adds to x


class UnitOutput(NamedTuple):
    """What comes out of a unit."""

    x: Features
    state: UnitState
    statistics: Statistics | None  # in training, unless attention is full


def distance_wave(config: ModelConfig, capacity: int | None) -> jax.Array:
    """Sinusoids of all distances that get a position bias, `[distances, D]`: those of the window,
    or all within the `capacity` of a state of full attention."""
    distances = iota(capacity or config.ring_len)
    return layers.sinusoid(distances, config.d_model, config.max_wavelength, config.compute_dtype)


@jax.named_scope("prepare")
def prepare_unit(
    params: Params,
    codebook: Params,
    wave: jax.Array,
    number: int | jax.Array,
    config: ModelConfig,
    *,
    layout: Layout,
    weights: Weights = "as-saved",
) -> PreparedUnit:
    """The constants of unit `number`. `wave` `[distances, D]`: the sinusoid of each distance.

    Layouts: "fused" has one matrix for all projections of the input; "separate" has one for each,
    for devices that share the columns; "decode" is fused, with matrices as products of few rows
    want them, which products of many rows and their gradients do not. Only there `weights` says how
    they are kept.
    """
    dtype = jnp.dtype(config.compute_dtype)
    gated = config.head_type == "shga"

    def cast(array: jax.Array) -> jax.Array:
        return array.astype(dtype)

    def stored(matrix: jax.Array) -> Matrix:
        if layout == "decode":
            return products.for_few_rows(matrix, weights, dtype)
        return Rounding(cast(matrix)) if config.products == "bfloat16" else cast(matrix)

    projections = [params[name] for name in ["w_q", "w_k", "w_v"] + ["w_g"] * gated]
    if layout == "separate":
        project = Separate(*map(stored, projections), *([] if gated else [None]))
    else:
        project = Fused(stored(jnp.concatenate(projections, axis=1)))
    scale = config.d_k**-0.25
    heads_k = (config.num_heads, config.d_k)
    gain = cast(params["score_gain"]) if config.score_gain else None
    u, w = (cast(params[name]).reshape(heads_k) * scale for name in ("u", "w"))
    if gain is not None:
        u, w = u * gain[:, None], w * gain[:, None]
    r = (cast(wave) @ cast(params["w_r"])).reshape(-1, *heads_k)
    attention_weights = AttentionWeights(
        words=vq.codewords(codebook, sphere=config.sphere_codewords),
        u=u,
        w=w,
        r=r * scale,
        sink=layers.wide(params["sink"]) if config.sink else None,
    )
    mlp = None
    if not gated:
        matrices = (stored(params["mlp"][name]) for name in ("w_in", "w_out"))
        mlp = Mlp(params["mlp"]["norm"], *matrices)
    return PreparedUnit(
        norm=params["norm"],
        project=project,
        attention=attention_weights,
        w_o=stored(params["w_o"]),
        mlp=mlp,
        gain=gain,
        key_mix=key_mix(params, config) if config.key_shift else None,
        forget=ForgetGate.of(params, number, config) if config.forget != "none" else None,
        shortcut=cast(params["shortcut"]) if config.embedding_shortcut else None,
    )


def unit_input(unit: PreparedUnit, x: Features, embedded: Features) -> Features:
    """The input of a unit: the stream x and, with `embedding_shortcut`, a share of what went into
    the first unit (Jordan et al., 2024, modded-nanogpt)."""
    if unit.shortcut is None:
        return x
    return unit.shortcut[0] * x + unit.shortcut[1] * embedded


def apply_unit(
    unit: PreparedUnit,
    x: Features,
    state: UnitState,
    timeline: Timeline,
    config: ModelConfig,
    training: UnitTraining | None = None,
) -> UnitOutput:
    """One residual unit on some tokens, which continue the state."""
    qkv, gate, unmixed = _project_in(unit, x, state.previous, timeline, config)
    out, state, statistics = _attend(unit, qkv, state, timeline, config, training)
    state = _keep_last(state, unmixed, timeline)
    return UnitOutput(_project_out(unit, x, out, gate, training), state, statistics)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PendingUnit:
    """What a unit's state has not taken in of a few tokens."""

    new: NewKeys | NewFullKeys
    unmixed: Keys | None  # [B, T, G, K]: keys before they were mixed, with `key_shift`


def read_unit(
    unit: PreparedUnit, x: Features, state: UnitState, timeline: Timeline, config: ModelConfig
) -> tuple[Features, PendingUnit]:
    """`apply_unit` for a few tokens, of which it is not known yet how many will stay."""
    qkv, gate, unmixed = _project_in(unit, x, state.previous, timeline, config)
    weights = unit.attention
    with jax.named_scope("attention"):
        if isinstance(state, FullAttentionState):
            qkv = replace(qkv, k=qkv.k.astype(qkv.q.dtype))
            ring = config.ring_len
            out, new = attention.attend_full_few(qkv, weights, state, timeline, ring)
        else:
            out, new = attention.attend_few(qkv, weights, state, timeline, config)
    return _project_out(unit, x, out, gate, None), PendingUnit(new, unmixed)


def commit_unit(
    state: UnitState, pending: PendingUnit, timeline: Timeline, config: ModelConfig
) -> UnitState:
    """The state of a unit after the first `timeline.length` of the tokens that it has read."""
    if isinstance(pending.new, NewFullKeys):
        assert isinstance(state, FullAttentionState)
        state = attention.commit_full(state, pending.new, timeline)
    else:
        assert not isinstance(state, FullAttentionState)
        state = attention.commit_few(state, pending.new, timeline, config)
    return _keep_last(state, pending.unmixed, timeline)


def _keep_last(state: UnitState, unmixed: Keys | None, timeline: Timeline) -> UnitState:
    """The state with the key that the next one is mixed with, if keys are mixed."""
    if unmixed is None or state.previous is None:
        return state
    return replace(state, previous=last_key(unmixed, state.previous, timeline.length))


@jax.named_scope("project_out")
def _project_out(
    unit: PreparedUnit,
    x: Features,
    out: Outputs,
    gate: jax.Array | None,
    training: UnitTraining | None,
) -> Features:
    """x with what the attention, of outputs `[B, T, H, V]`, and the MLP add to it."""
    out = out.reshape(*x.shape[:2], -1)
    if gate is not None:
        out = out * gate
    x = x + _dropped(matmul(out, unit.w_o), 0, training)
    if unit.mlp is not None:
        x = x + _dropped(layers.mlp(unit.mlp, x), 1, training)
    return x


def _dropped(added: jax.Array, branch: int, training: UnitTraining | None) -> jax.Array:
    return added if training is None else training.drop(added, branch)


@jax.named_scope("project_in")
def _project_in(
    unit: PreparedUnit,
    x: Features,
    previous: LastKey | None,
    timeline: Timeline,
    config: ModelConfig,
) -> tuple[QKV, jax.Array | None, Keys | None]:
    """Queries, keys and values of the tokens; in gated heads the gate `[B, T, H V]`; and with
    `key_shift` the keys as they were before they were mixed.

    In the dtype of x; only keys stay wide, until their codes are known.
    """
    lead, d_k = x.shape[:2], config.d_k
    normed = layers.norm(unit.norm, x)
    q, k, v, gate = _columns(unit.project, normed, config)
    q = layers.rms_norm(q.reshape(*lead, config.num_heads, d_k)) * d_k**-0.25
    q = q.astype(x.dtype)
    if unit.gain is not None:
        q = q * unit.gain[:, None]
    k = k.reshape(*lead, config.num_kv_heads, d_k)
    unmixed = None
    if unit.key_mix is not None and previous is not None:
        k, unmixed = shift_keys(k, unit.key_mix, previous, timeline), k
    k = layers.rms_norm(k) * d_k**-0.25
    v = v.reshape(*lead, config.num_kv_heads, config.d_v)
    return QKV(q, k, v, fades(unit.forget, normed, timeline, config)), gate, unmixed


def _columns(
    project: Fused | Separate, x: Features, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Columns `[B, T, ...]` of queries, keys, values and, in gated heads, the gate."""
    silu = jax.nn.silu
    if isinstance(project, Separate):

        def product(matrix: Matrix) -> jax.Array:  # plain ones: rounding as ever
            return x @ matrix if isinstance(matrix, jax.Array) else matmul(x, matrix)

        q, k, v = (product(matrix) for matrix in (project.w_q, project.w_k, project.w_v))
        if project.w_g is None:
            return q, k, v, None
        return q, k, silu(v), silu(product(project.w_g))
    heads, groups, d_k, d_v = config.num_heads, config.num_kv_heads, config.d_k, config.d_v
    gated = config.head_type == "shga"
    ends = (heads * d_k, (heads + groups) * d_k, (heads + groups) * d_k + groups * d_v)
    q, k, v, *gate = jnp.split(matmul(x, project.w_in), ends[: 2 + gated], axis=-1)
    return (q, k, computed_once(silu(v)), silu(gate[0])) if gated else (q, k, v, None)


def _attend(
    unit: PreparedUnit,
    x: QKV,
    state: UnitState,
    timeline: Timeline,
    config: ModelConfig,
    training: UnitTraining | None,
) -> tuple[jax.Array, UnitState, Statistics | None]:
    """Attention outputs `[B, T, H, V]`, the new state and the statistics of the keys."""
    length, weights = x.q.shape[1], unit.attention
    if training is None and config.reach:
        config = config.replace(reach=0)  # it is for gradients
    with jax.named_scope("attention"):
        if isinstance(state, FullAttentionState):
            x = replace(x, k=x.k.astype(x.q.dtype))
            # Training counts every token: a call that fills the state began with an empty one.
            from_empty = training is not None and length >= state.capacity
            out = attention.attend_full(x, weights, state, timeline, config, from_empty=from_empty)
        else:
            one = length == 1 and training is None  # training takes tokens in blocks, always
            attend = attention.attend_step if one else attention.attend_blocks
            out = attend(x, weights, state, timeline, config)
    if training is None or out.codes is None:
        return out.out, out.state, None
    return out.out, out.state, _statistics(x.k, out.codes, weights.words, training, config)


@jax.named_scope("codebook")
def _statistics(
    keys: jax.Array,
    codes: jax.Array,
    words: jax.Array,
    training: UnitTraining,
    config: ModelConfig,
) -> Statistics:
    """Statistics of the keys `[B, T, G, K]` with their codes `[B, T, G]`."""
    weights, samples = training.weights, training.samples
    return Statistics(
        commitment=vq.commitment(keys, vq.look_up(words, codes), weights),
        codebook=vq.code_statistics(keys, codes, weights, config.codebook_size),
        keys=None if samples is None else vq.keys_at(keys, samples),
    )
