"""What rounding the weights of a run costs, in bits per byte: measured once, kept in weights.json.

{"int8": {"step": 5000, "seconds": 3120.5, "bpb": 1.412, "rounded_bpb": 1.4127, "tokens": 4096}}
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transformer_vq.atomic import write_whole
from transformer_vq.errors import UserError
from transformer_vq.nn.model import Model
from transformer_vq.nn.products import Weights
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.run.folder import RunInfo

FILE = "weights.json"
MOST = 0.01  # bits per byte that rounding may cost
TOKENS = 4096  # of a text that it is measured on, where nobody has done so before


@dataclass(frozen=True)
class Cost:
    """Bits per byte of one text, by the weights as saved and rounded."""

    step: int
    seconds: float  # of training, which tell this checkpoint from that of another run
    bpb: float
    rounded_bpb: float
    tokens: int

    @property
    def difference(self) -> float:
        return self.rounded_bpb - self.bpb

    @property
    def is_small(self) -> bool:
        return self.difference <= MOST  # which not-a-number is not


def measure_cost(model: Model, rounded: Model, info: RunInfo, text: Any) -> Cost:
    """What rounding costs on the first tokens of a text (`evaluate` says what that can be)."""
    length = info.context_limit
    limits: dict[str, Any] = {}
    if length is not None:
        limits = dict(chunk_len=length, context_len=length)
    found = [evaluate(m, text, max_tokens=TOKENS, **limits) for m in (model, rounded)]
    return Cost(info.step, info.seconds, found[0].bpb, found[1].bpb, found[0].tokens)


def load_cost(folder: Path, info: RunInfo, weights: Weights) -> Cost | None:
    """What is kept of this checkpoint; None: nothing, or nothing that can be read."""
    try:
        cost = Cost(**_content(folder)[weights])
        known = np.isfinite([cost.bpb, cost.rounded_bpb]).all()
    except (KeyError, TypeError):
        return None
    return cost if known and (cost.step, cost.seconds) == (info.step, info.seconds) else None


def save_cost(folder: Path, weights: Weights, cost: Cost) -> bool:
    """Keep it, if the folder can be written to; whether it could."""
    content = {**_content(folder), weights: asdict(cost)}
    try:
        write_whole(folder / FILE, (json.dumps(content, indent=2) + "\n").encode(), shared=True)
    except OSError:
        return False
    return True


def require_small(cost: Cost, weights: Weights) -> None:
    """Raise `UserError` if rounding costs too much."""
    if not cost.is_small:
        instead = "--weights bfloat16, or the weights as saved" * (weights == "int8")
        raise UserError(
            f"{weights} weights cost {cost.difference:.4f} bits per byte ({cost.tokens:,} tokens "
            f"were scored), and at most {MOST} is allowed: use {instead or 'the weights as saved'}"
        )


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
