"""Time of a decoding step: `python benchmarks/decode.py [small|enwik8] [--batch 1 8 32]`.

Runs `generate_tokens`, the program behind `generate` (top-p 0.9), warm, and prints medians beside
the read bandwidth of the machine measured in the same process. Float32.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from transformer_vq import ModelConfig, SamplingParams, init_model
from transformer_vq.costs import decode_bytes
from transformer_vq.ops.generate import Session, _controls
from transformer_vq.ops.sample import generate_tokens

CONFIGS = {
    "small": ModelConfig(d_model=256, d_k=64, num_layers=4, codebook_size=256, window_len=256),
    "enwik8": ModelConfig.preset("enwik8", compute_dtype="float32"),
}


def bandwidth(repeats: int = 7) -> float:
    """Bytes per second at which a product of one row with 1 GiB of matrices reads them."""
    matrices = [jnp.ones((4096, 4096), jnp.float32) for _ in range(16)]
    read = jax.jit(lambda row, all_: sum(jnp.sum(m @ row) for m in all_))
    row = jnp.ones(4096, jnp.float32)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        read(row, matrices).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2**30 / statistics.median(seconds[1:])


def step_seconds(config: ModelConfig, batch: int, steps: int = 32, repeats: int = 7):
    """Median, smallest and largest seconds of a step, and seconds to compile."""
    model = init_model(config, 0)
    params = SamplingParams(max_tokens=steps * (repeats + 2), top_p=0.9)
    session = Session(model, [[0]] * batch, params, steps=steps)
    session.read_prompts()
    rows = session._rows()
    controls = _controls([params] * batch, batch, config.vocab_size)
    options = dict(steps=steps, with_logprobs=False)
    start = time.perf_counter()
    rows, _ = generate_tokens(session._decoder, controls, rows, **options)
    jax.block_until_ready(rows)
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        rows, _ = generate_tokens(session._decoder, controls, rows, **options)
        jax.block_until_ready(rows)
        seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(seconds), min(seconds), max(seconds), compile_seconds


def main() -> None:
    """Print a line for every batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="small", choices=CONFIGS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    config = CONFIGS[args.model]
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; model {args.model}")
    for batch in args.batch:
        speed = bandwidth()
        median, low, high, compile_seconds = step_seconds(config, batch)
        used = decode_bytes(config, batch) / median / speed
        print(
            f"batch {batch:3d}: {1e3 * median:8.2f} ms/step ({1e3 * low:.2f} to {1e3 * high:.2f}), "
            f"{batch / median:7.0f} tokens/s; read {speed / 1e9:.1f} GB/s, fraction {used:.2f}; "
            f"first call {compile_seconds:.1f} s"
        )


if __name__ == "__main__":
    main()
