"""Measurements of speed and memory: what `tvq bench` prints.

Every measurement warms up first, keeps compilation apart, and gives a median with its spread. What
the machine can do (bytes read, operations of a product) is measured in the same process, because a
shared machine is not the same from one hour to the next.
"""

import contextlib
import functools
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from transformer_vq import costs
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import Batch
from transformer_vq.engine.batch import Session
from transformer_vq.engine.decoders import decoder_for
from transformer_vq.engine.prefill import read
from transformer_vq.engine.request import SamplingParams
from transformer_vq.nn.decode import Decoder
from transformer_vq.nn.model import init_model
from transformer_vq.nn.products import Narrow, Weights
from transformer_vq.nn.weights import round_weights
from transformer_vq.ops.evaluate import LONG_CHUNK, evaluate
from transformer_vq.ops.sample import SampleConfig, sample_op
from transformer_vq.ops.train import init_train_state, make_train_step, require_trainable
from transformer_vq.run.peak import peak_flops, product_rate
from transformer_vq.sharding import data_mesh, shard_rows

DISPATCH = 32  # decoding steps between looks at the clock
PROBE_BYTES = 2**30  # what the bandwidth probe reads
PROBE_SIZE = 4096  # of its square matrices


@dataclass(frozen=True)
class Seconds:
    """Repeated measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> "Seconds":
        return cls(statistics.median(samples), min(samples), max(samples))


def device_info() -> dict[str, Any]:
    """What a figure depends on besides the code: versions, device, how many."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "backend": jax.devices()[0].platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


# What the machine can do.


@jax.jit
def _read_by_product(row: jax.Array, matrices: list[jax.Array]) -> jax.Array:
    return sum((m @ row)[:1].astype(jnp.float32) for m in matrices) + jnp.zeros(1)


@jax.jit
def _read_by_sum(row: jax.Array, matrices: list[jax.Array]) -> jax.Array:
    return sum(jnp.sum(m, dtype=jnp.float32) for m in matrices) + row[:1]


class Probe:
    """Measures how fast the device reads memory, in a dtype."""

    def __init__(self, dtype: str):
        self.dtype = jnp.dtype(dtype)
        self.row = jnp.ones(PROBE_SIZE, self.dtype)

    def bandwidth(self) -> float:
        """Bytes per second: the faster of two ways to read a GiB of matrices once."""
        count = PROBE_BYTES // (PROBE_SIZE**2 * self.dtype.itemsize)
        matrices = [jnp.ones((PROBE_SIZE, PROBE_SIZE), self.dtype) for _ in range(count)]
        ways = (_read_by_product, _read_by_sum)
        seconds = [_seconds(lambda way=way: way(self.row, matrices), repeats=5) for way in ways]
        return PROBE_BYTES / min(s.median for s in seconds)


def _seconds(call: Callable[[], Any], repeats: int) -> Seconds:
    """Times of a call, after one to warm up."""
    jax.block_until_ready(call())
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(time.perf_counter() - start)
    return Seconds.of(samples)


# Compilation and memory.


@contextlib.contextmanager
def _empty_compilation_cache() -> Iterator[None]:
    """A compilation cache of its own, empty at first, so that cold is cold."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (folder, True, 0.0, 0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


class PeakMemory:
    """Most memory in use since it was made: of the device, or of the process on a CPU."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # Linux forgets the peak so far
            Path("/proc/self/clear_refs").write_text("5", "utf-8")

    def bytes(self) -> int:
        stats = jax.devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"]
        try:
            lines = Path("/proc/self/status").read_text("utf-8").splitlines()
            return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) * 1024
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# The benchmarks. Each returns a record: one row of a table, one object of the JSON.


