"""`extend`: one meaning of a sequence; documents do not see each other."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import close, far, make_config, random_inputs, random_model
from tests.nn.cases import BATCH, CAPACITY, CASES, LENGTH, MEMORY, fresh, same_bits
from transformer_vq import extend

SLOW = (  # what others among them have too, or test_reference and test_bounds check
    "decay_cap_documents",
    "gated",
    "gated_heads_documents",
    "mha_no_cache_documents",
    "mqa_no_window",
)
SIZES = (1, 2, 9)  # of the pieces that a text is cut into: few, each is compiled
WITH_DOCUMENTS = [name for name, config in CASES.items() if config.reset_at_document]

step = jax.jit(extend)  # compiled once for each configuration, batch size and number of tokens


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


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
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
    [
        ("gated_heads_documents", 64),
        pytest.param("gated_heads_documents", 1, marks=pytest.mark.slow),
        pytest.param("mqa_no_window", 4, marks=pytest.mark.slow),
    ],
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


def test_ages_of_a_row_of_length_0_keep_their_bits(double):
    """Though they are sums, of which those of many keys round as they are made."""
    config = make_config("mqa", num_layers=1, window_len=24, block_len=8, **MEMORY)
    model, (tokens, ids, _) = random_model(config), random_inputs(config)
    lengths = [(9, [9] * BATCH)] * 2
    _, state = consume(model, fresh(config), tokens, ids, lengths)
    _, after = consume(model, state, tokens, ids, [(9, [0, 9, 0])])
    for b in (0, 2):
        same_bits(*(jax.tree.map(lambda x, b=b: x[b], s) for s in (after, state)))
    far(after.units[0].ages[1], state.units[0].ages[1])  # control


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


# Capacity.


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
