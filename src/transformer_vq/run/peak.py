"""How fast this machine multiplies matrices: the measure of a training run's speed.

Model FLOP/s (`costs.train_flops` times tokens per second) over this rate is the model FLOPs
utilisation, `mfu` in metrics.jsonl.
"""

import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

LONG_ENOUGH = 0.005  # seconds that a product takes before its rate is believed
LARGEST = 8192
REPEATS = 10


def peak_flops(mesh: Mesh, dtype: str) -> float:
    """Operations per second of large matrix products on all devices of `mesh` together.

    Measured on one device, in well under a second, once per process. Devices of a CPU are virtual
    and share its cores, so they count as one.
    """
    device = mesh.local_devices[0]
    count = jax.process_count() if device.platform == "cpu" else mesh.size
    return count * _product_rate(device, dtype)


@functools.cache
def _product_rate(device: Any, dtype: str) -> float:
    """Operations per second of a square product on one device: the best of a few."""
    multiply = jax.jit(lambda a: a @ a)
    size = 1024
    while True:
        matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
        matrix = jax.device_put(matrix.astype(dtype), device)
        multiply(matrix).block_until_ready()  # compiles
        seconds = min(_timed(multiply, matrix) for _ in range(REPEATS))
        if seconds >= LONG_ENOUGH or size >= LARGEST:
            return 2 * size**3 / seconds
        size *= 2


def _timed(multiply, matrix: jax.Array) -> float:
    start = time.perf_counter()
    multiply(matrix).block_until_ready()
    return time.perf_counter() - start
