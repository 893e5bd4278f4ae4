"""What the attention functions take, hand on, and return."""

from dataclasses import dataclass

import jax

from transformer_vq.nn.attention.state import UnitState
from transformer_vq.types import (
    Codes,
    Codewords,
    Fades,
    HeadBias,
    HeadScore,
    Keys,
    Outputs,
    PositionBiases,
    Queries,
    TimedCodes,
    TimedFades,
    TimedKeys,
    TimedValues,
    Values,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QKV:
    """Queries, keys and values of the T new tokens of each row."""

    q: Queries  # [B, T, H, K]
    k: Keys  # [B, T, G, K]: before they are quantized
    v: Values  # [B, T, G, V]
    fades: Fades | None = None  # [B, T, G], in wide: what a token adds to the scores of older keys,
    # below 0; 0 at padding. None: keys do not fade


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionWeights:
    """The constants of a unit that attention needs."""

    words: Codewords  # [G, S, K]; full attention makes no use of them
    u: HeadBias  # [H, K]: added to queries for content
    w: HeadBias  # [H, K]: added to queries for position
    r: PositionBiases  # [d, H, K]: d = M + 1; in full attention at least as many as keys are held
    sink: HeadScore | None = None  # [H], in wide: score of nothing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """Keys that are seen one by one, in the order of time: of the ring, the window, or new."""

    codes: TimedCodes  # int32 [B, G, j]
    keys: TimedKeys  # [B, G, j, K]: quantized
    values: TimedValues  # [B, G, j, V]
    fades: TimedFades | None  # [B, G, j], in wide: of the token of each key; None: none fade


@dataclass(frozen=True)
class Attended:
    """What comes out. Outputs at padding are finite and meaningless."""

    out: Outputs  # [B, T, H, V]
    codes: Codes | None  # int32 [B, T, G]: of the new keys; None in full attention
    state: UnitState  # after the `length` real tokens of each row
