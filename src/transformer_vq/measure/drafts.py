"""What drafts bring and cost: decoding with and without them, in turns in one process."""

import statistics
import time
from itertools import islice
from typing import Any

import numpy as np

from transformer_vq.config import ModelConfig
from transformer_vq.engine.batch import Session
from transformer_vq.engine.request import SamplingParams
from transformer_vq.nn.model import init_model
from transformer_vq.nn.products import Weights
from transformer_vq.nn.weights import round_weights

TOKENS = 128  # of each row in a turn
TEXTS = ("noise", "repeats")  # what no draft can guess; what every draft can


def bench_drafts(
    config: ModelConfig, batch: int, *, text: str, rounds: int = 6, weights: Weights = "as-saved"
) -> dict[str, Any]:
    """Tokens a second of plain decoding and of decoding with drafts, and how many guesses were
    right. Guesses are looked up in the row's own text.

    `text`: "noise" is what an untrained model writes at temperature 1, where drafts can only cost;
    "repeats" what it writes greedily after a prompt that repeats itself. `ratio` is how many times
    as fast decoding is with drafts, the median of the turns; `ratio_of_all` that of all turns
    together, trials of drafts that did not pay included.
    """
    model = round_weights(init_model(config, 0), weights)
    some = np.random.default_rng(0).integers(0, config.vocab_size, (batch, 16))
    prompts = np.tile(some, 8)

    def params(count: int, temperature: float) -> list[SamplingParams]:
        return [
            SamplingParams(max_tokens=count, temperature=temperature, seed=row)
            for row in range(batch)
        ]

    sessions = []
    for draft in (False, True):
        # Greedily, so that drafts of all sizes are compiled here, and not while the clock runs.
        list(Session(model, prompts, params(2 * TOKENS, 0.0), draft=draft))
        wanted = params(rounds * TOKENS, 1.0 if text == "noise" else 0.0)
        sessions.append(Session(model, prompts, wanted, draft=draft))
        sessions[-1].read_prompts()
    seconds, tokens = ([], []), ([], [])
    for _ in range(rounds):
        for took, written, session in zip(seconds, tokens, sessions, strict=True):
            began = time.perf_counter()
            written += [(t.row, int(t)) for t in islice(session, batch * TOKENS)]
            took.append(time.perf_counter() - began)
    ratios = [plain / drafted for plain, drafted in zip(*seconds, strict=True)]
    guessed, right = sessions[1].drafted
    speeds = (batch * TOKENS / statistics.median(took) for took in seconds)
    return {
        "batch": batch,
        "text": text,
        "weights": weights,
        "tokens_per_second": next(speeds),
        "drafted_tokens_per_second": next(speeds),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "ratio_of_all": sum(seconds[0]) / sum(seconds[1]),
        "guessed": guessed,
        "right": right,
        "same": _by_row(tokens[0], batch) == _by_row(tokens[1], batch),
    }


def _by_row(tokens: list[tuple[int, int]], batch: int) -> list[list[int]]:
    """The tokens of each row: rows of a session with drafts are not at one length in between."""
    rows: list[list[int]] = [[] for _ in range(batch)]
    for row, token in tokens:
        rows[row].append(token)
    return rows
