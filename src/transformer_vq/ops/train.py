"""The train step: gradient of each chunk of a sequence, optimizer, codebooks by moving average."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.errors import ConfigError
from transformer_vq.nn import products, vq
from transformer_vq.nn.attention import AttentionState, keep_keys
from transformer_vq.nn.dropout import DropoutKeys
from transformer_vq.nn.forget import time_constants
from transformer_vq.nn.forward import Training, forward
from transformer_vq.nn.layers import iota, wide
from transformer_vq.nn.model import Model, State, init_model, init_state, model_specs
from transformer_vq.nn.rows import chunking, join_rows, scan_rows
from transformer_vq.nn.vq import SamplePositions
from transformer_vq.ops.loss import LossTerms, loss_fn
from transformer_vq.ops.optimizer import learning_rate_at, make_optimizer
from transformer_vq.sharding import (
    by_rows,
    keep_rows,
    replicated,
    require_divisible,
    shard_arrays,
    traced_on,
)
from transformer_vq.types import Params

# What the random numbers of a run are for: each use has keys of its own.
INIT, DROPOUT_CALL, DROPOUT_SEQUENCE, FIRST_CODEBOOK, REVIVAL = range(5)

Traced = Any  # inside of jit: a `Batch`, or a chunk of one, of JAX's arrays
Metrics = dict[str, jax.Array]  # float32 scalars, or a number for each unit


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TrainState:
    """All that changes in training. Random keys and the place in the data follow from `step`."""

    step: jax.Array  # int32 []: updates done
    params: Params
    codebook: Params
    opt_state: Any
    average: Params | None = None  # {"params", "codebook"} over time, float32; with ema_decay only
    stream: list[jax.Array] | None = None  # leaves of the `State` after a batch; with streaming


def require_trainable(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> None:
    """Raise `ValueError` for a model, a recipe and devices that do not go together."""
    parts = "batch_size" if train.accumulate < 2 else "batch_size over accumulate"
    require_divisible(train.batch_size // max(train.accumulate, 1), mesh, parts)
    if train.streaming and config.attention == "full":
        raise ConfigError(
            "streaming is true, but full attention cannot go on without end: turn it off, or use "
            "VQ attention",
            "streaming",
        )


def init_train_state(config: ModelConfig, train: TrainConfig) -> TrainState:
    """The state before the first update, its parameters drawn by `train.seed`."""
    model = init_model(config, jax.random.fold_in(jax.random.key(train.seed), INIT))
    weights = {"params": model.params, "codebook": model.codebook}
    return TrainState(
        step=jnp.int32(0),
        params=model.params,
        codebook=model.codebook,
        opt_state=make_optimizer(train, config).init(model.params),
        average=jax.tree.map(lambda x: jnp.copy(wide(x)), weights) if train.ema_decay else None,
        stream=jax.tree.leaves(_empty_state(config, train.batch_size, train.sequence_len))
        if train.streaming
        else None,
    )


def start_codebook(
    config: ModelConfig, train: TrainConfig, train_state: TrainState, batch: Traced
) -> TrainState:
    """The state before the first update with keys of the first chunk of a batch as codewords.

    Every codeword is the key of a token drawn at random, the same tokens in all units. The
    codewords of one unit change the keys of the next, so units are set one after the other, which
    takes a forward pass for each. With `accumulate = k` every k-th row is used.
    """
    inputs, mask, documents = (
        x[:: max(train.accumulate, 1), : train.update_len]
        for x in (batch.inputs, batch.loss_mask, batch.document_ids)
    )
    state = _empty_state(config, len(inputs), train.sequence_len)
    key = jax.random.fold_in(jax.random.key(train.seed), FIRST_CODEBOOK)
    samples = vq.draw_samples(key, mask, config.codebook_size)
    training = Training(mask.astype(jnp.float32), samples)

    def set_unit(i: jax.Array, codebook: Params) -> Params:
        model = Model(train_state.params, codebook, config)
        out = forward(model, state, inputs, document_ids=documents, training=training)
        assert out.statistics is not None and out.statistics.keys is not None
        keys = out.statistics.keys[i].astype(config.param_dtype)
        return {"sum": codebook["sum"].at[i].set(keys), "count": codebook["count"].at[i].set(1)}

    codebook = jax.lax.fori_loop(0, config.num_units, set_unit, train_state.codebook)
    average = train_state.average
    if average is not None:
        average = {**average, "codebook": jax.tree.map(wide, codebook)}
    return replace(train_state, codebook=codebook, average=average)


def trained_model(train_state: TrainState, config: ModelConfig) -> Model:
    """The model to evaluate and sample with: averaged over time if there is an average."""
    weights = train_state.average
    if weights is None:
        return Model(train_state.params, train_state.codebook, config)
    weights = jax.tree.map(lambda x: x.astype(config.param_dtype), weights)
    return Model(weights["params"], weights["codebook"], config)


def train_state_shardings(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> TrainState:
    """Where each array of a train state lives on a mesh: what parameters are, their moments
    and averages are; streams by rows."""
    params, codebook = model_specs(config)
    shapes = jax.eval_shape(lambda: init_train_state(config, train))
    placed = shard_arrays(mesh, config, params | codebook, shapes)
    stream = None if shapes.stream is None else [by_rows(mesh) for _ in shapes.stream]
    return replace(placed, stream=stream)


def train_state_shapes(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and places of the arrays of a train state on a mesh."""
    shapes = jax.eval_shape(lambda: init_train_state(config, train))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        train_state_shardings(config, train, mesh),
    )


