"""Attention over a window of quantized keys and a cache of codes, exact and in linear time.

A softmax over all past keys splits in two (docs/mathematics.md): keys at distance up to M each
have a score of their own; older keys score by their code alone, so all keys of code s count as one
key with score `(q + u) . C_s + log n_s` and value the mean of theirs. The state holds just that:

- a ring of W = M + 1 slots (slot = position mod W) with the code and value of the newest keys;
- for each code, the count and mean value of the keys that have left the ring.

`attend_blocks` takes many tokens at once, `attend_step` one per row, `attend_few` a few of which
only the first may stay (`commit_few`); all mean the same.
`attend_full` is the quadratic baseline.
"""

from transformer_vq.nn.attention.blocks import attend_blocks
from transformer_vq.nn.attention.blockwise import SAVED
from transformer_vq.nn.attention.few import NewKeys, attend_few, commit_few
from transformer_vq.nn.attention.full import (
    NewFullKeys,
    attend_full,
    attend_full_few,
    commit_full,
)
from transformer_vq.nn.attention.inputs import QKV, Attended, AttentionWeights
from transformer_vq.nn.attention.state import (
    AttentionState,
    FullAttentionState,
    UnitState,
    init_attention_state,
    init_full_state,
    keep_keys,
    window_keys,
)
from transformer_vq.nn.attention.step import attend_step
from transformer_vq.nn.timeline import Timeline

__all__ = [
    "QKV",
    "SAVED",
    "Attended",
    "AttentionState",
    "AttentionWeights",
    "FullAttentionState",
    "NewFullKeys",
    "NewKeys",
    "Timeline",
    "UnitState",
    "attend_blocks",
    "attend_few",
    "attend_full",
    "attend_full_few",
    "attend_step",
    "commit_few",
    "commit_full",
    "init_attention_state",
    "init_full_state",
    "keep_keys",
    "window_keys",
]
