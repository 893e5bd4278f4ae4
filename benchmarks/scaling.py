"""Weak scaling: `python benchmarks/scaling.py [--preset small] [--fsdp] [--rows 4] ...`.

Trains and generates on 1, 2, 4, ... of the devices with the same rows for each, warm, and prints
medians of tokens/s per device. On virtual CPU devices, which share their cores, it shows nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from transformer_vq import ModelConfig, SamplingParams, TrainConfig, generate, init_model
from transformer_vq.config import MeshConfig
from transformer_vq.data import Batch
from transformer_vq.ops.train import init_train_state, make_train_step, train_state_shardings
from transformer_vq.sharding import make_mesh, shard_rows


def main() -> None:
    """Print a line for every number of devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="small", help="model; small is bench-small")
    parser.add_argument("--fsdp", action="store_true", help="share parameters over all devices")
    parser.add_argument("--rows", type=int, default=4, help="of each device")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a training sequence")
    parser.add_argument("--tokens", type=int, default=256, help="to generate, in each row")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {args.preset}", flush=True)
    count = 1
    while count <= jax.device_count():
        devices = jax.devices()[:count]
        mesh = make_mesh(MeshConfig(fsdp=count if args.fsdp else 1), devices)
        rows = args.rows * count
        update = training(config, mesh, rows, args.length)
        trained = args.rows * args.length / median(update, args.repeats)
        draw = decoding(config, mesh, rows, args.tokens)
        drawn = args.rows * args.tokens / median(draw, args.repeats)
        print(
            f"{count:4d} devices: train {trained:9.0f}, generate {drawn:7.0f} tokens/s per device",
            flush=True,
        )
        count *= 2


def training(
    config: ModelConfig, mesh: jax.sharding.Mesh, rows: int, length: int
) -> Callable[[], None]:
    """A call that trains one update of so many rows."""
    train = TrainConfig(batch_size=rows, sequence_len=length)
    tokens = np.random.default_rng(0).integers(0, 256, (rows, length + 1), np.int32)
    mask, documents = np.ones((rows, length), bool), np.zeros((rows, length), np.int32)
    batch = shard_rows(mesh, Batch(tokens[:, :-1], tokens[:, 1:], mask, documents))
    placed = train_state_shardings(config, train, mesh)
    init = jax.jit(init_train_state, static_argnums=(0, 1), out_shardings=placed)
    train_state = init(config, train)
    step = make_train_step(config, train, mesh)

    def update() -> None:
        nonlocal train_state
        train_state, metrics = step(train_state, batch)
        jax.block_until_ready((train_state, metrics))

    return update


def decoding(
    config: ModelConfig, mesh: jax.sharding.Mesh, rows: int, tokens: int
) -> Callable[[], None]:
    """A call that generates so many tokens in every row."""
    model = init_model(config, 0)
    params = [SamplingParams(max_tokens=tokens, top_p=0.9, seed=row) for row in range(rows)]
    return lambda: generate(model, [[0]] * rows, params, mesh=mesh) and None


def median(call: Callable[[], None], repeats: int) -> float:
    """Seconds of a call, once it is compiled."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
