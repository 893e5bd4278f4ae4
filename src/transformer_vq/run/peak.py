"""How fast this machine multiplies matrices: the measure of a training run's speed, and whether it
is worth rounding what is multiplied.

Model FLOP/s (`costs.train_flops` times tokens per second) over this rate is the model FLOPs
utilisation, `mfu` in metrics.jsonl.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer_vq.config import ModelConfig, Products
from transformer_vq.nn.products import matmul_rounded

LONG_ENOUGH = 0.005  # seconds that a product takes before its rate is believed
LARGEST = 8192
REPEATS = 10
TOKENS = 2048
WORTH_ROUNDING = 1.5  # times as fast


def peak_flops(mesh: Mesh, dtype: str) -> float:
    """Operations per second of large matrix products on all devices of `mesh` together.

    Measured on one device, in well under a second, once per process. Devices of a CPU are virtual
    and share its cores, so they count as one.
    """
    device = mesh.local_devices[0]
    count = jax.process_count() if device.platform == "cpu" else mesh.size
    return count * _product_rate(device, dtype)


def product_rate(device: Any, dtype: str) -> float:
    """Operations per second of a square product on one device, now: the best of a few."""
    size = 1024
    while True:
        matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
        matrix = jax.device_put(matrix.astype(dtype), device)
        _squared(matrix).block_until_ready()  # compiles
        seconds = min(_timed(_squared, matrix) for _ in range(REPEATS))
        if seconds >= LONG_ENOUGH or size >= LARGEST:
            return 2 * size**3 / seconds
        size *= 2


_product_rate = functools.cache(product_rate)


@jax.jit
def _squared(matrix: jax.Array) -> jax.Array:
    return matrix @ matrix


class Rates(NamedTuple):
    """Operations per second of a product as training makes it."""

    float32: float
    rounded: float  # what is multiplied is rounded to bfloat16 first, and that takes time too

    @property
    def faster(self) -> Products:
        """How products are to be made: rounded where that is much faster. A whole update gains less
        than its products do, so a small lead would not be worth the digits."""
        return "bfloat16" if self.rounded >= WORTH_ROUNDING * self.float32 else "float32"

    def __str__(self) -> str:
        return (
            f"those of a unit run at {self.float32 / 1e9:,.0f} GFLOP/s in float32 and at "
            f"{self.rounded / 1e9:,.0f} rounded to bfloat16"
        )


def product_rates(config: ModelConfig) -> Rates:
    """Measured in a few ms, after two small compilations: the best of a few products of 2,048
    tokens and the matrix that makes queries, keys, values and gates (of a large one, a part), in
    turns."""
    width = min(config.d_model, TOKENS)
    columns = min(config.num_heads * (config.d_k + 2 * config.d_v), 2 * TOKENS)
    shapes = ((TOKENS, width), (width, columns))
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)
    ways = [jax.jit(way) for way in (jnp.matmul, matmul_rounded)]
    for way in ways:
        way(x, matrix).block_until_ready()  # compiles
    turns = [[_timed(way, x, matrix) for way in ways] for _ in range(REPEATS)]
    flops = 2 * TOKENS * width * columns
    return Rates(*(flops / min(seconds) for seconds in zip(*turns, strict=True)))


def _timed(multiply, *matrices: jax.Array) -> float:
    start = time.perf_counter()
    multiply(*matrices).block_until_ready()
    return time.perf_counter() - start
