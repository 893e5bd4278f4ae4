"""Speed of the train step: `python benchmarks/train.py [--length 1024 8192] [--batch 4]`.

Runs the public train step (AdamW, no dropout) of bench-small, warm, and prints medians. Float32.
"""

import argparse
import resource
import statistics
import time

import jax
import numpy as np

from transformer_vq import ModelConfig, TrainConfig
from transformer_vq.data import Batch
from transformer_vq.ops.train import init_train_state, make_train_step

CONFIG = ModelConfig(d_model=256, d_k=64, num_layers=4, codebook_size=256, window_len=256)


def main() -> None:
    """Print a line for every length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, nargs="+", default=[1024])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; bench-small")
    for length in args.length:
        train = TrainConfig(batch_size=args.batch, sequence_len=length)
        tokens = np.random.default_rng(0).integers(0, 256, (args.batch, length + 1), np.int32)
        batch = Batch(
            tokens[:, :-1],
            tokens[:, 1:],
            np.ones((args.batch, length), bool),
            np.zeros((args.batch, length), np.int32),
        )
        train_state = init_train_state(CONFIG, train)
        start = time.perf_counter()
        step = make_train_step(CONFIG, train).lower(train_state, batch).compile()
        compile_seconds = time.perf_counter() - start
        seconds = []
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            train_state, metrics = step(train_state, batch)
            jax.block_until_ready((train_state, metrics))
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[1:])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"length {length:6d}: {args.batch * length / median:7.0f} tokens/s "
            f"({median:.2f} s per update); compiled in {compile_seconds:.1f} s, "
            f"peak {peak:.2f} GiB of the process so far"
        )


if __name__ == "__main__":
    main()
