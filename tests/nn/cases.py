"""Small models of every kind whose state differs, and of random kinds; the oracle on them."""

import functools

import jax
import numpy as np
from hypothesis import strategies as st

from tests.helpers import make_config, quick_jit
from transformer_vq import init_state
from transformer_vq.nn.reference import reference_logits

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


@functools.partial(quick_jit, static_argnums=0)
def run_reference(config, params, codebook, tokens, document_ids, cotangent):
    def logits(params):
        return reference_logits(params, codebook, config, tokens, document_ids)[0]

    value, pull_back = jax.vjp(logits, params)
    return value, pull_back(cotangent)[0]


@st.composite
def any_case(draw):
    head_type = draw(st.sampled_from(["shga", "mqa", "mha"]))
    fields = dict(
        num_heads=draw(st.integers(1, 3)),
        d_k=draw(st.integers(1, 5)),
        d_v=draw(st.integers(1, 5)),
        codebook_size=draw(st.integers(1, 7)),
        window_len=draw(st.integers(0, 20)),
        block_len=draw(st.integers(1, 20)),
        attention=draw(st.sampled_from(["vq", "vq", "vq", "full"])),
        max_wavelength=draw(st.sampled_from([10.0, 1e5])),
        logit_scale=draw(st.sampled_from([0.01, 1.0])),
        logit_cap=draw(st.sampled_from([0.0, 0.0, 2.0])),
    )
    for name in (
        "use_cache",
        "reset_at_document",
        "absolute_positions",
        "tie_embeddings",
        "final_norm",
        "key_shift",
        "score_gain",
        "sink",
        "embedding_shortcut",
    ):
        fields[name] = draw(st.booleans())
    if fields["attention"] == "vq":
        fields |= dict(
            forget=draw(st.sampled_from(["none", "constant", "gated"])),
            forget_horizon=draw(st.sampled_from([3.0, 50.0])),
            long_units=draw(st.integers(0, 1)),
            far_decay=draw(st.sampled_from([0.0, 0.0, 0.3, 10.0])),
            far_cap=draw(st.sampled_from([0, 0, 2, 20])),
            reach=draw(st.sampled_from([0, 0, 5, 40])),
            sphere_codewords=draw(st.booleans()),
            soft_writes=draw(st.booleans()),
        )
    config = make_config(head_type, **fields)
    return config, draw(st.integers(0, 99)), draw(st.integers(1, 3)), draw(st.integers(2, 40))
