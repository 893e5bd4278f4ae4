"""Read a prompt once, keep its state on disk, and continue it in several ways.

A state is all that a model remembers of a text: always the same number of bytes. One row of it
serves any number of requests, each with parameters and a seed of its own.

    python examples/fork_a_state.py --run runs/demo --tokens 60
"""

import argparse
from pathlib import Path

import numpy as np

from transformer_vq import (
    SamplingParams,
    extend,
    generate,
    init_state,
    load,
    load_state,
    save_state,
)

PROMPT = "CHAPTER 136. "


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fork a state.")
    parser.add_argument("--run", default="runs/demo", help="folder of a trained run")
    parser.add_argument("--state", type=Path, default=Path("prompt.state"), help="file to write")
    parser.add_argument("--tokens", type=int, default=60, help="to write in each way")
    options = parser.parse_args(argv)

    model, tokenizer = load(options.run)
    _, state = extend(model, init_state(model.config, 1), np.array([tokenizer.encode(PROMPT)]))
    save_state(options.state, state, model)
    print(f"{options.state}: {options.state.stat().st_size:,} bytes, whatever the prompt's length")

    # Later, or elsewhere: the prompt is not read again. The file is refused for another model.
    state = load_state(options.state, model)
    ways = [
        SamplingParams(max_tokens=options.tokens, temperature=temperature, seed=seed)
        for temperature, seed in [(0.5, 0), (0.8, 0), (0.8, 1)]
    ]
    outputs = generate(model, [[]] * len(ways), ways, state)
    for way, output in zip(ways, outputs, strict=True):
        print(f"\ntemperature {way.temperature}, seed {way.seed}")
        print(PROMPT + tokenizer.decode_text(output))


if __name__ == "__main__":
    main()
