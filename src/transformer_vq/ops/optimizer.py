"""AdamW as in the paper: clipped, warmed up, and with a weight decay that stands on its own."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.nn.layers import ArraySpec, is_spec, wide
from transformer_vq.nn.model import model_specs
from transformer_vq.types import Params


def learning_rate_at(train: TrainConfig, step: Any) -> jax.Array:
    """The learning rate of the update that follows `step` updates; a float32 scalar, traceable.

    It climbs in a line from 0 to the peak, then falls along half a cosine to its final fraction of
    the peak, which it keeps beyond `train.steps`.
    """
    warm = train.warmup_steps
    cosine = optax.cosine_decay_schedule(1.0, max(train.steps - warm, 1), train.final_learning_rate)
    if not warm:
        return jnp.float32(train.learning_rate * cosine(step))
    factor = optax.join_schedules([optax.linear_schedule(0.0, 1.0, warm), cosine], [warm])
    return jnp.float32(train.learning_rate * factor(step))


def make_optimizer(train: TrainConfig, config: ModelConfig) -> optax.GradientTransformation:
    """What turns gradients of the parameters of `config` into their changes.

    In this order: the global norm of the gradient is clipped; Adam; the learning rate; and each
    tensor that is not a vector loses its `weight_decay` part, whatever the learning rate. Moments
    and sums are float32 at least, whatever the dtype of the parameters.
    """
    steps = [
        optax.clip_by_global_norm(train.grad_clip) if train.grad_clip else optax.identity(),
        optax.scale_by_adam(train.beta1, train.beta2, train.epsilon),
        optax.scale_by_learning_rate(lambda step: learning_rate_at(train, step)),
        optax.add_decayed_weights(-train.weight_decay, decayed(config)),
    ]
    return _in_wide_precision(optax.chain(*steps))


def decayed(config: ModelConfig) -> Params:
    """For each parameter, whether weight decay applies: to all but vectors.

    Units are stacked along an axis of their own, which does not make a matrix of a vector. Scalars
    decay, as in the reference implementation.
    """

    def is_decayed(spec: ArraySpec) -> bool:
        return len([axis for axis in spec.axes if axis != "unit"]) != 1

    return jax.tree.map(is_decayed, model_specs(config)[0], is_leaf=is_spec)


def _in_wide_precision(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(jax.tree.map(wide, updates), state, jax.tree.map(wide, params))

    return optax.GradientTransformation(
        lambda params: inner.init(jax.tree.map(wide, params)), update
    )
