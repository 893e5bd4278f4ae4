"""Tokens that come from no file: documents, a vocabulary, bits per token.

Here a document is a walk of small steps round a ring of 32 notes. Training, evaluation and
sampling know of data only what a `Source` says: its tokens, where documents begin, and how many
bytes they stand for. The model sees nothing of earlier documents (`reset_at_document`).

    python examples/your_own_source.py --steps 100
"""

import argparse
import math

import numpy as np

from transformer_vq import ModelConfig, SamplingParams, TrainConfig, evaluate, generate, load, train
from transformer_vq.data import Source

NOTES, END = 32, 0  # a document begins with END, which also ends the one before
STEPS = (-2, -1, 1, 2)


def walks(count: int, length: int) -> Source:
    """`count` documents of END and `length` notes, from 1 to 31."""
    random = np.random.default_rng(0)
    start = random.integers(0, NOTES - 1, (count, 1))
    notes = (start + random.choice(STEPS, (count, length)).cumsum(axis=1)) % (NOTES - 1) + 1
    tokens = np.concatenate([np.full((count, 1), END), notes], axis=1)
    starts = np.arange(count, dtype=np.int64) * (length + 1)
    return Source(tokens.astype(np.uint8).ravel(), starts, num_bytes=tokens.size)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train on tokens of your own.")
    parser.add_argument("--steps", type=int, default=100, help="updates")
    parser.add_argument("--out", default="runs/walks", help="folder of the run; must be new")
    options = parser.parse_args(argv)

    config = ModelConfig(
        vocab_size=NOTES, d_model=64, d_k=32, num_layers=1, codebook_size=32, block_len=32,
        window_len=32, reset_at_document=True,
    )  # fmt: skip
    recipe = TrainConfig(
        batch_size=8, sequence_len=64, steps=options.steps, learning_rate=4e-3, warmup_steps=10,
        evaluate_every=options.steps, checkpoint_every=options.steps,
    )  # fmt: skip
    train(config, recipe, walks(400, 50), None, options.out)

    model, _ = load(options.out)
    bits = evaluate(model, walks(8, 50), chunk_len=64).loss / math.log(2)
    print(f"{bits:.2f} bits per token; a step of four has {math.log2(len(STEPS)):.2f}")
    output = generate(model, [[END]], SamplingParams(max_tokens=20, stop=[END]))[0]
    print("a walk:", *output)


if __name__ == "__main__":
    main()
