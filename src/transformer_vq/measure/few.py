"""What a call of a few tokens costs, in steps of decoding, beside what the machine could do."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from transformer_vq import costs
from transformer_vq.config import ModelConfig
from transformer_vq.engine.decoders import decoder_for
from transformer_vq.measure.bench import Probe
from transformer_vq.nn.decode import Decoder, decode_step
from transformer_vq.nn.few import commit, read_few
from transformer_vq.nn.model import State, init_model, init_state
from transformer_vq.run.peak import product_rate
from transformer_vq.types import Tokens

STEPS = 32  # of decoding in one program; of calls of T tokens as many as have so many, or two


@functools.partial(jax.jit, static_argnames="rounds", donate_argnames="state")
def _rounds(decoder: Decoder, state: State, tokens: Tokens, *, rounds: int) -> State:
    """So many calls that read the tokens `[B, T]` and take all of them in; with T = 1 steps."""

    def call(_: jax.Array, state: State) -> State:
        if tokens.shape[1] == 1:
            return decode_step(decoder, state, tokens[:, 0])
        pending = read_few(decoder, state, tokens)
        return commit(decoder.config, state, pending, jnp.full(len(tokens), tokens.shape[1]))

    return jax.lax.fori_loop(0, rounds, call, state)


def bench_few(config: ModelConfig, sizes: tuple[int, ...], *, turns: int = 5) -> dict[str, Any]:
    """Seconds of a step, and of reading T tokens with the logits of all of them, batch 1.

    All in turns, with the machine's bandwidth and rate of products measured between. `in_steps` is
    the median of the ratios of each turn. `least` is what a call would cost in steps if all its
    operations were made at that rate, and its bytes read at that bandwidth, the slower of the two.
    """
    model, state = init_model(config, 0), init_state(config, 1)
    decoder, probe = decoder_for(model, state), Probe(config.compute_dtype)
    seconds: dict[int, list[float]] = {size: [] for size in (1, *sizes)}
    rates, speeds = [], []
    for turn in range(-1, turns):  # the first compiles
        for size, taken in seconds.items():
            rounds = max(2, STEPS // size)
            tokens = jnp.arange(size, dtype=jnp.int32)[None] % config.vocab_size
            start = time.perf_counter()
            state = jax.block_until_ready(_rounds(decoder, state, tokens, rounds=rounds))
            if turn >= 0:
                taken.append((time.perf_counter() - start) / rounds)
        if turn >= 0:
            rates.append(product_rate(jax.devices()[0], config.compute_dtype))
            speeds.append(probe.bandwidth())
    step, rate, bandwidth = map(statistics.median, (seconds[1], rates, speeds))
    rows = []
    for size in sizes:
        ratios = [few / one for few, one in zip(seconds[size], seconds[1], strict=True)]
        flops = size * costs.decode_flops(config)
        least = max(flops / rate, costs.decode_bytes(config) / bandwidth)
        rows.append(
            {
                "tokens": size,
                "ms": 1e3 * statistics.median(seconds[size]),
                "in_steps": statistics.median(ratios),
                "in_steps_low": min(ratios),
                "in_steps_high": max(ratios),
                "least": least / step,
                "flops_per_second": flops / statistics.median(seconds[size]),
            }
        )
    return {
        "ms_per_step": 1e3 * step,
        "bandwidth_fraction": costs.decode_bytes(config) / step / bandwidth,
        "product_rate": rate,
        "bandwidth": bandwidth,
        "calls": rows,
    }
