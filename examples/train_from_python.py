"""Train, evaluate and sample without the command line.

`train` leaves a run folder, as `tvq train` does: `tvq info`, `tvq report` and a later call with
`resume=True` know it. Ctrl-C finishes the update under way, saves and returns.

    python examples/train_from_python.py --steps 200
"""

import argparse

from transformer_vq import ModelConfig, SamplingParams, TrainConfig, evaluate, load, stream, train
from transformer_vq.data import StreamDecoder, bundled_corpus, load_bytes, split


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train from Python.")
    parser.add_argument("--steps", type=int, default=200, help="updates")
    parser.add_argument("--tokens", type=int, default=20_000, help="to evaluate on")
    parser.add_argument("--out", default="runs/from-python", help="folder of the run; must be new")
    options = parser.parse_args(argv)

    tokens = load_bytes(bundled_corpus())  # Moby-Dick, uint8 [N]; any integers [N] will do
    config = ModelConfig.preset("tiny", block_len=128)
    recipe = TrainConfig(
        batch_size=8, sequence_len=512, update_len=256, steps=options.steps, learning_rate=4e-3,
        warmup_steps=20, evaluate_every=100, evaluate_tokens=4096, sample_tokens=0,
    )  # fmt: skip
    result = train(config, recipe, split(tokens, "train"), split(tokens, "validation"), options.out)
    print(f"{result.status} at step {result.step}")
    if result.validation_loss is None:  # after Ctrl-C; `train(..., resume=True)` goes on
        return
    print(f"validation loss {result.validation_loss:.3f}")

    model, tokenizer = load(options.out, "best")
    held_out = evaluate(model, split(tokens, "test"), max_tokens=options.tokens)
    print(f"{held_out.bpb:.3f} bits per byte on {held_out.tokens:,} bytes of the test split\n")

    text, params = StreamDecoder(tokenizer), SamplingParams(max_tokens=200, temperature=0.7)
    for token in stream(model, [tokenizer.encode("The whale")], params):
        print(text.push(token), end="", flush=True)
    print(text.flush())


if __name__ == "__main__":
    main()
