"""Linear equals quadratic: `extend` against the plain oracle, in values and in gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.helpers import SINGLE, close, far, make_config, quick_jit, random_inputs, random_model
from tests.nn.cases import MEMORY, STREAM, any_case, run_reference
from transformer_vq import Model, extend, init_state
from transformer_vq.nn import vq
from transformer_vq.nn.embedding import to_logits
from transformer_vq.nn.forward import Training, forward
from transformer_vq.nn.reference import reference_logits

BATCH, LENGTH = 3, 19


CONFIGS = {
    "gated": make_config(window_len=3, block_len=4),
    "decay": make_config(window_len=3, block_len=4, far_decay=5.0),
    "decay_blocks_beyond_the_window": make_config("mqa", window_len=2, block_len=5, far_decay=3.0),
    "decay_no_cache": make_config("mqa", window_len=4, block_len=3, far_decay=7.0, use_cache=False),
    "cap": make_config("mha", window_len=2, block_len=5, far_cap=3),
    "decay_cap_documents": make_config(
        num_heads=2, window_len=1, block_len=4, far_decay=4.0, far_cap=2, reset_at_document=True
    ),
    "forget": make_config(
        window_len=3, block_len=4, forget="gated", forget_horizon=30.0, long_units=1
    ),
    "soft_writes": make_config(window_len=3, block_len=4, soft_writes=True),
    "reach": make_config(window_len=3, block_len=4, reach=6),
    "memory_documents": make_config(
        "mha",
        window_len=2,
        block_len=5,
        far_cap=3,
        reset_at_document=True,
        **MEMORY,
        **STREAM,
    ),
    "memory_reach_soft_writes": make_config(
        "mqa",
        window_len=2,
        block_len=3,
        far_decay=9.0,
        reach=5,
        soft_writes=True,
        reset_at_document=True,
        **MEMORY,
    ),
    "memory_no_cache": make_config("mqa", window_len=4, block_len=3, use_cache=False, **MEMORY),
    "full_memory": make_config(
        "mqa",
        attention="full",
        reset_at_document=True,
        key_shift=True,
        score_gain=True,
        sink=True,
        **STREAM,
    ),
    "two_gated_heads": make_config(
        window_len=5, block_len=3, num_heads=2, tie_embeddings=True, final_norm=False
    ),
    "no_window_single_blocks": make_config(window_len=0, block_len=1),
    "no_window_one_code": make_config("mqa", window_len=0, block_len=6, codebook_size=1),
    "block_beyond_the_text": make_config(window_len=2, block_len=64),
    "no_cache": make_config("mqa", window_len=4, block_len=3, use_cache=False),
    "documents": make_config(window_len=2, block_len=5, reset_at_document=True),
    "documents_positions": make_config(
        "mqa", window_len=3, block_len=4, reset_at_document=True, absolute_positions=True
    ),
    "documents_no_cache": make_config(
        "mha", window_len=6, block_len=4, reset_at_document=True, use_cache=False
    ),
    "window_beyond_the_text": make_config(
        "mha",
        window_len=40,
        block_len=7,
        absolute_positions=True,
        max_wavelength=50.0,
        tie_embeddings=True,
        logit_scale=0.3,
    ),
    "full": make_config("mqa", attention="full", reset_at_document=True, absolute_positions=True),
    "full_gated": make_config(attention="full", num_heads=2),
}
SLOW = (  # what others among these have too
    "documents_positions",
    "forget",
    "no_window_single_blocks",
    "block_beyond_the_text",
    "cap",
    "decay",
    "decay_blocks_beyond_the_window",
    "decay_no_cache",
    "documents",
    "documents_no_cache",
    "full_gated",
    "full_memory",
    "gated",
    "memory_no_cache",
    "no_cache",
    "no_window_one_code",
    "reach",
    "soft_writes",
    "two_gated_heads",
    "window_beyond_the_text",
)


@functools.partial(quick_jit, static_argnums=0)
def run_extend(config, params, codebook, tokens, document_ids, cotangent):
    """The same of `extend`."""
    batch, length = tokens.shape
    capacity = length if config.attention == "full" else None

    def logits(params):
        model = Model(params=params, codebook=codebook, config=config)
        state = init_state(config, batch, capacity=capacity)
        if not config.reach:
            return extend(model, state, tokens, document_ids=document_ids)[0]
        training = Training(jnp.ones(tokens.shape))  # a reach is for gradients, in training alone
        out = forward(model, state, tokens, document_ids=document_ids, training=training)
        return to_logits(model.params, out.features, config)

    value, pull_back = jax.vjp(logits, params)
    return value, pull_back(cotangent)[0]


def check(config, seed=0, batch=BATCH, length=LENGTH):
    model = random_model(config, seed)
    inputs = random_inputs(config, seed, batch, length)
    logits, grads = run_extend(config, model.params, model.codebook, *inputs)
    expected, expected_grads = run_reference(config, model.params, model.codebook, *inputs)
    assert logits.dtype == jnp.float64
    close(logits, expected)
    close(grads, expected_grads)
    return model, inputs, expected, expected_grads


LENGTHS = {"no_window_single_blocks": 11}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CONFIGS]
)
def test_values_and_gradients(name, double):
    config = CONFIGS[name]
    model, inputs, logits, grads = check(config, length=LENGTHS.get(name, LENGTH))
    # Every parameter takes part. (u counts alike for every key where there is one code.)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if not (config.codebook_size == 1 and path[-1].key in ("u", "w_k", "w_q")):
            assert np.abs(grad).max() > 1e-4, path
    # Controls: other codewords, or other position biases for full attention; other documents.
    params, codebook = model.params, model.codebook
    if config.attention == "full" or config.codebook_size == 1 or config.sphere_codewords:
        params = {**params, "units": {**params["units"], "w_r": params["units"]["w_r"] * 1.01}}
    else:
        codebook = {**codebook, "count": codebook["count"] * 1.01}
    other = run_reference(config, params, codebook, *inputs)
    if config.window_len or config.attention == "full":
        far(other[0], logits)
        far(other[1], grads)
    if config.reset_at_document:
        tokens, document_ids, cotangent = inputs
        one = np.zeros_like(document_ids)
        other = run_reference(config, model.params, model.codebook, tokens, one, cotangent)
        far(other[0], logits)


@pytest.mark.parametrize(
    "change",
    [
        dict(window_len=4),
        dict(window_len=2),
        dict(use_cache=False),
        dict(reset_at_document=False),
        dict(attention="full"),
        dict(absolute_positions=False),
        dict(max_wavelength=99_000.0),
        dict(final_norm=False),
        dict(tie_embeddings=True),
        dict(logit_scale=1.001),
    ],
    ids=lambda change: "-".join(change),
)
def test_each_switch_matters(change, double):
    """The oracle of a neighbouring configuration gives something else."""
    config = CONFIGS["documents_positions"]
    model, inputs = random_model(config), random_inputs(config)
    params, (tokens, document_ids, _) = model.params, inputs
    logits, _ = run_reference(config, params, model.codebook, *inputs)
    if "absolute_positions" in change:
        params = {k: v for k, v in params.items() if k != "position_scale"}
    other, _ = reference_logits(
        params, model.codebook, config.replace(**change), tokens, document_ids
    )
    far(other, logits)


def test_chunks_of_blocks(double, monkeypatch):
    """Long inputs go in chunks of blocks, as many as memory allows: here two at a time."""
    config = CONFIGS["documents_positions"].replace(max_wavelength=1000.0)  # compiled anew
    scores = BATCH * config.num_heads * (config.window_len + config.block_len + 5)
    name = "transformer_vq.nn.attention.blocks.SCORES_PER_CHUNK"
    monkeypatch.setattr(name, 2 * scores * config.block_len)
    check(config)


def test_block_len_moves_gradients_only(double):
    """The reach of gradients depends on the blocks; the oracle of other blocks tells."""
    config = CONFIGS["gated"]
    model, inputs = random_model(config), random_inputs(config)
    logits, grads = run_extend(config, model.params, model.codebook, *inputs)
    other = run_reference(config.replace(block_len=7), model.params, model.codebook, *inputs)
    close(logits, other[0])
    far(grads["units"]["w_k"], other[1]["units"]["w_k"])


@pytest.mark.slow
@settings(max_examples=18, suppress_health_check=list(HealthCheck))
@given(any_case())
def test_any_configuration(case):
    with jax.enable_x64(True):
        check(*case)
    jax.clear_caches()


# The reach of gradients, seen from outside.


def test_straight_through_reach(double):
    """A key's gradient comes from queries whose block's window holds it, and from no other.

    Keys are read from features of their own, and move without moving the norm of the features: so
    the logits of query t change with the key of token j only through its score.
    """
    length, window, block = 13, 3, 4
    config = make_config(
        "mha", num_layers=1, num_heads=1, window_len=window, block_len=block, final_norm=False
    )
    model = random_model(config, seed=3)
    units = dict(model.params["units"])
    half = np.arange(config.d_model) < config.d_model // 2
    units["w_k"] = jnp.where(half[:, None], units["w_k"], 0)
    units["w_q"], units["w_v"] = (jnp.where(half[:, None], 0, units[n]) for n in ("w_q", "w_v"))
    units["norm"] = jax.tree.map(jnp.zeros_like, units["norm"])
    units["norm"]["gain"] += 1.0
    embedding = np.array(model.params["embedding"])
    rng = np.random.default_rng(0)
    moves = rng.normal(size=embedding.shape) * half
    keys = embedding * half  # a token's move is orthogonal to it: its norm stays, to first order
    moves -= keys * (moves * keys).sum(1, keepdims=True) / (keys * keys).sum(1, keepdims=True)
    mix = rng.normal(size=config.vocab_size)
    tokens = np.arange(length, dtype=np.int32)[None]

    def outputs(size):
        params = {**model.params, "units": units, "embedding": embedding + size[:, None] * moves}
        moved = Model(params=params, codebook=model.codebook, config=config)
        return extend(moved, init_state(config, 1), tokens)[0][0] @ mix

    gradient = np.abs(quick_jit(jax.jacfwd(outputs))(jnp.zeros(config.vocab_size)))[:, :length]
    t, j = np.arange(length)[:, None], np.arange(length)
    reached = (j < t) & (j >= t // block * block - window)
    assert (gradient[reached] > 1e-8).all()
    assert (gradient[~reached & (j != t)] < 1e-15).all()
    assert ((j < t - window) & reached).any()  # further than the query's own window
    assert ((j < t) & ~reached).any()


@pytest.mark.slow
def test_grad_through_cache_off(double):
    """Values stay; gradients are those of blocks whose past is a constant."""
    config = CONFIGS["documents_positions"]
    off = config.replace(grad_through_cache=False)
    model, (tokens, document_ids, cotangent) = random_model(config), random_inputs(config)
    block = config.block_len
    end = LENGTH // block * block
    cotangent[:, end:] = 0  # the rest is no whole block
    inputs = tokens, document_ids, cotangent
    logits, grads = run_extend(config, model.params, model.codebook, *inputs)
    off_logits, off_grads = run_extend(off, model.params, model.codebook, *inputs)
    close(off_logits, logits)
    far(off_grads["units"]["w_v"], grads["units"]["w_v"])

    def blocks(x):
        return np.moveaxis(x[:, :end].reshape(BATCH, end // block, block, *x.shape[2:]), 1, 0)

    @quick_jit
    def by_blocks(params):
        def logits(params):
            model_ = Model(params=params, codebook=model.codebook, config=config)

            def body(state, xs):
                state = jax.lax.stop_gradient(state)
                logits, state = extend(model_, state, xs[0], document_ids=xs[1])
                return state, logits

            xs = (blocks(tokens), blocks(document_ids))
            return jax.lax.scan(body, init_state(config, BATCH), xs)[1]

        return jax.vjp(logits, params)[1](blocks(cotangent))[0]

    close(off_grads, by_blocks(model.params))


def test_commitment(double):
    """The sum of |k - C_z|^2 and its gradient, for tokens of weight 1."""
    config = make_config("mha", num_layers=1, window_len=3, block_len=4)
    model, (tokens, _, _) = random_model(config), random_inputs(config, length=7)

    def ours(params, codebook):
        model = Model(params=params, codebook=codebook, config=config)
        state, weights = init_state(config, BATCH), jnp.ones(tokens.shape)
        training = Training(weights)
        out = forward(model, state, jnp.asarray(tokens), training=training)
        return out.statistics.commitment

    def oracle(params, codebook):
        return reference_logits(params, codebook, config, tokens)[1]

    value, grads = quick_jit(jax.value_and_grad(ours))(model.params, model.codebook)
    expected, expected_grads = quick_jit(jax.value_and_grad(oracle))(model.params, model.codebook)
    close(value, expected)
    close(grads, expected_grads)
    assert value > 1.0 and np.abs(grads["units"]["w_k"]).max() > 0.1


def test_codeword_of_a_rare_code(double):
    codebook = {"sum": jnp.array([[2.0], [0.002]]), "count": jnp.array([4.0, 0.001])}
    close(vq.codewords(codebook), np.array([[0.5], [0.2]]))


# Other precisions.


def in_double(config):
    """The oracle's logits and gradients, and what they are for, as float64."""
    with jax.enable_x64(True):
        model, inputs = random_model(config), random_inputs(config)
        outputs = run_reference(config, model.params, model.codebook, *inputs)
    single = jax.tree.map(np.float32, (model.params, model.codebook))
    return *single, inputs, jax.tree.map(np.asarray, outputs)


