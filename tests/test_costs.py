"""What a model costs, beside the arrays that it has."""

import jax
import pytest

from transformer_vq import costs
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.nn.decode import prepare
from transformer_vq.nn.model import init_model, init_state
from transformer_vq.presets import PRESETS

VARIANTS = [
    *(ModelConfig.preset(name) for name in PRESETS),
    *(
        ModelConfig(head_type=kind, d_model=64, d_k=16, num_layers=3, **switches)
        for kind in ("shga", "mqa", "mha")
        for switches in (
            {},
            {"tie_embeddings": True, "absolute_positions": True, "final_norm": False},
            {"attention": "full", "state_dtype": "bfloat16"},
        )
    ),
    ModelConfig(d_model=64, num_heads=2, d_v=48),
    ModelConfig(d_model=64, num_heads=2, forget="constant", sink=True, score_gain=True),
    ModelConfig(d_model=64, attention="full", key_shift=True, embedding_shortcut=True),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_counts_are_those_of_the_arrays(config):
    model = jax.eval_shape(lambda: init_model(config, 0))
    leaves = jax.eval_shape(lambda: jax.tree.leaves(init_state(config, 1)))
    assert costs.parameter_count(config) == sum(x.size for x in jax.tree.leaves(model.params))
    assert costs.codebook_count(config) == sum(x.size for x in jax.tree.leaves(model.codebook))
    assert costs.state_bytes(config) == sum(x.size * x.dtype.itemsize for x in leaves)


def test_a_forward_pass_is_a_third_of_training():
    """And logits of every token, which a prompt has not, are 2 D vocab operations."""
    for config in VARIANTS:
        forward = costs.forward_flops(config, 100)
        assert 3 * forward == costs.train_flops(config, 100)
        logits = 2 * config.d_model * config.vocab_size
        assert forward - costs.prompt_flops(config, 100) == logits


def test_costs_of_attention():
    """Full attention costs more with the length; at the length of our columns, about as much. With
    one block it computes the whole matrix, with n of them n (n + 1) / 2 of n n parts."""
    config = ModelConfig.preset("small")
    columns = config.window_len + config.block_len + config.codebook_size
    full = costs.full_attention_train_flops
    whole = config.replace(block_len=10**6)
    ours = costs.train_flops(config)
    assert 0.8 < ours / full(whole, columns) < 1.2
    assert full(config, 32 * columns) > 5 * ours
    length = 4 * config.block_len
    rest = 2 * full(whole, length) - full(whole, 2 * length)  # what does not depend on the length
    assert (full(config, length) - rest) / (full(whole, length) - rest) == pytest.approx(10 / 16)
    # An odd length: 3 blocks of 4 for 9 tokens, so 6 pairs of 16.
    odd = (full(config.replace(block_len=4), 9) - rest) / (full(whole, 9) - rest)
    assert odd == pytest.approx(6 * 16 / 81, rel=1e-3)  # operations are whole
    # In parts of a sequence, full attention looks back over all of it; VQ's cost is the part's.
    parts = TrainConfig(sequence_len=32 * columns, update_len=columns)
    of_all = full(config, 32 * columns)
    assert costs.run_flops(config.replace(attention="full"), parts) == of_all
    assert costs.run_flops(config, parts) == ours < of_all
    one, two = costs.decode_bytes(config, 1), costs.decode_bytes(config, 2)
    assert two - one == costs.state_bytes(config) + 4 * config.d_model
    assert costs.decode_flops(config) > 2 * costs.parameter_count(config) * 0.8


@pytest.mark.parametrize("config", VARIANTS[len(PRESETS) :])  # presets take long to trace
def test_what_an_engine_has(config):
    """Beside the arrays of a `Device`: the model, its decoder, rows with what penalties count."""

    def arrays():
        model, state = init_model(config, 0), init_state(config, 1)
        decoder = prepare(model, state)
        prepared = (decoder.units, decoder.params.get("w_out"))
        return [jax.tree.leaves(tree) for tree in ((model.params, model.codebook), prepared, state)]

    sizes = [sum(x.size * x.dtype.itemsize for x in leaves) for leaves in jax.eval_shape(arrays)]
    expected = sizes[0] + sizes[1] + 5 * (sizes[2] + 9 * config.vocab_size)
    assert costs.serving_bytes(config, 3) == pytest.approx(expected, rel=0.05)


def test_slots_that_fit():
    config = ModelConfig(d_model=64, attention="full")
    for limit in (100, 1000):
        memory = costs.serving_bytes(config, 7, limit)
        assert costs.slots_that_fit(config, memory, limit) == 7
        assert costs.slots_that_fit(config, memory - 1, limit) == 6
    assert costs.slots_that_fit(config, 1000) == 0
