"""Models and states: of any key, of constant structure; and what does not fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SINGLE, make_config, quick_jit, random_model
from tests.nn.cases import BATCH, CAPACITY, CASES, fresh, same_bits
from transformer_vq import extend, init_model, init_state
from transformer_vq.nn.layers import wide_dtype

GATED, FULL = (CASES[name].replace(**SINGLE) for name in ("gated", "full_documents"))
SINGLES = (("float32", None), ("bfloat16", "float32"))


def types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_state_is_constant(name, x64):
    """Structure, shapes and dtypes, whatever is consumed and in whatever precision."""
    config = CASES[name]
    capacity = CAPACITY if config.attention == "full" else None

    def check(config, state_dtype):
        """Traced, not run."""
        state = init_state(config, BATCH, state_dtype, capacity=capacity)
        assert state.logits.dtype == wide_dtype(config.compute_dtype)
        assert state.units[0].values.dtype == (state_dtype or "bfloat16")
        model = init_model(config, 0)
        for size in (1, 20):
            tokens = jnp.zeros((BATCH, size), jnp.int32)
            for more in ({}, {"lengths": tokens[:, 0]}, {"document_ids": tokens}):
                logits, after = extend(model, state, tokens, **more)
                assert types(after) == types(state)
                assert logits.shape == (BATCH, size, config.vocab_size)
                assert logits.dtype == state.logits.dtype

    with jax.enable_x64(x64):
        for dtype, state_dtype in (("float64", "float64"),) if x64 else SINGLES:
            params = dtype if x64 else "float32"
            changed = config.replace(
                compute_dtype=dtype, param_dtype=params, state_dtype="bfloat16"
            )
            jax.eval_shape(lambda c=changed, d=state_dtype: check(c, d))


def test_state_size_does_not_grow():
    """A vq state is as large as its window and codebook."""
    config = CASES["gated_heads_documents"].replace(**SINGLE)
    unit = init_state(config, BATCH).units[0]
    lead, slots = (BATCH, 2), config.window_len + 1
    assert unit.codes.shape == (*lead, slots)
    assert unit.counts.shape == (*lead, config.codebook_size)
    assert unit.values.shape == (*lead, config.table_rows, config.d_v)
    assert config.table_rows % 8 == 0 and config.table_rows - slots - config.codebook_size in range(
        8
    )
    unit = init_state(FULL, BATCH).units[0]
    assert unit.keys.shape[2] == 4096


def test_any_key_makes_a_model():
    config = make_config("mqa", codebook_size=30, absolute_positions=True).replace(**SINGLE)
    key = jax.random.key(7)
    raw = jax.random.key_data(key)
    model = quick_jit(lambda: init_model(config, key))()

    @quick_jit
    def embeddings():
        return [init_model(config, k).params["embedding"] for k in (raw, np.asarray(raw), 7, 8)]

    *same, other = embeddings()
    for embedding in same:
        same_bits(embedding, model.params["embedding"])
    assert (other != model.params["embedding"]).all()
    drawn = 0
    for path, x in jax.tree_util.tree_leaves_with_path(model):
        name = path[-1].key
        assert x.dtype == jnp.float32
        if name.startswith("w_") or name in ("embedding", "sum"):
            drawn += 1
            size = {"embedding": 1.0, "sum": config.d_k**-0.25}.get(name, x.shape[-2] ** -0.5)
            assert 0.8 < np.std(x) / size < 1.2
        else:
            assert (x == (1.0 if name in ("gain", "count") else 0.0)).all()
    assert drawn == 10


def test_gradient_through_single_tokens():
    """A token at a time can be differentiated, too (traced, not run)."""
    for name in ("gated", "memory_documents", "mha_no_cache_documents", "full_documents"):
        config = CASES[name].replace(**SINGLE)

        def loss(params, config=config):
            model = init_model(config, 0)
            model, tokens = dataclasses.replace(model, params=params), np.ones((BATCH, 1), np.int32)
            _, state = extend(model, fresh(config), tokens, document_ids=tokens)
            return extend(model, state, tokens, document_ids=tokens)[0].sum()

        params = jax.eval_shape(lambda c=config: init_model(c, 0)).params
        grads = jax.eval_shape(jax.grad(loss), params)
        assert jax.tree.structure(grads) == jax.tree.structure(params), name


# Errors.


def call(config=GATED, batch=2, tokens=((1, 2, 3), (4, 5, 6)), state=None, **more):
    model = random_model(config)
    more = {name: np.array(value) for name, value in more.items()}
    return extend(model, state or fresh(config, batch), np.array(tokens), **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tokens=[[1, 2], [3, 13]]), "token 13 .* from 0 to 12"),
        (dict(tokens=[[1, 2], [-1, 3]]), "token -1 .* from 0 to 12"),
        (dict(tokens=[[1, 2**32 + 1], [1, 3]]), "token 4294967297 .* from 0 to 12"),
        (dict(tokens=[1, 2]), r"tokens have shape \(2,\).* 2 rows"),
        (dict(tokens=[[1, 2]] * 3), r"tokens have shape \(3, 2\).* 2 rows"),
        (dict(tokens=np.zeros((2, 0), int)), r"tokens have shape \(2, 0\).* T at least 1"),
        (dict(tokens=[[1.0], [2.0]]), "tokens are float.*whole numbers"),
        (dict(tokens=[[True], [False]]), "tokens are bool.*whole numbers"),
        (dict(lengths=[1, 4]), "length is 4: .* from 0 to 3"),
        (dict(lengths=[-1, 2]), "length is -1: .* from 0 to 3"),
        (dict(lengths=[1, 2, 3]), r"lengths have shape \(3,\): it must be \(2,\)"),
        (dict(lengths=3), r"lengths have shape \(\): it must be \(2,\)"),
        (dict(lengths=[1.5, 2.0]), "lengths are float.*whole numbers"),
        (dict(document_ids=[[0, 0, 0]]), r"document_ids have shape \(1, 3\).* \(2, 3\)"),
        (dict(document_ids=[[0, 0, 1], [0, 2, 1]]), "document_ids fall in row 1: along a row they"),
        (dict(document_ids=[[0.5] * 3] * 2), "document_ids are float.*whole numbers"),
        (dict(config=FULL, tokens=np.zeros((2, 25), int)), "would reach 25 tokens.* holds 24"),
    ],
)
def test_misfits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        dict(vocab_size=14),
        dict(num_layers=2),
        dict(window_len=2),
        dict(window_len=5),
        dict(codebook_size=6),
        dict(window_len=5, codebook_size=4),
        dict(d_v=5),
        dict(num_heads=2),
        dict(attention="full"),
    ],
    ids=lambda change: "-".join(change),
)
@pytest.mark.parametrize("size", [1, 3])
def test_state_of_another_model_is_refused(change, size):
    state = fresh(GATED.replace(**change), 2)
    with pytest.raises(ValueError, match="state is of another model"):
        call(state=state, tokens=np.ones((2, size), int))
    if "attention" in change:
        with pytest.raises(ValueError, match="state is of another model"):
            call(GATED.replace(**change), state=fresh(GATED, 2), tokens=np.ones((2, size), int))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=0), "batch_size is 0: it must be at least 1"),
        (dict(batch_size=-2), "batch_size is -2: it must be at least 1"),
        (dict(batch_size=1, capacity=5), "capacity is for attention"),
        (dict(config=FULL, batch_size=1, capacity=0), "capacity is 0: it must be at least 1"),
        (dict(batch_size=1, room=0), "room is 0: it must be at least 1"),
        (dict(config=FULL, batch_size=1, room=2, capacity=3), "capacity is 3 and room is 2"),
    ],
)
def test_init_state_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        init_state(**{"config": GATED, **arguments})


def test_room_is_a_capacity_where_there_is_one():
    full = [init_state(FULL, 1, **given) for given in (dict(room=7), dict(capacity=7), {})]
    assert [state.capacity for state in full] == [7, 7, 4096]
    vq = [init_state(GATED, 1, **given) for given in (dict(room=7), {})]
    assert [state.capacity for state in vq] == [None, None]
    shapes = [[x.shape for x in jax.tree.leaves(state)] for state in vq]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", ["shga", "mqa"])
def test_where_what_is_around_attention_starts(kind):
    """A fresh model with zero outputs adds nothing; gains give a match the score of `d_k` 128."""
    new = dict(zero_outputs=True, score_gain=True, embedding_shortcut=True)
    config = make_config(kind, **new, **SINGLE)
    units = init_model(config, 0).params["units"]
    outputs = [units["w_o"], *([units["mlp"]["w_out"]] if kind == "mqa" else [])]
    assert not any(x.any() for x in outputs)
    assert init_model(config.replace(zero_outputs=False), 0).params["units"]["w_o"].all()
    np.testing.assert_allclose(units["score_gain"] ** 2 * config.d_k, 128, rtol=1e-6)
    assert (units["shortcut"] == np.array([1.0, 0.0])).all()
