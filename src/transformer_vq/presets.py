"""Presets, as plain values: `ModelConfig.preset` and `TrainConfig.preset` read them.

Those of the paper are as published. Ours have a memory that fades, and what helped in a short run
(docs/results.md): most units by what the token says, the last ones over as many tokens as there are
in a sequence of training.
"""

from typing import Any

# What ours have and the paper's have not.
_OURS = dict(
    forget="gated",
    key_shift=True,
    score_gain=True,
    zero_outputs=True,
    embedding_shortcut=True,
    logit_cap=15.0,
)


def _long(units: int, horizon: int) -> dict[str, Any]:
    """So many units that forget over so many tokens, and no unit over more."""
    return dict(long_units=units, forget_horizon=float(horizon))


# The models of the paper: appendix, tables of hyperparameters.
_PAPER = dict(
    d_k=128,
    num_layers=24,
    codebook_size=512,
    block_len=512,
    window_len=512,
    commit_coefficient=1e-4,
    codebook_decay=0.99,
    compute_dtype="bfloat16",
)
_WIDE = dict(d_k=128, codebook_size=512, block_len=512, window_len=512)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        **_OURS,
        **_long(1, 1024),
        d_model=128,
        d_k=32,
        num_layers=2,
        codebook_size=64,
        block_len=64,
        window_len=64,
    ),
    "small": dict(**_OURS, **_long(2, 2048), d_model=256, d_k=64, num_layers=4, codebook_size=256),
    "10m": dict(**_OURS, **_long(2, 2048), d_model=384, d_k=64, num_layers=5, codebook_size=256),
    "50m": dict(**_OURS, **_long(4, 4096), d_model=640, num_layers=9, **_WIDE),
    "180m": dict(
        **_OURS, **_long(8, 8192), d_model=768, num_layers=24, **_WIDE, compute_dtype="bfloat16"
    ),
    "enwik8": dict(
        **_PAPER,
        vocab_size=256,
        d_model=768,
        final_norm=False,
        dropout_sinusoid=0.2,
        dropout_residual=0.5,
        dropout_layer=0.3,
    ),
    "pg19": dict(
        **_PAPER,
        vocab_size=32_000,
        d_model=2048,
        tie_embeddings=True,
        logit_scale=0.005,
        dropout_sinusoid=0.1,
        dropout_residual=0.1,
        dropout_layer=0.1,
    ),
    "imagenet64": dict(
        **_PAPER,
        vocab_size=256,
        d_model=2048,
        absolute_positions=True,
        tie_embeddings=True,
        logit_scale=0.005,
        dropout_sinusoid=0.1,
    ),
}

# How they are trained, in the same order (docs/training.md says what is of the paper).
_OURS_TRAIN = dict(
    optimizer="muon",
    momentum_warmup_steps=300,
    learning_rate=4e-3,
    schedule="linear",
    final_learning_rate=0.0,
    codebook_init="data",
    revive_below=0.1,
)
_PAPER_TRAIN = dict(
    batch_size=128,
    warmup_steps=10_000,
    log_every=100,
    evaluate_every=1000,
    checkpoint_every=1000,
    keep_checkpoints=5,
)
_PAPER_ADAFACTOR = dict(
    **_PAPER_TRAIN,
    optimizer="adafactor",
    learning_rate=0.01,
    steps=500_000,
    weight_decay=0.0,
    grad_clip=0.0,
)
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _OURS_TRAIN,
    "small": dict(**_OURS_TRAIN, sequence_len=2048, update_len=1024, steps=5000, warmup_steps=200),
    "10m": dict(**_OURS_TRAIN, batch_size=16, sequence_len=2048, steps=10_000, warmup_steps=200),
    "50m": dict(
        **{**_OURS_TRAIN, "learning_rate": 2e-3},
        batch_size=32,
        sequence_len=4096,
        steps=20_000,
        warmup_steps=500,
    ),
    "180m": dict(
        **{**_OURS_TRAIN, "learning_rate": 1e-3},
        batch_size=64,
        sequence_len=8192,
        update_len=4096,
        steps=30_000,
        warmup_steps=1000,
    ),
    "enwik8": dict(
        **_PAPER_TRAIN,
        sequence_len=8192,
        update_len=2048,
        steps=125_000,
        learning_rate=4e-4,
        weight_decay=2e-4,
        grad_clip=0.1,
    ),
    "pg19": dict(**_PAPER_ADAFACTOR, sequence_len=8192, update_len=2048),
    "imagenet64": dict(**_PAPER_ADAFACTOR, sequence_len=12_288, update_len=1536),
}
