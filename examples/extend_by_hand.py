"""Read, score and write with nothing but `extend`.

`extend(model, state, tokens)` gives logits of what follows every token, and the state after them.
A prompt is one call; what it cost and what comes next are in the logits; a token more is a call
with one token. `score` and `generate` do the same, faster and with all controls.

    python examples/extend_by_hand.py --run runs/demo --prompt "The whale" --tokens 80
"""

import argparse

import jax
import numpy as np

from transformer_vq import extend, init_state, load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Read, score and write with `extend`.")
    parser.add_argument("--run", default="runs/demo", help="folder of a trained run")
    parser.add_argument("--prompt", default="The whale")
    parser.add_argument("--tokens", type=int, default=80, help="to write")
    options = parser.parse_args(argv)

    model, tokenizer = load(options.run)
    prompt = np.array([tokenizer.encode(options.prompt)])  # [B, T], here one row

    # Read: logits [B, T, vocab_size], of which logits[:, t] predicts token t + 1.
    state = init_state(model.config, batch_size=1)
    logits, state = extend(model, state, prompt)

    # Score: the log-probability of each token of the prompt but the first.
    logprobs = jax.nn.log_softmax(logits[0, :-1])
    nats = -logprobs[np.arange(prompt.shape[1] - 1), prompt[0, 1:]].sum()
    print(f"the prompt: {nats:.2f} nats after its first token")

    # Write: always the likeliest token. The state holds the prediction of what comes next.
    written: list[int] = []
    for _ in range(options.tokens):
        token = int(state.logits[0].argmax())
        written.append(token)
        _, state = extend(model, state, np.array([[token]]))
    print(options.prompt + tokenizer.decode_text(written))


if __name__ == "__main__":
    main()
