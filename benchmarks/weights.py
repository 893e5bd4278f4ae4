"""Decoding with rounded weights beside the weights as saved: `python benchmarks/weights.py`.

Sessions of one model, with its weights as saved, in bfloat16 and in int8, go on in turns in one
process. The model has the sizes of `--preset` and is untrained. Prints a row of a markdown table
for each: milliseconds of a step (median of the turns), and how many times as fast as the weights as
saved, the median of the ratios of each turn, by wall-clock and by processor time.
"""

import argparse
import statistics
import time
from itertools import islice

from transformer_vq import ModelConfig, SamplingParams, init_model
from transformer_vq.engine.batch import STEPS_PER_DISPATCH, Session
from transformer_vq.nn.weights import round_weights


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="enwik8", help="sizes of the model")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the preset has")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=12, help="of 32 tokens of each row")
    args = parser.parse_args()
    layers = {"num_layers": args.layers} if args.layers else {}
    config = ModelConfig.preset(args.preset, compute_dtype="float32", **layers)
    model, a_turn = init_model(config, 0), STEPS_PER_DISPATCH * args.batch
    params = SamplingParams(max_tokens=STEPS_PER_DISPATCH * (args.turns + 1), top_p=0.9)
    kinds = ("as-saved", "bfloat16", "int8")
    sessions = {
        kind: Session(round_weights(model, kind), [[0]] * args.batch, params) for kind in kinds
    }
    for session in sessions.values():
        list(islice(session, a_turn))  # compiles
    took = {kind: ([], []) for kind in kinds}
    for _ in range(args.turns):
        for kind, session in sessions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            list(islice(session, a_turn))
            took[kind][0].append(time.perf_counter() - wall)
            took[kind][1].append(time.process_time() - cpu)
    print(
        "| weights | batch | ms/step | times as fast | by processor time |\n|---|---|---|---|---|"
    )
    for kind, times in took.items():
        ratios = (
            statistics.median(a / b for a, b in zip(plain, mine, strict=True))
            for plain, mine in zip(took["as-saved"], times, strict=True)
        )
        step = 1e3 * statistics.median(times[0]) / STEPS_PER_DISPATCH
        print("|", kind, "|", args.batch, f"| {step:.2f} |", *(f"{r:.2f} |" for r in ratios))


if __name__ == "__main__":
    main()
