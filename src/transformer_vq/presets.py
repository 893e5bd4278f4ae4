"""Published presets, as plain values: `ModelConfig.preset` and `TrainConfig.preset` read them."""

from typing import Any

# The models of the paper (appendix, tables of hyperparameters) and two for small machines.
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
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(d_model=128, d_k=32, num_layers=2, codebook_size=64, block_len=64, window_len=64),
    "small": dict(d_model=256, d_k=64, num_layers=4, codebook_size=256),
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
    "tiny": {},
    "small": dict(sequence_len=2048, update_len=1024, steps=5000, warmup_steps=200),
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
