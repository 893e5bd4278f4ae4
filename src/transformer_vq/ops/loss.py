"""The training objective: next-token negative log-likelihood plus the commitment of keys."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer_vq.nn import products
from transformer_vq.nn.dropout import DropoutKeys
from transformer_vq.nn.embedding import to_logits
from transformer_vq.nn.forward import Training, forward
from transformer_vq.nn.layers import wide_dtype
from transformer_vq.nn.model import Model, State
from transformer_vq.nn.vq import SamplePositions
from transformer_vq.sharding import row_shares
from transformer_vq.types import Features, Params, Tokens


class LossTerms(NamedTuple):
    """Scalars. `nll` and `commitment` are means over all B T tokens, masked ones counting zero."""

    nll: jax.Array
    commitment: jax.Array
    tokens: jax.Array  # targets that count
    real: jax.Array  # tokens that are no padding
    codebook: Params  # {"sum", "count"}: of the keys, by code
    state: State
    keys: jax.Array | None  # [N, G, S, K]: those at the sample positions, if any were given


def token_nll(model: Model, features: Features, targets: Tokens) -> jax.Array:
    """Negative log-likelihood `[B, T]`, in nats, of each target given the features before it.

    Made in chunks along T, each recomputed in the backward pass, once the logits would be large.
    """

    def chunk_nll(features: jax.Array, targets: jax.Array) -> jax.Array:
        logits = to_logits(model.params, features, model.config)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    return _in_chunks(chunk_nll, features, targets, model.config.vocab_size)


def token_hits(model: Model, features: Features, targets: Tokens) -> jax.Array:
    """Whether each target is the likeliest token given the features before it, bool `[B, T]`."""

    def chunk_hits(features: jax.Array, targets: jax.Array) -> jax.Array:
        logits = to_logits(model.params, features, model.config)
        return jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets

    return _in_chunks(chunk_hits, features, targets, model.config.vocab_size)


def _in_chunks(
    score: Callable[[jax.Array, jax.Array], jax.Array],
    features: Features,
    targets: Tokens,
    vocab_size: int,
) -> jax.Array:
    """What `score` makes of features `[B, t, D]` and targets `[B, t]`, for all T.

    A large vocabulary is never whole in memory. Chunks are as large as a device's share of the rows
    allows: for each one, devices gather the matrix, and sum its gradient.
    """
    batch, length, _ = features.shape
    logits = batch // row_shares(batch) * length * vocab_size
    chunks = -(-logits // products.tuning().logits_per_chunk)
    size = -(-length // min(chunks, length))
    chunks = -(-length // size)
    if chunks == 1:
        return score(features, targets)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunks, size, *x.shape[2:]), 1, 0)

    found = jax.lax.map(jax.checkpoint(lambda xs: score(*xs)), (split(features), split(targets)))
    return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :length]


def loss_fn(
    params: Params,
    model: Model,
    state: State,
    inputs: Tokens,
    targets: Tokens,
    loss_mask: jax.Array,
    document_ids: Tokens | None = None,
    *,
    samples: SamplePositions | None = None,
    dropout: DropoutKeys | None = None,
    remat: bool = False,
) -> tuple[jax.Array, LossTerms]:
    """The loss (a scalar, nats per token) of `params` in place of the model's, and its terms.

    Every token of the batch weighs the same, 1 / (B T), whether others are masked or not.
    `loss_mask` `[B, T]` leaves out padding, which takes no part in the commitment and in the
    statistics of the codebook either. A target below 0 does not count in the loss; the token before
    it does take part in the others.
    """
    model = Model(params, model.codebook, model.config)
    mask = loss_mask.astype(wide_dtype(model.config.compute_dtype))
    asked = mask * (targets >= 0).astype(mask.dtype)
    training = Training(mask, samples, dropout, remat)
    out = forward(model, state, inputs, document_ids=document_ids, training=training)
    statistics = out.statistics
    assert statistics is not None  # as training was given
    nll = jnp.sum(asked * token_nll(model, out.features, targets)) / mask.size
    commitment = statistics.commitment / mask.size
    loss = nll + model.config.commit_coefficient * commitment
    terms = LossTerms(
        nll=nll,
        commitment=commitment,
        tokens=asked.sum(),
        real=mask.sum(),
        codebook=statistics.codebook,
        state=out.state,
        keys=statistics.keys,
    )
    return loss, terms