def bench_decode(
    config: ModelConfig,
    batch: int,
    *,
    position: int = 1,
    top_p: float = 0.9,
    rounds: int = 6,
    weights: Weights = "as-saved",
) -> dict[str, Any]:
    """Seconds of a decoding step of `stream`, from a prompt of `position` tokens on.

    The clock runs from the first token of a dispatch to that of the next: everything is in it, the
    hand-over to the host too. The bandwidth is measured between the rounds. Compile times are of
    the decoding loop, and of what reads the prompt.
    """
    probe, peak = Probe(config.compute_dtype), PeakMemory()
    model = round_weights(init_model(config, 0), weights)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, position).tolist() for _ in range(batch)]
    per_round = 4
    params = SamplingParams(max_tokens=(rounds * per_round + 4) * DISPATCH, top_p=top_p)

    def dispatches(session: Session) -> Iterator[int]:
        """A stop at the first token of every dispatch."""
        tokens = (token for token in session if token.row == 0)
        return itertools.islice(tokens, 0, None, DISPATCH)

    session = Session(model, prompts, params)
    session.read_prompts()
    with _empty_compilation_cache():
        loop, prompt = [], []
        for _ in range(2):  # compiled anew, then from the cache on disk
            jax.clear_caches()
            again = Session(model, [[0]] * batch, params, session.state)
            start = time.perf_counter()
            again.read_prompts()
            prompt.append(time.perf_counter() - start)
            jax.block_until_ready(jax.live_arrays())  # or the prompt would be read meanwhile
            start = time.perf_counter()
            next(dispatches(again))
            loop.append(time.perf_counter() - start)
    stops = dispatches(session)
    next(stops)
    next(stops)
    seconds, speeds = [], []
    for _ in range(rounds):
        speeds.append(probe.bandwidth())
        next(stops)  # with caches that the probe has emptied: not counted
        for _ in range(per_round - 1):
            start = time.perf_counter()
            next(stops)
            seconds.append((time.perf_counter() - start) / DISPATCH)
    step, read = Seconds.of(seconds), statistics.median(speeds)
    touched = costs.decode_bytes(config, batch) - spared_bytes(decoder_for(model, session.state))
    return {
        "batch": batch,
        "position": position,
        "weights": weights,
        "ms_per_step": 1e3 * step.median,
        "ms_low": 1e3 * step.low,
        "ms_high": 1e3 * step.high,
        "tokens_per_second": batch / step.median,
        "bytes_per_step": touched,
        "bandwidth": read,
        "bandwidth_fraction": touched / step.median / read,
        "compile_seconds": loop[0] - DISPATCH * step.median,
        "compile_seconds_warm_cache": loop[1] - DISPATCH * step.median,
        "compile_seconds_prompt": prompt[0],
        "compile_seconds_prompt_warm_cache": prompt[1],
        "state_bytes": batch * costs.state_bytes(config),
        "peak_bytes": peak.bytes(),
    }


def spared_bytes(decoder: Decoder) -> int:
    """By how much the matrices of a decoder are smaller than in the dtype it computes in."""
    number = jnp.dtype(decoder.config.compute_dtype).itemsize
    leaves = jax.tree.leaves(decoder, is_leaf=lambda x: isinstance(x, Narrow))
    matrices = [x.numbers for x in leaves if isinstance(x, Narrow)]
    return sum(number * x.size - x.nbytes for x in matrices)