def make_train_step(
    config: ModelConfig, train: TrainConfig, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """The jitted `(train_state, batch) -> (train_state, metrics)`; it donates the train state.

    A batch holds B whole sequences, `[B, sequence_len]`. It is cut into `updates_per_sequence`
    chunks along time and each chunk is one update; the attention state is carried from chunk to
    chunk, and no gradient crosses (truncated backpropagation through time). With
    `train.streaming` it is also carried from batch to batch, except for rows that `batch.starts`
    names. With a `mesh`, the batch is spread over it by rows, and the train state as
    `train_state_shardings` says.

    The metrics are means over the chunks, and over the whole batch:

    - loss: negative log-likelihood in nats per target that counts
    - commitment: |k - C_z|^2 per token that is no padding, summed over units and heads
    - grad_norm: global norm of the gradient, before clipping
    - learning_rate
    - codebook_used: fraction of the codewords that got a key in the update
    - codebook_perplexity: exp of the entropy of their use; both are means over units and heads
    - codebook_used_by_unit, codebook_perplexity_by_unit: the same, `[N]`, means over heads
    - far_mass, far_mass_by_unit: log(1 + mass of the keys beyond the window) at the end of the
      batch, means over rows and heads; of all units and, where keys fade, of each
    - time_constant_by_unit: tokens after which a key has lost a nat, where the gate gets nothing
      from the token; means over heads. For models that forget.

    Those of the codebook and the far mass are not there for full attention, which has neither; nor
    is the far mass of a model without a cache.
    """
    update = make_update(config, train)

    def train_step(train_state: TrainState, batch: Traced) -> tuple[TrainState, Metrics]:
        state = keep_rows(_empty_state(config, *batch.inputs.shape))
        if train.streaming:
            state = _continued(state, train_state.stream, batch.starts)
            train_state = replace(train_state, stream=None)
        chunks = batch._replace(starts=None)
        chunks = jax.tree.map(lambda x: _chunks(x, train.update_len), chunks)

        def body(carry: tuple[TrainState, State], chunk: Traced) -> tuple[Any, Metrics]:
            train_state, state, metrics = update(*carry, chunk)
            return (train_state, state), metrics

        (train_state, state), metrics = jax.lax.scan(body, (train_state, state), chunks)
        if train.streaming:
            train_state = replace(train_state, stream=jax.tree.leaves(state))
        metrics = _mean(metrics)
        if config.attention == "vq" and config.use_cache:
            by_unit = far_mass(state)
            metrics["far_mass"] = jnp.mean(by_unit)
            if config.fades:  # else it is the same in all
                metrics["far_mass_by_unit"] = jnp.mean(by_unit, axis=(1, 2))
        if config.forget != "none":
            taus = time_constants(train_state.params["units"], config)
            metrics["time_constant_by_unit"] = jnp.float32(taus.mean(-1))
        return train_state, metrics

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)

    def on_mesh(train_state: TrainState, batch: Traced) -> tuple[TrainState, Metrics]:
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
    """One update: `(train_state, state, chunk) -> (train_state, state, metrics)`; not compiled."""
    optimizer = make_optimizer(train, config)
    rates = (f"dropout_{name}" for name in ("embedding", "sinusoid", "residual", "layer"))
    has_dropout = any(getattr(config, rate) > 0.0 for rate in rates)

    def update(train_state: TrainState, state: State, chunk: Traced):
        step, params, codebook = train_state.step, train_state.params, train_state.codebook
        batch, length = chunk.inputs.shape
        dropout = dropout_keys(train, step, batch) if has_dropout else None
        samples = None
        if config.attention == "vq" and train.revive_below:
            key = jax.random.fold_in(jax.random.key(train.seed), REVIVAL)
            key = jax.random.fold_in(key, step)
            samples = vq.draw_samples(key, chunk.loss_mask, config.codebook_size)
        gradient = _gradient(Model(params, codebook, config), remat=train.remat)
        count = train.accumulate or _micro_batches(config, batch, length)
        if count > 1:
            gradient = _in_micro_batches(gradient, count)
        grads, terms = gradient(state, chunk, dropout, samples)
        changes, opt_state = optimizer.update(grads, train_state.opt_state, params)
        metrics = _loss_metrics(terms, chunk.loss_mask.size) | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate_at(train, step),
        }
        if config.attention == "vq":
            with jax.named_scope("codebook"):
                codebook = vq.update_codebook(codebook, terms.codebook, config.codebook_decay)
                if terms.keys is not None:
                    codebook = vq.revive(codebook, terms.keys, train.revive_below)
            metrics |= codebook_metrics(terms.codebook["count"])
        params = jax.tree.map(lambda p, change: (p + change).astype(p.dtype), params, changes)
        average = train_state.average
        if average is not None:
            average = _averaged(average, {"params": params, "codebook": codebook}, train, step)
        return TrainState(step + 1, params, codebook, opt_state, average), terms.state, metrics

    return update


