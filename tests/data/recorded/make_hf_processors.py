"""What Hugging Face's logits processors make of random logits, for test_hugging_face.py.

    python tests/data/recorded/make_hf_processors.py    # needs torch, transformers

A case is what someone would give to `GenerationConfig`. The processors and their order are those
that `generate` of Hugging Face chooses for it.
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("hf_processors.npz")
ROWS, VOCAB, PROMPT = 16, 50, 6
STOPS = [3, 41]  # tokens that end a text

CASES = [
    *({"temperature": value} for value in (0.1, 0.7, 3.0)),
    *({"top_k": value} for value in (1, 3, 20)),
    *({"top_p": value} for value in (0.2, 0.5, 0.9, 0.999)),
    *({"min_p": value} for value in (1e-3, 0.05, 0.5)),
    *({"typical_p": value} for value in (0.1, 0.3, 0.6, 0.8)),
    *({"repetition_penalty": value} for value in (0.7, 1.3)),
    {"sequence_bias": [[0, 2.5], [7, -3.0], [49, 0.25]]},
    {"suppress_tokens": [0, 7, 11]},
    {"bad_words_ids": [1, 8]},
    {"allowed_tokens": [2, 3, 5, 8, 13, 21, 34]},  # prefix_allowed_tokens_fn, the same in each row
    {"min_new_tokens": 3},
    # Several at once: their order counts.
    {"temperature": 0.6, "top_k": 12, "top_p": 0.9},
    {"temperature": 1.7, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.7},
    {"repetition_penalty": 1.5, "sequence_bias": [[4, 1.5], [9, -1.0]], "temperature": 0.8},
    {"top_k": 25, "top_p": 0.7, "typical_p": 0.9, "suppress_tokens": [5, 6], "min_new_tokens": 2},
]


def record(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Logits `[rows, VOCAB]`, the tokens before them, and the logits after each of `CASES`.

    Row r has `generated[r]` tokens behind its prompt; -1 is behind the last of `tokens`.
    """
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    generated = np.arange(rows) % 5
    tokens = rng.integers(0, VOCAB, (rows, PROMPT + generated.max()))
    tokens[np.arange(tokens.shape[1]) >= PROMPT + generated[:, None]] = -1
    logits = rng.normal(0, 2, (rows, VOCAB)).astype(np.float32)
    outputs = np.zeros((len(CASES), rows, VOCAB), np.float32)
    for output, case in zip(outputs, CASES, strict=True):
        process = _processors(case)
        for row in range(rows):
            before = torch.from_numpy(tokens[row : row + 1, : PROMPT + generated[row]])
            output[row] = process(before, torch.from_numpy(logits[row : row + 1])).numpy()[0]
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "logits": logits,
        "tokens": tokens.astype(np.int16),
        "generated": generated.astype(np.int16),
        "outputs": outputs,
        "cases": np.array(json.dumps(CASES)),
        "made_with": np.array(json.dumps(made_with)),
    }


def _processors(case: dict):
    """The processors that `generate` chooses, in its order."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation import GenerationMixin

    class Model(GenerationMixin):
        class config:
            is_encoder_decoder = False

    given = dict(case)
    allowed = given.pop("allowed_tokens", None)
    if "sequence_bias" in given:
        given["sequence_bias"] = {(token,): value for token, value in given["sequence_bias"]}
    if "bad_words_ids" in given:
        given["bad_words_ids"] = [[token] for token in given["bad_words_ids"]]
    # What `generate` fills in where nothing is given.
    usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_beams": 1, "do_sample": True}
    config = GenerationConfig(**{**usual, **given})
    config._eos_token_tensor = torch.tensor(STOPS)
    return Model()._get_logits_processor(
        config,
        input_ids_seq_length=PROMPT,
        prefix_allowed_tokens_fn=None if allowed is None else lambda *_: allowed,
        device="cpu",
    )


if __name__ == "__main__":
    np.savez_compressed(FILE, **record(ROWS, 0))
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes, {len(CASES)} cases")