def bench_prefill(config: ModelConfig, length: int, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds to read a prompt of `length` tokens, batch 1, into a new state.

    The rate of products is measured between the repeats.
    """
    model = init_model(config, 0)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, length).tolist()

    def read_prompt() -> Any:
        return read(model, None, [prompt]).logits

    start = time.perf_counter()
    jax.block_until_ready(read_prompt())
    first = time.perf_counter() - start
    return _reading(config, length, costs.prompt_flops(config), read_prompt, first, repeats)


def _reading(
    config: ModelConfig,
    length: int,
    flops: int,
    call: Callable[[], Any],
    first: float,
    repeats: int,
) -> dict[str, Any]:
    """The record of a call that reads `length` tokens with `flops` operations for each, and whose
    first time took `first` seconds."""
    peak, samples, rates = PeakMemory(), [], []
    for _ in range(repeats):
        rates.append(product_rate(jax.devices()[0], config.compute_dtype))
        jax.block_until_ready(call())  # with caches that the products have emptied: not counted
        start = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(time.perf_counter() - start)
    seconds, rate = Seconds.of(samples), statistics.median(rates)
    return {
        "length": length,
        "seconds": seconds.median,
        "tokens_per_second": length / seconds.median,
        "tokens_per_second_low": length / seconds.high,
        "tokens_per_second_high": length / seconds.low,
        "flops_per_token": flops,
        "product_rate": rate,
        "mfu": length / seconds.median * flops / rate,
        "compile_seconds": first - seconds.median,
        "peak_bytes": peak.bytes(),
    }


def bench_sample(
    config: ModelConfig, batch: int, *, length: int = 128, repeats: int = 5
) -> dict[str, Any]:
    """Seconds of `sample_op`: `batch` sequences of `length` tokens over all devices."""
    model, sample = init_model(config, 0), SampleConfig(batch, length, 0.9)
    start = time.perf_counter()
    sample_op(sample, 0, model, 0).block_until_ready()
    first = time.perf_counter() - start
    peak = PeakMemory()
    seconds = _seconds(lambda: sample_op(sample, 0, model, 0), repeats)
    return {
        "batch": batch,
        "length": length,
        "ms_per_step": 1e3 * seconds.median / length,
        "ms_low": 1e3 * seconds.low / length,
        "ms_high": 1e3 * seconds.high / length,
        "tokens_per_second": batch * length / seconds.median,
        "compile_seconds": first - seconds.median,
        "peak_bytes": peak.bytes(),
    }


def bench_train(config: ModelConfig, train: TrainConfig, *, repeats: int = 5) -> dict[str, Any]:
    """Seconds of the public train step: one batch, `updates_per_sequence` updates."""
    mesh, peak = data_mesh(), PeakMemory()
    require_trainable(config, train, mesh)
    rate = peak_flops(mesh, config.compute_dtype)
    rows, length = train.batch_size, train.sequence_len
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1), np.int32)
    batch = shard_rows(
        mesh,
        Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            loss_mask=np.ones((rows, length), bool),
            document_ids=np.zeros((rows, length), np.int32),
        ),
    )
    train_state = init_train_state(config, train)
    start = time.perf_counter()
    step = make_train_step(config, train, mesh).lower(train_state, batch).compile()
    compile_seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        train_state, metrics = step(train_state, batch)
        jax.block_until_ready((train_state, metrics))
        seconds += [time.perf_counter() - start] if i else []
    time_of = Seconds.of(seconds)
    flops = costs.run_flops(config, train)
    speed = rows * length / time_of.median
    return {
        "attention": config.attention,
        "block_len": config.block_len,
        "batch": rows,
        "length": length,
        "update_len": train.update_len,
        "tokens_per_second": speed,
        "tokens_per_second_low": rows * length / time_of.high,
        "tokens_per_second_high": rows * length / time_of.low,
        "flops_per_token": flops,
        "product_rate": rate,
        "mfu": speed * flops / rate,
        "compile_seconds": compile_seconds,
        "temporary_bytes": memory.temp_size_in_bytes if memory else 0,
        "peak_bytes": peak.bytes(),
    }


def bench_evaluate(config: ModelConfig, length: int, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds to score one row of `length` tokens, as `tvq eval` scores a long text.

    The rate of products is measured between the repeats.
    """
    model = init_model(config, 0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, length + 1, np.int32)
    start = time.perf_counter()
    call = functools.partial(evaluate, model, tokens, chunk_len=LONG_CHUNK)
    call()
    first = time.perf_counter() - start
    return _reading(config, length, costs.forward_flops(config), call, first, repeats)
