"""Small models of every kind whose state differs, and their fresh states."""

import jax
import numpy as np

from tests.helpers import make_config
from transformer_vq import init_state

BATCH, LENGTH = 3, 21
CAPACITY = LENGTH + 3

MEMORY = dict(  # all that has to do with memory, but its bounds and the gradients of far keys
    forget="gated",
    forget_horizon=30.0,
    long_units=1,
    key_shift=True,
    score_gain=True,
    sink=True,
    sphere_codewords=True,
)
STREAM = dict(embedding_shortcut=True, logit_cap=2.0)  # on the way in, and out
CASES = {
    "gated": make_config(window_len=4, block_len=3, absolute_positions=True),
    "gated_heads_documents": make_config(
        num_heads=2, window_len=5, block_len=4, reset_at_document=True, absolute_positions=True
    ),
    "mqa_no_window": make_config(
        "mqa", window_len=0, block_len=5, logit_scale=0.3, tie_embeddings=True
    ),
    "mha_no_cache_documents": make_config(
        "mha", window_len=4, block_len=5, use_cache=False, reset_at_document=True
    ),
    "decay_cap_documents": make_config(
        num_heads=2, window_len=3, block_len=4, far_decay=6.0, far_cap=4, reset_at_document=True
    ),
    "memory_documents": make_config(
        "mqa",
        window_len=3,
        block_len=4,
        reset_at_document=True,
        **MEMORY,
        **STREAM,
    ),
    "full_documents": make_config(
        "mqa",
        attention="full",
        reset_at_document=True,
        absolute_positions=True,
        key_shift=True,
        sink=True,
    ),
}


def fresh(config, batch=BATCH):
    return init_state(config, batch, capacity=CAPACITY if config.attention == "full" else None)


def same_bits(actual, expected):
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
