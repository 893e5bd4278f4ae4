"""`extend`: one meaning of a sequence, causality, documents, constant states, clear errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import close, far, make_config, random_inputs, random_model

from transformer_vq import Model, extend, init_model, init_state

BATCH, LENGTH = 3, 27
SIZES = (1, 2, 5, 9)  # of the pieces that a text is cut into: few, each is compiled
CAPACITY = 30

CASES = {
    "gated": make_config(window_len=3, block_len=4, absolute_positions=True),
    "gated_heads_documents": make_config(
        num_heads=2, window_len=5, block_len=3, reset_at_document=True, absolute_positions=True
    ),
    "mqa_no_window": make_config("mqa", window_len=0, block_len=2),
    "mha_no_cache_documents": make_config(
        "mha", window_len=4, block_len=5, use_cache=False, reset_at_document=True
    ),
    "full_documents": make_config(
        "mqa", attention="full", reset_at_document=True, absolute_positions=True
    ),
}
WITH_DOCUMENTS = [name for name, config in CASES.items() if config.reset_at_document]

step = jax.jit(extend)  # compiled once for each configuration, batch size and number of tokens


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def fresh(config, batch=BATCH):
    return init_state(config, batch, capacity=CAPACITY if config.attention == "full" else None)


def consume(model, state, tokens, document_ids, pieces, noise=0):
    """Logits and state after `pieces`, each of them `(size, lengths)`; each row goes on where its
    last piece ended. Padding is noise. Logits of what was not consumed are 0."""
    rng = np.random.default_rng(noise)
    batch = len(tokens)
    rows, used = np.arange(batch), np.zeros(batch, int)
    total = np.sum([lengths for _, lengths in pieces], axis=0).max()
    logits = np.zeros((batch, total, model.config.vocab_size), state.logits.dtype)
    for size, lengths in pieces:
        piece = rng.integers(0, model.config.vocab_size, (batch, size)).astype(np.int32)
        ids = rng.integers(0, 99, (batch, size)).astype(np.int32)
        for b, n in enumerate(lengths):
            piece[b, :n] = tokens[b, used[b] : used[b] + n]
            ids[b, :n] = document_ids[b, used[b] : used[b] + n]
        new, state = step(
            model, state, piece, lengths=np.array(lengths, np.int32), document_ids=ids
        )
        for b, n in enumerate(lengths):
            logits[b, used[b] : used[b] + n] = new[b, :n]
        used = used + lengths
        past = used > 0
        close(state.logits[past], logits[rows, used - 1][past])
        np.testing.assert_array_equal(state.logits[~past], 0.0)
    return logits, state


def cut(lengths, sizes):
    """Pieces of these sizes, again and again, until each row has its length."""
    left, pieces = np.array(lengths), []
    while left.any():
        size = sizes[len(pieces) % len(sizes)]
        pieces.append((size, np.minimum(size, left)))
        left = left - pieces[-1][1]
    return pieces


@functools.cache
def whole(name):
    """A model, a text, and what `extend` makes of the text in one call."""
    model = random_model(CASES[name])
    tokens, document_ids, _ = random_inputs(CASES[name], length=LENGTH)
    pieces = [(LENGTH, [LENGTH] * BATCH)]
    logits, state = consume(model, fresh(CASES[name]), tokens, document_ids, pieces)
    return model, tokens, document_ids, logits, state


def same_bits(actual, expected):
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


# One meaning of a sequence.


@st.composite
def even_pieces(draw):
    """All rows get as many tokens."""
    left, pieces = LENGTH, []
    while left:
        size = draw(st.sampled_from([size for size in SIZES if size <= left]))
        pieces.append((size, [size] * BATCH))
        left -= size
    return pieces


@st.composite
def ragged_pieces(draw):
    """Each row gets as many tokens as it gets: often none."""
    left, pieces = np.full(BATCH, LENGTH), []
    for _ in range(draw(st.integers(0, 8))):
        size = draw(st.sampled_from(SIZES))
        lengths = [draw(st.integers(0, min(size, n))) for n in left.tolist()]
        pieces.append((size, lengths))
        left -= lengths
    return pieces + cut(left, [9])


@pytest.mark.parametrize("name", CASES)
def test_any_split(name, double):
    """Logits and the final state, tensor by tensor, are those of one call."""

    @settings(max_examples=6)
    @given(even_pieces() | ragged_pieces())
    def check(pieces):
        model, tokens, document_ids, logits, state = whole(name)
        actual = consume(model, fresh(model.config), tokens, document_ids, pieces)
        close(actual, (logits, state))

    check()
    # Always: token by token, and control: an earlier token changes what follows, and the state.
    model, tokens, document_ids, logits, state = whole(name)
    pieces = [(1, [1] * BATCH)] * LENGTH
    close(consume(model, fresh(model.config), tokens, document_ids, pieces), (logits, state))
    other = tokens.copy()
    other[:, -3] = (other[:, -3] + 1) % model.config.vocab_size
    document_ids = document_ids[:, :1] * np.ones_like(document_ids)
    actual = consume(model, fresh(model.config), other, document_ids, [(LENGTH, [LENGTH] * BATCH)])
    far(actual[0][:, -2:], logits[:, -2:])
    far(actual[1].units, state.units)


@pytest.mark.parametrize("block_len", [1, 7, 64])
@pytest.mark.parametrize("name", ["gated_heads_documents", "mqa_no_window"])
def test_block_len_changes_nothing(name, block_len, double):
    model, tokens, document_ids, logits, state = whole(name)
    config = model.config.replace(block_len=block_len)
    other = dataclasses.replace(model, config=config)
    pieces = [(LENGTH, [LENGTH, 20, 0])]
    actual, actual_state = consume(other, fresh(config), tokens, document_ids, pieces)
    _, expected_state = consume(model, fresh(config), tokens, document_ids, pieces)
    close((actual[0], actual[1, :20]), (logits[0], logits[1, :20]))
    close(actual_state, expected_state)


@pytest.mark.parametrize("name", ["gated", "gated_heads_documents"])
def test_a_row_is_alone(name, double):
    """A row of a batch of ragged rows equals the row by itself."""
    model, tokens, document_ids, _, _ = whole(name)
    pieces = [(9, [0, 5, 9]), (1, [1, 0, 1]), (9, [9, 2, 0]), (1, [1, 1, 1]), (9, [4, 9, 9])]
    logits, state = consume(model, fresh(model.config), tokens, document_ids, pieces)
    for b in range(BATCH):
        own = [(size, [lengths[b]]) for size, lengths in pieces if lengths[b]]
        total = sum(n for _, [n] in own)
        row = slice(b, b + 1)
        alone, alone_state = consume(
            model, fresh(model.config, 1), tokens[row], document_ids[row], own
        )
        close(logits[row, :total], alone)
        close(jax.tree.map(lambda x, row=row: x[row], state), alone_state)


@pytest.mark.parametrize("name", CASES)
def test_batch_position_is_nothing(name, double):
    """Rows in another order: the same bits, in another order."""
    model, tokens, document_ids, _, _ = whole(name)
    pieces = [(9, [9, 3, 0]), (1, [1, 1, 1]), (1, [1, 0, 1]), (9, [1, 9, 9])]
    expected = consume(model, fresh(model.config), tokens, document_ids, pieces)
    order = [2, 0, 1]
    moved = [(size, [lengths[b] for b in order]) for size, lengths in pieces]
    actual = consume(model, fresh(model.config), tokens[order], document_ids[order], moved)
    same_bits(actual, jax.tree.map(lambda x: x[np.array(order)], expected))


@pytest.mark.parametrize("name", CASES)
def test_padding_is_nothing(name, double):
    """Other tokens and documents in the padding: the same bits of logits and state."""
    model, tokens, document_ids, _, _ = whole(name)
    pieces = [(9, [9, 3, 0]), (1, [0, 1, 1]), (9, [0, 9, 4]), (1, [1, 0, 0])]
    expected = consume(model, fresh(model.config), tokens, document_ids, pieces)
    actual = consume(model, fresh(model.config), tokens, document_ids, pieces, noise=1)
    same_bits(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_length_0_keep_their_state(name, double):
    """Bit for bit: after a document has just begun with a single token, too."""
    model, tokens, document_ids, _, _ = whole(name)
    document_ids = np.repeat(np.array([[0] * 17 + [1] * 10], np.int32), BATCH, axis=0)
    state = fresh(model.config)
    for pieces in cut([17, 17, 17], [9]), cut([1, 1, 1], [1]), cut([9, 9, 9], [9]):
        for size, lengths in ((9, [0, 4, 0]), (1, [0, 1, 0]), (9, [0, 0, 0])):
            _, after = consume(
                model, state, tokens, document_ids + 1, [(size, lengths)], noise=size
            )
            for b, n in enumerate(lengths):
                if n == 0:
                    same_bits(*(jax.tree.map(lambda x, b=b: x[b], s) for s in (after, state)))
                else:  # control
                    with pytest.raises(AssertionError):
                        same_bits(after.position[b], state.position[b])
        used = int(state.position[0])
        _, state = consume(model, state, tokens[:, used:], document_ids[:, used:], pieces)


@pytest.mark.parametrize("tokens", [[[3, 1]], np.array([[3, 1]], np.uint8), np.array([[3, 1]])])
def test_tokens_of_any_integer_type(tokens):
    config = CASES["gated"]
    with jax.enable_x64(True):
        model = random_model(config)
        expected = jax.jit(lambda s: extend(model, s, np.array([[3, 1]], np.int32)))
        actual = jax.jit(lambda s: extend(model, s, tokens, lengths=[2], document_ids=[[0, 0]]))
        close(actual(fresh(config, 1)), expected(fresh(config, 1)))


# Documents.

SPLITS = [[LENGTH], [9], [5, 1, 1, 2, 1], [1]]


@pytest.mark.parametrize("name", WITH_DOCUMENTS)
def test_an_earlier_document_is_nothing(name, double):
    """Edits before a document change no bit in it, however the text is cut."""
    model, tokens, _, _, _ = whole(name)
    config = model.config
    starts = np.array([[16], [9], [10]])
    t = np.arange(LENGTH)
    document_ids = ((t >= 4).astype(int) + (t >= starts)).astype(np.int32)  # three documents
    mine = t >= starts
    other = np.where(mine, tokens, (tokens + 1 + t % 5) % config.vocab_size).astype(np.int32)
    lengths = [LENGTH] * BATCH
    for sizes in SPLITS:
        pieces = cut(lengths, sizes)
        logits, state = consume(model, fresh(config), tokens, document_ids, pieces)
        actual, actual_state = consume(model, fresh(config), other, document_ids, pieces)
        same_bits(actual[mine], logits[mine])
        far(actual[~mine], logits[~mine])
        if config.attention == "vq":  # the documents are longer than the window
            same_bits(actual_state, state)
    # Control: without documents the edits are felt.
    off = config.replace(reset_at_document=False)
    for config_ in (off, config):
        model_ = dataclasses.replace(model, config=config_)
        ids = document_ids if config_ is off else np.zeros_like(document_ids)
        pieces = cut(lengths, [LENGTH])
        logits, _ = consume(model_, fresh(config_), tokens, ids, pieces)
        actual, _ = consume(model_, fresh(config_), other, ids, pieces)
        last = mine if config.use_cache else mine & (t < starts + 4)
        assert (np.abs(actual - logits).max(-1)[last] > 1e-9).all()


@pytest.mark.parametrize("name", WITH_DOCUMENTS)
def test_a_packed_document_is_the_document(name, double):
    """A document after others equals the document alone: logits, and what the state says of it."""
    model, tokens, _, _, _ = whole(name)
    config = model.config
    starts, ends = np.array([4, 10, 7]), np.array([LENGTH, LENGTH - 3, LENGTH - 9])
    t = np.arange(LENGTH)
    document_ids = ((t >= 2).astype(int) + 2 * (t >= starts[:, None])).astype(np.int32)
    sizes = ends - starts
    own = np.stack([np.roll(row, -start) for row, start in zip(tokens, starts, strict=True)])
    alone, alone_state = consume(model, fresh(config), own, np.zeros_like(own), cut(sizes, [9]))
    for pieces in (cut(ends, split) for split in SPLITS):
        packed, state = consume(model, fresh(config), tokens, document_ids, pieces)
        for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
            close(packed[b, start:end], alone[b, : end - start])
        close(state.logits, alone_state.logits)
        np.testing.assert_array_equal(state.position, ends)
        np.testing.assert_array_equal(state.document_start, starts)
        np.testing.assert_array_equal(state.document_id, 3)
        for unit, alone_unit in zip(state.units, alone_state.units, strict=True):
            for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
                packed_row, alone_row = (
                    jax.tree.map(lambda x, b=b: np.asarray(x[b]), u) for u in (unit, alone_unit)
                )
                close(*seen(packed_row, alone_row, start, end - start, config))


def seen(packed, alone, start, size, config):
    """Of one row of two states: what they hold of the last `size` tokens; the first began after
    `start` others."""
    if config.attention == "full":
        return tuple(
            (row.keys[:, at : at + size], row.values[:, at : at + size])
            for row, at in ((packed, start), (alone, 0))
        )
    ring = config.ring_len
    positions = np.arange(size - ring, size)  # each of the document: it is longer than the window
    assert positions[0] >= 0
    return tuple(
        (
            row.codes[:, (positions + at) % ring],
            row.counts,
            row.values[:, (positions + at) % ring],
            row.values[:, ring:],
        )
        for row, at in ((packed, start), (alone, 0))
    )


def test_document_ids_carry_on(double):
    """Without ids, tokens belong to the document of the state; with the same id too."""
    name = "gated_heads_documents"
    model, tokens, document_ids, _, _ = whole(name)
    state = whole(name)[-1]
    ids = np.repeat(np.asarray(state.document_id, np.int32)[:, None], 5, axis=1)
    full = np.full(BATCH, 5, np.int32)
    expected = step(model, state, tokens[:, :5], lengths=full, document_ids=ids)
    close(step(model, state, tokens[:, :5], lengths=full), expected)
    other = step(model, state, tokens[:, :5], lengths=full, document_ids=ids + 1)
    far(other[0], expected[0])
    np.testing.assert_array_equal(other[1].document_start, LENGTH)


# Causality, by gradient.

CAUSAL = {
    "gated": make_config(num_heads=2, window_len=2, block_len=3, absolute_positions=True),
    "no_cache": make_config("mha", window_len=1, block_len=4, use_cache=False),
    "documents": make_config("mqa", window_len=2, block_len=3, reset_at_document=True),
    "full_documents": make_config("mha", attention="full", reset_at_document=True),
}


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("sizes", [[11], [4, 1, 1, 5]], ids=["whole", "pieces"])
def test_causality(name, sizes, double):
    """The gradient of a logit for the embedding of a token is exactly zero where the token is
    later, in an earlier document, or beyond all windows; elsewhere it is not zero."""
    config, length = CAUSAL[name], sum(sizes)
    if sizes != [length] and name in ("no_cache", "full_documents"):
        pytest.skip("whole only: the pieces of the others tell as much")
    model = random_model(config)
    rng = np.random.default_rng(0)
    tokens = rng.permutation(config.vocab_size)[None, :length].astype(np.int32)  # all distinct
    mix = rng.normal(size=config.vocab_size)
    document_ids = (np.arange(length) >= 5).astype(np.int32)[None]

    def outputs(embedding):
        model_ = Model({**model.params, "embedding": embedding}, model.codebook, config)
        state, parts, start = fresh(config, 1), [], 0
        for size in sizes:
            part = slice(start, start + size)
            logits, state = extend(
                model_, state, tokens[:, part], document_ids=document_ids[:, part]
            )
            parts.append(logits[0] @ mix)
            start += size
        return jnp.concatenate(parts)

    gradient = jax.jit(jax.jacrev(outputs))(model.params["embedding"])[:, tokens[0]]
    size = np.abs(gradient).max(-1)  # [query, key]
    t, j = np.arange(length)[:, None], np.arange(length)
    sees = j <= t
    if config.reset_at_document:
        sees = sees & (document_ids[0][:, None] == document_ids[0])
    if not config.use_cache:
        sees = sees & (t - j <= config.num_units * config.window_len)
    assert (size[~sees] == 0.0).all()
    assert (size[sees] > 1e-9).all()


# The state.


def types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_state_is_constant(name, x64):
    """Structure, shapes and dtypes, whatever is consumed and in whatever precision."""
    config = CASES[name]
    single = ("float32", "bfloat16", "float16")
    with jax.enable_x64(x64):
        for dtype in (*single, "float64") if x64 else single:
            config = config.replace(
                compute_dtype=dtype, param_dtype="float32", state_dtype="bfloat16"
            )
            model = jax.eval_shape(lambda config=config: init_model(config, 0))
            for state_dtype in (None, "float32"):
                state = fresh(config)
                if state_dtype:
                    capacity = CAPACITY if config.attention == "full" else None
                    state = init_state(config, BATCH, state_dtype, capacity=capacity)
                assert state.logits.dtype == ("float64" if dtype == "float64" else "float32")
                assert state.units[0].values.dtype == (state_dtype or "bfloat16")
                for size in (1, 2, 20):
                    tokens = np.zeros((BATCH, size), np.int32)
                    for more in ({}, {"lengths": tokens[:, 0]}, {"document_ids": tokens}):
                        logits, after = jax.eval_shape(extend, model, state, tokens, **more)
                        assert types(after) == types(state)
                        assert logits.shape == (BATCH, size, config.vocab_size)
                        assert logits.dtype == state.logits.dtype


def test_state_size_does_not_grow():
    """A vq state is as large as its window and codebook."""
    config = CASES["gated_heads_documents"]
    unit = init_state(config, BATCH).units[0]
    lead, slots = (BATCH, 2), config.window_len + 1
    assert unit.codes.shape == (*lead, slots)
    assert unit.counts.shape == (*lead, config.codebook_size)
    assert unit.values.shape == (*lead, slots + config.codebook_size, config.d_v)
    unit = init_state(CASES["full_documents"], BATCH).units[0]
    assert unit.keys.shape[2] == 4096


def test_any_key_makes_a_model():
    config = make_config("mqa", absolute_positions=True).replace(
        compute_dtype="float32", param_dtype="float32", state_dtype="float32"
    )
    expected = init_model(config, jax.random.key(7))
    raw = jax.random.key_data(jax.random.key(7))
    for key in (7, np.int64(7), raw, np.asarray(raw)):
        same_bits(init_model(config, key), expected)
    other = init_model(config, 8)
    assert jax.tree.structure(other) == jax.tree.structure(expected)
    drawn = 0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(other), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == jnp.float32
        if "w_" in path[-1].key or path[-1].key in ("embedding", "sum"):
            drawn += 1
            assert (a != b).all()
            assert 0.7 < np.std(a) * (a.shape[-2] ** 0.5 if "w_" in path[-1].key else 1) < 1.3
    assert drawn == 10


# Errors.

GATED, FULL = CASES["gated"], CASES["full_documents"]


def call(config=GATED, batch=2, tokens=((1, 2, 3), (4, 5, 6)), model=None, state=None, **more):
    model = model or jax.eval_shape(lambda: init_model(config, 0))
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
        (dict(document_ids=[[0.5] * 3] * 2), "document_ids are float.*whole numbers"),
        (dict(config=FULL, tokens=np.zeros((2, 31), int)), "would reach 31 tokens.* holds 30"),
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
        dict(window_len=4),
        dict(codebook_size=6),
        dict(window_len=4, codebook_size=4),
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
    ],
)
def test_init_state_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        init_state(**{"config": GATED, **arguments})


def test_full_capacity(double):
    """A full state takes what it can hold and no more, counted row by row."""
    model, tokens, document_ids, _, _ = whole("full_documents")
    state = whole("full_documents")[-1]  # 27 of 30
    with pytest.raises(ValueError, match="would reach 32 tokens.* holds 30"):
        extend(model, state, tokens[:, :5])
    with pytest.raises(ValueError, match="would reach 31 tokens.* holds 30"):
        extend(model, state, tokens[:, :5], lengths=[0, 4, 3])
    lengths = np.array([0, 2, 3], np.int32)
    logits, after = step(
        model, state, tokens[:, :5], lengths=lengths, document_ids=document_ids[:, :5] + 99
    )
    np.testing.assert_array_equal(after.position, [27, 29, 30])
    assert np.isfinite(logits[2, :3]).all()
    # Where positions are not known, under jit, what cannot be held is not a number.
    lengths = np.array([1, 2, 1], np.int32)
    logits, _ = step(
        model, after, tokens[:, :2], lengths=lengths, document_ids=document_ids[:, :2] + 99
    )
    nan = np.isnan(logits).all(-1)
    np.testing.assert_array_equal(nan[:, 0], [False, False, True])
    assert nan[1, 1]
    assert np.isfinite(logits[:2, 0]).all()


def test_logits_follow_config_scale(double):
    """`logit_scale` is on the logits of the state too."""
    model, tokens, document_ids, logits, state = whole("gated")
    config = model.config.replace(logit_scale=0.25)
    other = dataclasses.replace(model, config=config)
    pieces = [(9, [9] * BATCH)]
    actual, _ = consume(other, fresh(config), tokens, document_ids, pieces)
    close(actual, 0.25 * logits[:, :9])
