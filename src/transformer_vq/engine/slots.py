"""Rows of a state: taken out, put in, and forked.

A state, the controls of requests and `ops.decode.Rows` are all trees of arrays `[B, ...]` whose
rows are independent, so these work on each of them. They are pure functions that can be traced: a
program that owns a state compiles `put_rows` with its first argument donated, and then nothing else
of the state is copied.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from transformer_vq.errors import UserError

Tree = TypeVar("Tree")  # of arrays [B, ...]: a State, Controls, Rows
Indices = Sequence[int] | np.ndarray | jax.Array  # [n]; may be traced


def num_rows(tree: object) -> int:
    """How many rows the arrays of a tree have."""
    return jax.tree.leaves(tree)[0].shape[0]


def _row_shapes(tree: object) -> dict[str, tuple[int, ...]]:
    """The shape of a row of each array, by its path in the tree."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x.shape[1:] for path, x in leaves}


def take_rows(tree: Tree, rows: Indices) -> Tree:
    """A copy of some rows, in this order. A row that is named several times is forked.

    Raises `ValueError` for a row that there is not, as far as the rows are known (not traced).
    """
    index = _known("row", rows, num_rows(tree))
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0), tree)


def put_rows(tree: Tree, slots: Indices, rows: Tree) -> Tree:
    """The tree with row i of `rows` in slot `slots[i]`; the other slots stay as they are.

    Raises `ValueError` for a slot that there is not or that is named twice, as far as the slots are
    known, and for rows of another model or another capacity.
    """
    index = _known("slot", slots, num_rows(tree))
    if not isinstance(index, Tracer) and len(set(index.tolist())) < len(index):
        raise UserError(f"the slots are {index.tolist()}: name each slot once")
    if num_rows(rows) != len(index):
        raise UserError(f"there are {num_rows(rows)} rows for {len(index)} slots: one each")
    if _row_shapes(rows) != _row_shapes(tree):
        raise UserError("the rows are of another model, or of another capacity, than the slots")
    return jax.tree.map(lambda x, new: jnp.asarray(x).at[index].set(new), tree, rows)


def _known(what: str, given: Indices, count: int) -> jax.Array | np.ndarray:
    """The indices as an array, checked unless they are traced: out of bounds is silent in JAX."""
    if isinstance(given, Tracer):
        return given
    index = np.asarray(given)
    if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
        raise UserError(f"the {what}s are {given!r}: give a list of whole numbers")
    for i in index.tolist():
        if not 0 <= i < count:
            raise UserError(f"there is no {what} {i}: they go from 0 to {count - 1}")
    return index.astype(np.int32)
