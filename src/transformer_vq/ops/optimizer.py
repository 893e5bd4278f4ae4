"""What turns gradients into changes of parameters: optimizers, schedules, weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.nn.layers import ArraySpec, is_spec, wide
from transformer_vq.nn.model import model_specs
from transformer_vq.sharding import spread_units
from transformer_vq.types import Params

FIRST_MOMENTUM, MUON_MOMENTUM = 0.85, 0.95
MUON_RMS = 0.2  # of a change at rate 1: that of Adam's (Liu et al., 2025), so that rates are shared


def learning_rate_at(train: TrainConfig, step: Any) -> jax.Array:
    """The learning rate of the update that follows `step` updates; a float32 scalar, traceable.

    It climbs in a line from 0 to the peak and then follows `train.schedule`:

    - cosine, linear: down to the final fraction of the peak at `train.steps`, and kept beyond
    - inverse-sqrt: the peak times the root of warm-up over step, not below the final fraction
    - wsd: the peak, until a line over the last `decay_steps` leads down to the final fraction
    """
    step = jnp.asarray(step)  # a whole number of Python would divide as Python does
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and rates
        return jnp.float32(train.learning_rate * _factor(train)(step))


def _factor(train: TrainConfig) -> optax.Schedule:
    """The learning rate over its peak, by step."""
    warm, final = train.warmup_steps, train.final_learning_rate
    rest = max(train.steps - warm, 1)
    fall: optax.Schedule
    match train.schedule:
        case "cosine":
            fall = optax.cosine_decay_schedule(1.0, rest, final)
        case "linear":
            fall = optax.linear_schedule(1.0, final, rest)
        case "inverse-sqrt":
            fall = _inverse_sqrt(max(warm, 1), final)
        case "wsd":
            decay = min(train.decay_steps or max(train.steps // 5, 1), rest)
            fall = optax.linear_schedule(1.0, final, decay, transition_begin=rest - decay)
    if not warm:
        return fall
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warm), fall], [warm])


def _inverse_sqrt(warm: int, final: float) -> optax.Schedule:
    def factor(count: Any) -> jax.Array:
        return jnp.maximum(jnp.sqrt(warm / (warm + count)), final)

    return factor


def make_optimizer(train: TrainConfig, config: ModelConfig) -> optax.GradientTransformation:
    """What turns gradients of the parameters of `config` into their changes.

    In this order: the global norm of the gradient is clipped; the optimizer; the learning rate;
    and each tensor that is not a vector loses its `weight_decay` part, whatever the learning rate.
    Moments and sums are float32 at least, whatever the dtype of the parameters.
    """
    steps = [
        optax.clip_by_global_norm(train.grad_clip) if train.grad_clip else optax.identity(),
        _scale_by_optimizer(train, config),
        optax.scale_by_learning_rate(lambda step: learning_rate_at(train, step)),
        optax.add_decayed_weights(-train.weight_decay, decayed(config)),
    ]
    return _in_wide_precision(optax.chain(*steps))


def _scale_by_optimizer(train: TrainConfig, config: ModelConfig) -> optax.GradientTransformation:
    """The optimizer at a learning rate of 1, uphill. A stack of units is never taken as one."""
    adam = optax.scale_by_adam(train.beta1, train.beta2, train.epsilon)
    match train.optimizer:
        case "adamw":
            return adam
        case "lion":
            return optax.scale_by_lion(train.beta1, train.beta2)
        case "adafactor":
            steps = (
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
            return _each_unit_by_itself(optax.chain(*steps))
        case "muon":
            muon = optax.chain(_momentum(train), optax.stateless(_orthogonal))
            return optax.partition({"muon": muon, "adam": adam}, _muon_or_adam(config))


def _momentum(train: TrainConfig) -> optax.GradientTransformation:
    """The momentum of Muon. With `momentum_warmup_steps` it climbs in a line (Jordan et al., 2024,
    modded-nanogpt); the state is that of a constant one.

    Without an iteration `scale_by_muon` is the momentum alone, if it does not divide by a norm
    before the first ("aol" does not). The iterations follow (`_orthogonal`), where each device has
    whole matrices: spread over devices, they are gathered for every product.
    """

    def of(beta: Any) -> optax.GradientTransformation:
        return scale_by_muon(
            beta=beta, weight_dimension_numbers=_matrices, ns_steps=0, preconditioning="aol"
        )

    constant = of(MUON_MOMENTUM)
    if not train.momentum_warmup_steps:
        return constant
    climbing = optax.linear_schedule(FIRST_MOMENTUM, MUON_MOMENTUM, train.momentum_warmup_steps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return of(climbing(state.count)).update(updates, state, params)

    return optax.GradientTransformation(constant.init, update)


def _matrices(params: Any) -> Any:
    """`[N, in, out]`: N of them."""
    return jax.tree.map(lambda _: MuonDimensionNumbers(1, 2), params)


def _orthogonal(changes: Any, _: Any) -> Any:
    """The orthogonal matrices next to these. `[in, out]` of them has a root mean square of 1 over
    that of the larger, of which nothing is left."""
    iterations = scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=_matrices)

    def orthogonal(units: jax.Array) -> Any:
        return iterations.update(units, iterations.init(units))[0]

    return jax.tree.map(
        lambda x: MUON_RMS * max(x.shape[1:]) ** 0.5 * spread_units(orthogonal, x), changes
    )


def decayed(config: ModelConfig) -> Params:
    """For each parameter, whether weight decay applies: to all but vectors and gates.

    Units are stacked along an axis of their own, which does not make a matrix of a vector. Scalars
    decay, as in the reference implementation.
    """

    def is_decayed(spec: ArraySpec) -> bool:
        return not spec.gate and len([axis for axis in spec.axes if axis != "unit"]) != 1

    return jax.tree.map(is_decayed, model_specs(config)[0], is_leaf=is_spec)


def _muon_or_adam(config: ModelConfig) -> Params:
    """For each parameter, its part of `muon`: embeddings and the output projection have Adam."""

    def part(spec: ArraySpec) -> str:
        matrix = spec.axes[:1] == ("unit",) and len(spec.axes) == 3 and not spec.gate
        return "muon" if matrix else "adam"

    return jax.tree.map(part, model_specs(config)[0], is_leaf=is_spec)


def _each_unit_by_itself(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with every unit's arrays as tensors of their own, for what it does per tensor."""

    def split(params: Any) -> tuple[Params, Params]:
        return params["units"], {name: x for name, x in params.items() if name != "units"}

    def init(params: Any) -> Any:
        units, rest = split(params)
        return jax.vmap(inner.init)(units), inner.init(rest)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        of_units, of_rest = zip(split(updates), state, split(params), strict=True)
        rest: Any
        units, units_state = jax.vmap(inner.update)(*of_units)
        rest, rest_state = inner.update(*of_rest)
        return {**rest, "units": units}, (units_state, rest_state)

    return optax.GradientTransformation(init, update)


def _in_wide_precision(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, params = jax.tree.map(wide, (updates, params))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and moments
            return inner.update(updates, state, params)

    return optax.GradientTransformation(
        lambda params: inner.init(jax.tree.map(wide, params)), update
    )