Gradient = Callable[
    [State, Traced, DropoutKeys | None, SamplePositions | None], tuple[Params, LossTerms]
]


def _gradient(model: Model, *, remat: bool) -> Gradient:
    """The gradient of the loss of a chunk with respect to the parameters, and the loss's terms."""

    def gradient(state, chunk, dropout, samples):
        return jax.grad(loss_fn, has_aux=True)(
            model.params,
            model,
            state,
            chunk.inputs,
            chunk.targets,
            chunk.loss_mask,
            chunk.document_ids,
            samples=samples,
            dropout=dropout,
            remat=remat,
        )

    return gradient


def _micro_batches(config: ModelConfig, batch: int, length: int) -> int:
    """The default of `accumulate`: where it is faster, no more rows at once than go through a unit
    at once."""
    return chunking(config, batch, length).micro_batches if products.tuning().micro_batches else 1


def _in_micro_batches(gradient: Gradient, count: int) -> Gradient:
    """`gradient`, of one micro-batch after the other, of which only the sums are kept."""

    def in_micro_batches(state, chunk, dropout, samples):
        def sums_of(by_row: tuple, samples: SamplePositions | None):
            rows, state, chunk = by_row
            keys = None if dropout is None else replace(dropout, rows=rows)
            grads, terms = gradient(state, chunk, keys, samples)
            return jax.tree.map(wide, (grads, terms._replace(state=None))), terms.state

        def add(sums: Any, by_row: tuple, samples: SamplePositions | None):
            added, state = sums_of(by_row, samples)
            return jax.tree.map(jnp.add, sums, added), state

        by_row = (iota(chunk.inputs.shape[0]), state, chunk)
        some = jax.tree.map(lambda x: x[: len(x) // count], by_row)
        shapes = jax.eval_shape(lambda *xs: sums_of(*xs)[0], some, samples)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, terms), states = scan_rows(add, count, zeros, by_row, samples)
        grads, nll, commitment = jax.tree.map(
            lambda x: x / count, (grads, terms.nll, terms.commitment)
        )
        return grads, terms._replace(nll=nll, commitment=commitment, state=join_rows(states))

    return in_micro_batches


def _averaged(average: Params, weights: Params, train: TrainConfig, step: jax.Array) -> Params:
    """The moving average after one more update. At first its memory is as short as the run."""
    decay = jnp.minimum(train.ema_decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * wide(new), average, weights)


def dropout_keys(train: TrainConfig, step: jax.Array, batch: int) -> DropoutKeys:
    """The keys of the update that follows `step` updates: a function of seed and step alone."""
    root = jax.random.key(train.seed)
    sequence = step // train.updates_per_sequence
    return DropoutKeys(
        call=jax.random.fold_in(jax.random.fold_in(root, DROPOUT_CALL), step),
        sequence=jax.random.fold_in(jax.random.fold_in(root, DROPOUT_SEQUENCE), sequence),
        rows=iota(batch),
    )


def codebook_metrics(counts: jax.Array) -> Metrics:
    """How the codewords were used, from the number of keys of each, `[N, G, S]`."""
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    used = jnp.mean(counts > 0, axis=(-2, -1))
    perplexity = jnp.mean(jnp.exp(entropy), axis=-1)
    return {
        "codebook_used": jnp.mean(used),
        "codebook_perplexity": jnp.mean(perplexity),
        "codebook_used_by_unit": used,
        "codebook_perplexity_by_unit": perplexity,
    }


def far_mass(state: State) -> jax.Array:
    """log(1 + mass) of all keys beyond the window, by unit, row and head: `[N, B, G]`."""
    masses = [unit.counts.sum(-1) for unit in state.units if isinstance(unit, AttentionState)]
    return jnp.log1p(jnp.stack(masses).astype(jnp.float32))


def _loss_metrics(terms: LossTerms, size: int) -> Metrics:
    """Sums over a chunk of `size` tokens, which `_mean` divides by the tokens of all chunks."""
    return {
        "loss": terms.nll * size,
        "commitment": terms.commitment * size,
        "tokens": terms.tokens,
        "real": terms.real,
    }


def _mean(metrics: Metrics) -> Metrics:
    """The metrics of the chunks `[chunks]` as one: per token, or per chunk."""
    sizes = {"loss": metrics.pop("tokens"), "commitment": metrics.pop("real")}
    per_token = {
        name: metrics.pop(name).sum() / jnp.maximum(size.sum(), 1) for name, size in sizes.items()
    }
    per_chunk = {name: values.mean(0) for name, values in metrics.items()}
    return {name: jnp.float32(value) for name, value in (per_token | per_chunk).items()}


def _empty_state(config: ModelConfig, rows: int, length: int) -> State:
    """The state before a batch of sequences of this length."""
    state = init_state(config, rows, room=length)
    units = (
        keep_keys(unit, config) if isinstance(unit, AttentionState) else unit
        for unit in state.units
    )
    return replace(state, units=tuple(units))


def _continued(empty: State, stream: Any, starts: jax.Array | None) -> State:
    """The state after the batch before, given by its leaves, and the empty one where rows start."""
    if starts is None:
        return empty

    def row_by_row(empty: jax.Array, before: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(starts, range(1, before.ndim)), empty, before)

    return jax.tree.map(row_by_row, empty, jax.tree.unflatten(jax.tree.structure(empty), stream))


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """`[B, T]` as `[T / size, B, size]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size), 1, 0)
