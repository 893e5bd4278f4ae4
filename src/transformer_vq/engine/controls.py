"""The parameters of requests as the arrays that the compiled programs take."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from transformer_vq.engine.request import MAX_STOP_TOKENS, SamplingParams
from transformer_vq.nn import prob
from transformer_vq.ops.decode import Controls


def controls_row(params: SamplingParams, vocab_size: int) -> Controls:
    """The controls of one request: arrays of the host with one row, `[1, ...]`."""

    def number(name: str, dtype: DTypeLike = np.float32) -> Any:
        return np.asarray([getattr(params, name)], dtype)

    stops: Any = np.full((1, MAX_STOP_TOKENS), -1, np.int32)
    single = params.stop_tokens()
    stops[0, : len(single)] = single
    bias: Any = np.zeros((1, vocab_size), np.float32)
    for token, value in params.logit_bias.items():
        bias[0, token] = max(value, prob.REMOVED)
    if params.allowed_tokens is not None:
        banned = np.setdiff1d(np.arange(vocab_size), np.asarray(params.allowed_tokens, np.int64))
        bias[0, banned] = prob.REMOVED
    bias[0, list(params.banned_tokens)] = prob.REMOVED
    key: Any = np.asarray([divmod(int(params.seed), 1 << 32)], np.uint32)
    return Controls(
        key=key,
        temperature=number("temperature"),
        top_k=number("top_k", np.int32),
        top_p=number("top_p"),
        min_p=number("min_p"),
        typical_p=number("typical_p"),
        repetition_penalty=number("repetition_penalty"),
        presence_penalty=number("presence_penalty"),
        frequency_penalty=number("frequency_penalty"),
        bias=bias,
        stop_tokens=stops,
        min_tokens=number("min_tokens", np.int32),
    )


def controls_batch(params: Sequence[SamplingParams], batch: int, vocab_size: int) -> Controls:
    """The controls of requests, `[batch, ...]` on the host; rows that pad the batch are as the
    first request.

    Requests that share their parameters, as those of one call often do, share the work.
    """
    rows = {id(p): controls_row(p, vocab_size) for p in params}
    chosen = [rows[id(p)] for p in params] + [rows[id(params[0])]] * (batch - len(params))
    return jax.tree.map(lambda *row: np.concatenate(row), *chosen)
