"""What each part brings: `python benchmarks/ablation.py --data enwik8.gz [--steps 150 --seeds 1]`.

Models of equal size see the same batches in the same order; only what a row names differs. Prints
a markdown table: bits per byte of held-out text in windows of the training length, each from an
empty state, and with the whole history; how many codewords are in use at the end. Float32.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from transformer_vq import ModelConfig, TrainConfig
from transformer_vq.costs import parameter_count
from transformer_vq.data import Batches, load_bytes, split
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.train import (
    init_train_state,
    make_train_step,
    start_codebook,
    trained_model,
)

CONFIG = ModelConfig(
    d_model=128, d_k=64, num_layers=2, codebook_size=128, block_len=64, window_len=64
)
TRAIN = TrainConfig(batch_size=4, sequence_len=1024, learning_rate=4e-3, warmup_steps=30)
MUON = dict(optimizer="muon", schedule="linear", final_learning_rate=0.0)
STREAM = dict(zero_outputs=True, embedding_shortcut=True, logit_cap=15.0)
KEYS = dict(key_shift=True, score_gain=True)
GATE = dict(forget="gated")
# The fields and the recipe of the preset `tiny`; the momentum rises sooner, since runs are short.
PRESET = STREAM | KEYS | GATE | dict(long_units=1, forget_horizon=1024.0)
RECIPE = MUON | dict(codebook_init="data", revive_below=0.1, momentum_warmup_steps=100)
VARIANTS = {  # model, recipe
    "VQ, first codebook random": ({}, {"codebook_init": "random"}),
    "VQ, first codebook from data": ({}, {"codebook_init": "data"}),
    "random, revival below 0.1": ({}, {"codebook_init": "random", "revive_below": 0.1}),
    "from data, revival below 0.1": ({}, {"codebook_init": "data", "revive_below": 0.1}),
    "VQ without the cache": ({"use_cache": False}, {"codebook_init": "random"}),
    "full attention": ({"attention": "full"}, {}),
    "Muon": ({}, MUON),
    "Muon, zero outputs, shortcut, logit cap": (STREAM, MUON),
    "Muon, the three and key shift, gain": (STREAM | KEYS, MUON),
    "Muon, the three and a gate": (STREAM | GATE, MUON),
    "Muon, all": (STREAM | KEYS | GATE, MUON),
    "Muon, all, its momentum rising": (
        STREAM | KEYS | GATE,
        MUON | {"momentum_warmup_steps": 100},
    ),
    "Muon, all without the cache": (STREAM | KEYS | GATE | {"use_cache": False}, MUON),
    "preset": (PRESET, RECIPE),
    "preset without zero outputs": (PRESET | {"zero_outputs": False}, RECIPE),
    "preset without embedding shortcut": (PRESET | {"embedding_shortcut": False}, RECIPE),
    "preset without logit cap": (PRESET | {"logit_cap": 0.0}, RECIPE),
    "preset without key shift": (PRESET | {"key_shift": False}, RECIPE),
    "preset without gain": (PRESET | {"score_gain": False}, RECIPE),
    "preset, codebook random, no revival": (
        PRESET,
        RECIPE | {"codebook_init": "random", "revive_below": 0.0},
    ),
    "preset, momentum constant": (PRESET, RECIPE | {"momentum_warmup_steps": 0}),
    "preset with AdamW": (PRESET, RECIPE | {"optimizer": "adamw"}),
}


def measure(config: ModelConfig, train: TrainConfig, text: np.ndarray, held_out: np.ndarray):
    """Bits per byte in windows and with the whole history; codewords used, perplexity; tokens/s."""
    batches = Batches(
        text, batch_size=train.batch_size, sequence_len=train.sequence_len, seed=train.seed
    )
    state = jax.jit(init_train_state, static_argnums=(0, 1))(config, train)
    if config.attention == "vq" and train.codebook_init == "data":
        state = jax.jit(start_codebook, static_argnums=(0, 1))(
            config, train, state, batches.batch(0)
        )
    step = make_train_step(config, train).lower(state, batches.batch(0)).compile()
    start = time.perf_counter()
    for i in range(train.steps):
        state, metrics = step(state, batches.batch(i))
    jax.block_until_ready(state)
    speed = train.steps * train.batch_size * train.sequence_len / (time.perf_counter() - start)
    model = trained_model(state, config)
    window = dict(chunk_len=train.sequence_len, context_len=train.sequence_len)
    windows = evaluate(model, held_out, **window).bpb
    whole = evaluate(model, held_out).bpb if config.attention == "vq" else None
    used, perplexity = (metrics.get(f"codebook_{name}") for name in ("used", "perplexity"))
    return windows, whole, used, perplexity, speed


def main() -> None:
    """Print the table, a line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=50_000)
    parser.add_argument("--only", nargs="*", default=[], help="part of the name of a variant")
    args = parser.parse_args()
    tokens = load_bytes(args.data)[: int(args.megabytes * 1e6)]
    text, held_out = split(tokens, "train"), split(tokens, "validation")[: args.held_out]
    print(f"{CONFIG}\n{dataclasses.replace(TRAIN, steps=args.steps)}\n")
    print(
        "| | parameters | bpb, windows | bpb, whole history | codes used | perplexity | tokens/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (model_changes, changes) in VARIANTS.items():
        if args.only and not any(part in name for part in args.only):
            continue
        config = CONFIG.replace(**model_changes)
        runs = [
            measure(
                config,
                dataclasses.replace(TRAIN, steps=args.steps, seed=seed, **changes),
                text,
                held_out,
            )
            for seed in range(args.seeds)
        ]

        def cell(i: int, form: str, runs: list = runs) -> str:
            values = [run[i] for run in runs]
            if values[0] is None:
                return "-"
            return " / ".join(format(float(v), form) for v in values)

        speed = statistics.median(run[4] for run in runs)
        print(
            f"| {name} | {parameter_count(config):,} | {cell(0, '.4f')} | {cell(1, '.4f')} | "
            f"{cell(2, '.0%')} | {cell(3, '.0f')} | {speed:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
