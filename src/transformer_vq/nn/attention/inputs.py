"""What the attention functions take, and what they return."""

from dataclasses import dataclass

import jax

from transformer_vq.nn.attention.state import UnitState
from transformer_vq.types import (
    Codes,
    Codewords,
    HeadBias,
    Keys,
    Outputs,
    PositionBiases,
    Queries,
    Values,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QKV:
    """Queries, keys and values of the T new tokens of each row."""

    q: Queries  # [B, T, H, K]
    k: Keys  # [B, T, G, K]: before they are quantized
    v: Values  # [B, T, G, V]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionWeights:
    """The constants of a unit that attention needs."""

    words: Codewords  # [G, S, K]; full attention makes no use of them
    u: HeadBias  # [H, K]: added to queries for content
    w: HeadBias  # [H, K]: added to queries for position
    r: PositionBiases  # [d, H, K]: d = M + 1; in full attention at least as many as keys are held


@dataclass(frozen=True)
class Attended:
    """What comes out. Outputs at padding are finite and meaningless."""

    out: Outputs  # [B, T, H, V]
    codes: Codes | None  # int32 [B, T, G]: of the new keys; None in full attention
    state: UnitState  # after the `length` real tokens of each row
