"""`extend`: one meaning of a sequence, causality, documents, constant states, clear errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import SINGLE, close, far, make_config, quick_jit, random_inputs, random_model
from transformer_vq import Model, extend, init_model, init_state
from transformer_vq.nn.layers import wide_dtype

BATCH, LENGTH = 3, 21
SIZES = (1, 2, 9)  # of the pieces that a text is cut into: few, each is compiled
CAPACITY = LENGTH + 3

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
        forget="gated",
        forget_horizon=30.0,
        key_shift=True,
        score_gain=True,
        sink=True,
        sphere_codewords=True,
        reset_at_document=True,
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
WITH_DOCUMENTS = [name for name, config in CASES.items() if config.reset_at_document]

step = jax.jit(extend)  # compiled once for each configuration, batch size and number of tokens


def fresh(config, batch=BATCH):
    return init_state(config, batch, capacity=CAPACITY if config.attention == "full" else None)


def consume(model, state, tokens, document_ids, pieces, noise=0):
    """Logits and state after `pieces`, each of them `(size, lengths)`; each row goes on where its
    last piece ended. Padding is noise. Logits of what was not consumed are 0."""
    rng = np.random.default_rng(noise)
    batch = len(tokens)
    rows, used, before = np.arange(batch), np.zeros(batch, int), state.logits
    total = max(1, *np.sum([lengths for _, lengths in pieces], axis=0))
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
        if past.any():
            close(state.logits[past], logits[rows, used - 1][past])
        same_bits(state.logits[~past], before[~past])
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


@pytest.mark.parametrize(
    ("name", "block_len"),
    [("gated_heads_documents", 1), ("gated_heads_documents", 64), ("mqa_no_window", 4)],
)
def test_block_len_changes_nothing(name, block_len, double):
    model, tokens, document_ids, _, _ = whole(name)
    config = model.config.replace(block_len=block_len)
    other = dataclasses.replace(model, config=config)
    pieces = [(9, [9, 8, 0]), (9, [7, 9, 9])]
    expected = consume(model, fresh(config), tokens, document_ids, pieces)
    close(consume(other, fresh(config), tokens, document_ids, pieces), expected)


def test_a_row_is_alone(double):
    """A row of a batch of ragged rows equals the row by itself."""
    model, tokens, document_ids, _, _ = whole("gated_heads_documents")
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
def test_neighbours_are_nothing(name, double):
    """Other rows beside a row: the same bits. Another place in the batch: the same numbers."""
    model, tokens, document_ids, _, _ = whole(name)
    pieces = [(9, [9, 3, 0]), (1, [1, 1, 1]), (1, [1, 0, 1]), (9, [1, 9, 9])]
    expected = consume(model, fresh(model.config), tokens, document_ids, pieces)

    other, other_ids = tokens.copy(), document_ids.copy()
    other[1:] = (other[1:] + 1) % model.config.vocab_size
    other_ids[1:] += 1
    others = [(9, [9, 8, 0]), (1, [1, 0, 1]), (1, [1, 0, 0]), (9, [1, 5, 9])]
    actual = consume(model, fresh(model.config), other, other_ids, others)
    same_bits(actual[0][0, :12], expected[0][0, :12])
    same_bits(*(jax.tree.map(lambda x: x[0], state) for state in (actual[1], expected[1])))
    far(actual[1].logits[1:], expected[1].logits[1:])

    order = np.array([2, 0, 1])
    moved = [(size, np.array(lengths)[order]) for size, lengths in pieces]
    actual = consume(model, fresh(model.config), tokens[order], document_ids[order], moved)
    close(actual, jax.tree.map(lambda x: x[order], expected), 1e-13)


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
    model, tokens, _, _, _ = whole(name)
    state, used = fresh(model.config), 0
    for document, more in enumerate([0, 16, 1, 2]):
        ids = np.full_like(tokens, document)
        if more:
            rest = tokens[:, used:]
            _, state = consume(model, state, rest, ids, cut([more] * BATCH, [9 if more > 2 else 1]))
            used += more
        for size, lengths in ((9, [0, 4, 0]), (1, [0, 1, 0]), (9, [0, 0, 0])):
            _, after = consume(model, state, tokens, ids, [(size, lengths)], noise=size)
            for b, n in enumerate(lengths):
                if n == 0:
                    same_bits(*(jax.tree.map(lambda x, b=b: x[b], s) for s in (after, state)))
                else:  # control
                    assert after.position[b] == state.position[b] + n


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_tokens_of_any_integer_type(dtype, double):
    config = make_config("mqa", num_layers=1)
    model, state, tokens = random_model(config), fresh(config, 2), np.array([[3], [1]])
    expected = step(model, state, tokens.astype(np.int32))
    close(step(model, state, tokens.astype(dtype)), expected)


# Documents.

SPLITS = [[LENGTH], [9], [9, 1, 1, 2, 1], [1]]


@pytest.mark.parametrize("name", WITH_DOCUMENTS)
def test_an_earlier_document_is_nothing(name, double):
    """Edits before a document change no bit in it, however the text is cut."""
    model, tokens, _, _, _ = whole(name)
    config = model.config
    starts = np.array([[10], [6], [9]])
    t = np.arange(LENGTH)
    document_ids = ((t >= 3).astype(int) + (t >= starts)).astype(np.int32)  # three documents
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
    starts, ends = np.array([4, 10, 7]), np.array([LENGTH, LENGTH - 1, LENGTH - 4])
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
                    jax.tree.map(lambda x, b=b: x[b], u) for u in (unit, alone_unit)
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
    model, tokens, _, _, state = whole("gated_heads_documents")
    ids = np.asarray(state.document_id, np.int32)[:, None]
    ones = np.ones(BATCH, np.int32)
    expected = step(model, state, tokens[:, :1], lengths=ones, document_ids=ids)
    close(step(model, state, tokens[:, :1], lengths=ones), expected)
    other = step(model, state, tokens[:, :1], lengths=ones, document_ids=ids + 1)
    far(other[0], expected[0])
    np.testing.assert_array_equal(other[1].document_start, LENGTH)


# Causality, by gradient.

CAUSAL = {
    "gated": (make_config(num_heads=2, window_len=2, block_len=3, absolute_positions=True), [11]),
    "no_cache": (make_config("mha", window_len=1, block_len=4, use_cache=False), [11]),
    "documents": (make_config("mqa", window_len=2, block_len=3, reset_at_document=True), [11]),
    "pieces": (make_config("mha", window_len=2, block_len=3, reset_at_document=True), [7, 1, 3]),
    "full_documents": (make_config("mha", attention="full", reset_at_document=True), [11]),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causality(name, double):
    """The gradient of a logit for the embedding of a token is exactly zero where the token is
    later, in an earlier document, or beyond all windows; elsewhere it is not zero."""
    config, sizes = CAUSAL[name]
    length = sum(sizes)
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

    # Full attention has a backward pass of its own, and no forward derivative.
    jacobian = jax.jacrev if config.attention == "full" else jax.jacfwd
    gradient = quick_jit(jacobian(outputs))(model.params["embedding"])[:, tokens[0]]
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
    for name in CASES:
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

GATED, FULL = (CASES[name].replace(**SINGLE) for name in ("gated", "full_documents"))


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


def test_full_capacity(double):
    """A full state takes what it can hold and no more, counted row by row."""
    model, tokens, document_ids, _, _ = whole("full_documents")
    state = whole("full_documents")[-1]  # 21 of 24
    assert (LENGTH, CAPACITY) == (21, 24)
    with pytest.raises(ValueError, match=r"would reach 26 tokens.* holds 24"):
        extend(model, state, tokens[:, :5])
    with pytest.raises(ValueError, match=r"would reach 25 tokens.* holds 24"):
        extend(model, state, tokens[:, :9], lengths=np.array([0, 4, 3]))
    lengths = np.array([0, 2, 3], np.int32)
    ids = document_ids[:, :9] + 99
    logits, after = step(model, state, tokens[:, :9], lengths=lengths, document_ids=ids)
    np.testing.assert_array_equal(after.position, [21, 23, 24])
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
