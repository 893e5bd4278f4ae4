"""Rows of a state: taken, put, forked; on their own and in a compiled program."""

import jax
import numpy as np
import pytest

from tests.engine.plain import FULL, LENGTH, MODEL
from transformer_vq import init_state
from transformer_vq.engine.slots import num_rows, put_rows, take_rows
from transformer_vq.errors import UserError


def numbered(model, rows, **capacity):
    """A state whose arrays hold the number of their row."""
    state = init_state(model.config, rows, **capacity)
    return jax.tree.map(
        lambda x: x + np.arange(rows).reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype), state
    )


def rows_of(state):
    """The number in each row, which must be in all of its arrays."""
    columns = [np.asarray(x).reshape(x.shape[0], -1) for x in jax.tree.leaves(state)]
    assert all((column == column[:, :1]).all() for column in columns)
    (numbers,) = {tuple(column[:, 0].tolist()) for column in columns}
    return list(numbers)


def test_take_rows():
    """In any order, also several times: a fork."""
    state = numbered(MODEL, 4)
    assert rows_of(take_rows(state, [2, 0])) == [2, 0]
    assert rows_of(take_rows(state, np.array([3, 3, 3]))) == [3, 3, 3]
    assert rows_of(state) == [0, 1, 2, 3]


def test_put_rows():
    """The other slots, and the state that was given, stay as they are."""
    state = numbered(MODEL, 4)
    assert rows_of(put_rows(state, [2, 0], take_rows(state, [3, 1]))) == [1, 1, 3, 3]
    assert rows_of(state) == [0, 1, 2, 3]


def test_put_rows_in_a_program():
    """With a traced slot: one program serves all slots, and may take the state's own buffers."""
    state = numbered(MODEL, 4)
    insert = jax.jit(put_rows, donate_argnums=0)
    row = take_rows(state, [3])
    values = state.units[0].values
    for slot, expected in ((1, [0, 3, 2, 3]), (0, [3, 3, 2, 3])):
        state = insert(state, np.array([slot]), row)
        assert rows_of(state) == expected
    assert insert._cache_size() == 1 and values.is_deleted()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([4], "there is no row 4: they go from 0 to 3"),
        ([-1], "there is no row -1"),
        ([0.5], r"the rows are \[0.5\]: give a list of whole numbers"),
        (2, "the rows are 2: give a list of whole numbers"),
    ],
)
def test_rows_that_are_none(rows, sentence):
    with pytest.raises(UserError, match=sentence):
        take_rows(numbered(MODEL, 4), rows)


def test_rows_that_do_not_fit():
    state = numbered(MODEL, 4)
    with pytest.raises(UserError, match=r"the slots are \[1, 1\]: name each slot once"):
        put_rows(state, [1, 1], take_rows(state, [0, 2]))
    with pytest.raises(UserError, match="there are 1 rows for 2 slots"):
        put_rows(state, [1, 2], take_rows(state, [0]))
    with pytest.raises(UserError, match="there is no slot 4"):
        put_rows(state, [4], take_rows(state, [0]))
    full = numbered(FULL, 2, capacity=LENGTH)
    with pytest.raises(UserError, match="another model, or of another capacity"):
        put_rows(full, [0], numbered(FULL, 1, capacity=LENGTH + 1))
    assert num_rows(full) == 2
