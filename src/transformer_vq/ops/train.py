"""The train step: gradient of each piece of a sequence, AdamW, codebooks by moving average."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import Batch
from transformer_vq.nn import vq
from transformer_vq.nn.attention import AttentionState, keep_keys
from transformer_vq.nn.model import (
    DropoutKeys,
    Model,
    State,
    init_model,
    init_state,
    model_specs,
)
from transformer_vq.ops.loss import LossTerms, loss_fn
from transformer_vq.ops.optimizer import learning_rate_at, make_optimizer
from transformer_vq.sharding import by_rows, keep_rows, replicated, shard_arrays, traced_on
from transformer_vq.types import Params

# What the random numbers of a run are for: each use has keys of its own.
INIT, DROPOUT_CALL, DROPOUT_SEQUENCE = range(3)

Metrics = dict[str, jax.Array]  # float32 scalars


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TrainState:
    """All that changes in training. Random keys and the place in the data follow from `step`."""

    step: jax.Array  # int32 []: updates done
    params: Params
    codebook: Params
    opt_state: Any


def init_train_state(config: ModelConfig, train: TrainConfig) -> TrainState:
    """The state before the first update, its parameters drawn by `train.seed`."""
    model = init_model(config, jax.random.fold_in(jax.random.key(train.seed), INIT))
    return TrainState(
        step=jnp.int32(0),
        params=model.params,
        codebook=model.codebook,
        opt_state=make_optimizer(train, config).init(model.params),
    )


def train_state_shardings(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> TrainState:
    """Where each array of a train state lives on a mesh: what parameters are, their moments are."""
    params, codebook = model_specs(config)
    shapes = jax.eval_shape(lambda: init_train_state(config, train))
    return shard_arrays(mesh, config, params | codebook, shapes)


def make_train_step(
    config: ModelConfig, train: TrainConfig, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """The jitted `(train_state, batch) -> (train_state, metrics)`; it donates the train state.

    A batch holds B whole sequences, `[B, sequence_len]`. It is cut into `updates_per_sequence`
    pieces along time and each piece is one update; the attention state is carried from piece to
    piece, and no gradient crosses (truncated backpropagation through time). With a `mesh`, the
    batch is spread over it by rows, and the train state as `train_state_shardings` says.

    The metrics are means over the pieces, and over the whole batch:

    - loss: negative log-likelihood in nats per target that counts
    - commitment: |k - C_z|^2 per token that counts, summed over units and heads
    - grad_norm: global norm of the gradient, before clipping
    - learning_rate
    - codebook_used: fraction of the codewords that got a key in the update
    - codebook_perplexity: exp of the entropy of their use; both are means over units and heads,
      and not there for full attention, which has no codebook
    """
    update = make_update(config, train)

    def train_step(train_state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state = keep_rows(_empty_state(config, *batch.inputs.shape))
        pieces = jax.tree.map(lambda x: _pieces(x, train.update_len), batch)

        def body(carry: tuple[TrainState, State], piece: Batch) -> tuple[Any, Metrics]:
            train_state, state, metrics = update(*carry, piece)
            return (train_state, state), metrics

        (train_state, _), metrics = jax.lax.scan(body, (train_state, state), pieces)
        return train_state, _mean(metrics)

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)

    def on_mesh(train_state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with traced_on(mesh):
            return train_step(train_state, batch)

    placed = train_state_shardings(config, train, mesh)
    return jax.jit(
        on_mesh,
        in_shardings=(placed, by_rows(mesh)),
        out_shardings=(placed, replicated(mesh)),
        donate_argnums=0,
    )


def make_update(config: ModelConfig, train: TrainConfig) -> Callable:
    """One update: `(train_state, state, piece) -> (train_state, state, metrics)`; not compiled."""
    optimizer = make_optimizer(train, config)
    rates = (f"dropout_{name}" for name in ("embedding", "sinusoid", "residual", "layer"))
    has_dropout = any(getattr(config, rate) > 0.0 for rate in rates)

    def update(train_state: TrainState, state: State, piece: Batch):
        step, params, codebook = train_state.step, train_state.params, train_state.codebook
        grads, terms = jax.grad(loss_fn, has_aux=True)(
            params,
            Model(params, codebook, config),
            state,
            *piece,
            dropout=dropout_keys(train, step) if has_dropout else None,
            remat=train.remat,
        )
        changes, opt_state = optimizer.update(grads, train_state.opt_state, params)
        metrics = _loss_metrics(terms, piece.loss_mask.size) | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate_at(train, step),
        }
        if config.attention == "vq":
            statistics = terms.statistics.codebook
            codebook = vq.update_codebook(codebook, statistics, config.codebook_decay)
            metrics |= codebook_metrics(statistics["count"])
        new = TrainState(
            step=step + 1,
            params=jax.tree.map(lambda p, change: (p + change).astype(p.dtype), params, changes),
            codebook=codebook,
            opt_state=opt_state,
        )
        return new, terms.state, metrics

    return update


def dropout_keys(train: TrainConfig, step: jax.Array) -> DropoutKeys:
    """The keys of the update that follows `step` updates: a function of seed and step alone."""
    root = jax.random.key(train.seed)
    sequence = step // train.updates_per_sequence
    return DropoutKeys(
        call=jax.random.fold_in(jax.random.fold_in(root, DROPOUT_CALL), step),
        sequence=jax.random.fold_in(jax.random.fold_in(root, DROPOUT_SEQUENCE), sequence),
    )


def codebook_metrics(counts: jax.Array) -> Metrics:
    """How the codewords were used, from the number of keys of each, `[..., S]`."""
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    return {
        "codebook_used": jnp.mean(counts > 0),
        "codebook_perplexity": jnp.mean(jnp.exp(entropy)),
    }


def _loss_metrics(terms: LossTerms, places: int) -> Metrics:
    """Sums over the piece, which `_mean` divides by the tokens of all pieces."""
    return {
        "loss": terms.nll * places,
        "commitment": terms.commitment * places,
        "tokens": terms.tokens,
    }


def _mean(metrics: Metrics) -> Metrics:
    """The metrics of the pieces `[pieces]` as one: per token, or per piece."""
    tokens = jnp.maximum(metrics.pop("tokens").sum(), 1)
    per_token = {name: metrics.pop(name).sum() / tokens for name in ("loss", "commitment")}
    per_piece = {name: values.mean() for name, values in metrics.items()}
    return {name: jnp.float32(value) for name, value in (per_token | per_piece).items()}


def _empty_state(config: ModelConfig, rows: int, length: int) -> State:
    """The state before a batch of sequences of this length."""
    if config.attention == "full":
        return init_state(config, rows, capacity=length)
    state = init_state(config, rows)
    return replace(
        state,
        units=tuple(
            keep_keys(unit, config) for unit in state.units if isinstance(unit, AttentionState)
        ),
    )


def _pieces(x: jax.Array, size: int) -> jax.Array:
    """`[B, T]` as `[T / size, B, size]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size), 1, 0)
