"""Bytes of state and time per token do not grow with the text.

A small model, untrained, reads random tokens. At each position of the table it decodes some more.
The bytes are equal from the first row to the last; the times differ by what else the machine does.

    python examples/million_tokens.py                       # 16,384 tokens, under a minute
    python examples/million_tokens.py --tokens 1000000      # minutes on a CPU
"""

import argparse
import time

import jax
import numpy as np

from transformer_vq import ModelConfig, SamplingParams, extend, generate, init_model, init_state

PIECE = 1024  # tokens that are read at once: a program of one shape serves any length


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A long text in constant memory.")
    parser.add_argument("--tokens", type=int, default=16_384, help="to read, in all")
    parser.add_argument("--preset", default="tiny", help="size of the model")
    options = parser.parse_args(argv)

    config = ModelConfig.preset(options.preset)
    model = init_model(config, 0)
    state = init_state(config, batch_size=1)
    random = np.random.default_rng(0)
    params = SamplingParams(max_tokens=32)

    print("position   bytes of state   ms per token")
    position, show_at = 0, PIECE
    while position < options.tokens:
        tokens = random.integers(0, config.vocab_size, (1, PIECE))
        _, state = extend(model, state, tokens)
        position += PIECE
        if position >= show_at or position >= options.tokens:
            show_at *= 4
            size = sum(array.nbytes for array in jax.tree.leaves(state))
            generate(model, [[]], params, state)  # the first call compiles
            start = time.perf_counter()
            generate(model, [[]], params, state)  # `state` itself stays as it is
            milliseconds = (time.perf_counter() - start) / params.max_tokens * 1e3
            print(f"{position:8,}   {size:14,}   {milliseconds:12.2f}", flush=True)


if __name__ == "__main__":
    main()