def test_single_precision():
    """The same model in float32: rounding apart, the same logits and gradients."""
    config = CONFIGS["documents_positions"]
    params, codebook, (tokens, document_ids, cotangent), expected = in_double(config)
    actual = run_extend(
        config.replace(**SINGLE), params, codebook, tokens, document_ids, np.float32(cotangent)
    )
    assert actual[0].dtype == jnp.float32
    close(actual[0], expected[0], 2e-5)
    close(actual[1], expected[1], 2e-4)


@pytest.mark.slow
def test_rounded_products():
    """With rounded products near the truth, gradients too; and not as near as in float32. (With one
    code: a key on the edge of two would move more.) One token at a time stays as it is."""
    config = CONFIGS["memory_documents"].replace(codebook_size=1)
    params, codebook, (tokens, document_ids, cotangent), expected = in_double(config)
    rounded = config.replace(**SINGLE, products="bfloat16")
    inputs = params, codebook, tokens, document_ids
    actual = run_extend(rounded, *inputs, np.float32(cotangent))
    assert actual[0].dtype == jnp.float32
    for mine, true in zip(actual[:2], expected[:2], strict=True):
        close(mine, true, 0.1)
        with pytest.raises(AssertionError):
            close(mine, true, 5e-4)
    one = np.asarray(tokens)[:, :1]
    steps = [
        jax.jit(extend)(
            Model(params=params, codebook=codebook, config=c), init_state(c, BATCH), one
        )
        for c in (rounded, rounded.replace(products="float32"))
    ]
    np.testing.assert_array_equal(steps[0][0], steps[1][0])


