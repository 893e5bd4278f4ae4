"""Drafts beside plain decoding: `python benchmarks/draft.py [--run runs/book] [--draft DIR]`.

Two sessions of the same requests, one with drafts and one without, go on in turns in one process.
With `--run` the model is that of a run, which writes prose at `--temperature`; with
`--repeat` it goes on from a prompt that repeats itself, greedily. Without a run the model has the
sizes of `--preset` and is untrained: greedily, it soon repeats itself. Prints a row of a markdown
table: tokens a second of both, the ratio of their times (median of the turns; of all of them
together, trials of other sizes included), the same by processor time, which other programs on the
machine disturb less, how many guesses were right, and the first token that differs, if rounding
has decided one.
"""

import argparse
import statistics
import time
from dataclasses import replace
from itertools import islice

import jax
import numpy as np

from transformer_vq import Model, ModelConfig, SamplingParams, init_model, load
from transformer_vq.data import bundled_corpus, load_bytes
from transformer_vq.engine.batch import Session
from transformer_vq.engine.pace import SIZES


def main() -> None:
    """Print the head of a table and a row."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", help="folder of a trained run on bytes")
    parser.add_argument("--draft", help="folder of a run that guesses; else the text itself does")
    parser.add_argument("--preset", default="enwik8", help="sizes of the model without a run")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the preset has")
    parser.add_argument(
        "--deeper",
        type=int,
        default=0,
        help="so many times as many layers more, which do nothing",
    )
    parser.add_argument("--repeat", action="store_true", help="the prompt repeats itself")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="of each row in a turn")
    args = parser.parse_args()
    print(
        "| text | batch | plain, tokens/s | with drafts | ratio of each turn | of all | of "
        "processor time | right | first that differs |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print(row(args))


def row(args: argparse.Namespace) -> str:
    """Measure: a row of the table."""
    book = np.asarray(load_bytes(bundled_corpus()))
    repeat = args.repeat or not args.run
    if args.run:
        model = deeper(load(args.run)[0], args.deeper)
    else:
        layers = {"num_layers": args.layers} if args.layers else {}
        config = ModelConfig.preset(args.preset, compute_dtype="float32", **layers)
        model = init_model(config, 0)
    guide = load(args.draft)[0] if args.draft else True
    starts = [200_000 + 10_000 * i for i in range(args.batch)]
    prompts = [
        book[s : s + 48].tolist() * 8 if repeat else book[s : s + 600].tolist() for s in starts
    ]
    total = args.turns * args.tokens
    temperature = 0.0 if repeat else args.temperature
    params = [
        SamplingParams(max_tokens=total, temperature=temperature, seed=i) for i in range(args.batch)
    ]
    compile_all(model, prompts, params, guide)
    sessions = {draft: Session(model, prompts, params, draft=draft) for draft in (False, guide)}
    tokens: list[list[list[int]]] = [[[] for _ in prompts] for _ in sessions]
    wall, processor = [[], []], [[], []]
    for session in sessions.values():
        session.read_prompts()
    for _ in range(args.turns):
        for which, session in enumerate(sessions.values()):
            began, used = time.perf_counter(), time.process_time()
            for token in islice(session, args.batch * args.tokens):
                tokens[which][token.row].append(int(token))
            wall[which].append(time.perf_counter() - began)
            processor[which].append(time.process_time() - used)
    plain, drafted = (statistics.median(s) for s in wall)
    ratios = [a / b for a, b in zip(*wall, strict=True)]
    guessed, right = sessions[guide].drafted
    text = "repeats itself" if repeat else f"prose at {args.temperature}"
    speeds = [args.batch * args.tokens / s for s in (plain, drafted)]
    return (
        f"| {text} | {args.batch} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{sum(wall[0]) / sum(wall[1]):.2f} | {sum(processor[0]) / sum(processor[1]):.2f} | "
        f"{right:,} of {guessed:,} ({right / max(1, guessed):.0%}) | {first_difference(*tokens)} |"
    )


def deeper(model: Model, times: int) -> Model:
    """The model with its layers so many times more, their outputs 0: it writes the same, but a step
    costs what one of a larger model does."""
    units = model.params["units"]
    idle = {**units, "w_o": np.zeros_like(units["w_o"])}
    if "shortcut" in units:
        idle["shortcut"] = np.tile(np.array([1, 0], np.float32), (len(units["shortcut"]), 1))
    params, codebook = (
        jax.tree.map(lambda a, b: np.concatenate([a, *[b] * times]), own, more)
        for own, more in ((units, idle), (model.codebook, model.codebook))
    )
    layers = model.config.num_layers * (1 + times)
    return Model(
        {**model.params, "units": params}, codebook, model.config.replace(num_layers=layers)
    )


def compile_all(model, prompts, params, guide) -> None:
    """All programs, so that none is compiled while the clock runs: a round of each size, and what a
    guide reads after some tokens without it."""
    turns = [(1, 1), *((size, 1) for size in SIZES[1:]), (1, 5), (SIZES[1], 1), (1, 40)]
    short = [replace(p, max_tokens=120) for p in params]
    for draft in (False, guide):
        session = Session(model, prompts, short, draft=draft)
        if session._slots.drafts is not None:
            left = iter(turns)
            session._slots.drafts.pace.choose = lambda steps, left=left: next(left, (SIZES[1], 1))
        list(session)


def first_difference(plain: list[list[int]], drafted: list[list[int]]) -> str:
    """Where the two first wrote another token, and how many they wrote."""
    compared = 0
    for a, b in zip(plain, drafted, strict=True):
        length = min(len(a), len(b))
        for i in range(length):
            if a[i] != b[i]:
                return f"{i + 1:,} of a row"
        compared += length
    return f"none of {compared:,}"


if __name__ == "__main__":
    main()