def test_bfloat16():
    """Near the truth for this seed. (A key on the edge of two codes may move a logit by more.)"""
    config = CONFIGS["documents_positions"]
    params, codebook, (tokens, document_ids, _), expected = in_double(config)
    half = config.replace(param_dtype="float32", compute_dtype="bfloat16", state_dtype="bfloat16")
    model = Model(params=params, codebook=codebook, config=half)
    logits, state = jax.jit(extend)(
        model, init_state(half, BATCH), tokens, document_ids=document_ids
    )
    assert logits.dtype == jnp.float32
    assert state.units[0].values.dtype == jnp.bfloat16
    assert 1e-3 < np.abs(logits - expected[0]).max() < 0.1


def test_counts_are_exact_in_bfloat16():
    """bfloat16 cannot count past 256: 600 keys of one code, in one block and one by one."""
    config = make_config("mqa", window_len=3, block_len=512, num_layers=1)
    config = config.replace(
        param_dtype="bfloat16", compute_dtype="bfloat16", state_dtype="bfloat16"
    )
    model = random_model(config)
    step = jax.jit(extend)
    state = init_state(config, 1)
    many = 600
    _, state = step(model, state, np.full((1, many), 7, np.int32))
    total = many
    for _ in range(9):
        _, state = step(model, state, np.full((1, 1), 7, np.int32))
        total += 1
        counts = np.array([unit.counts[0, 0] for unit in state.units])
        assert (counts.sum(1) == total - config.ring_len).all()
        assert counts[0].max() == total - config.ring_len  # in the first unit, all of one code
    # Their mean is the value of each.
    values = np.float32(state.units[0].values[0, 0])
    mean = values[config.ring_len + counts[0].argmax()]
    np.testing.assert_allclose(mean, values[0], rtol=0.02)
