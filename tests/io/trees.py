"""Trees to save, and what tests of checkpoints say of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_vq.io.checkpoint import CheckpointError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    params: dict
    codebook: tuple
    opt_state: list
    key: jax.Array
    step: int


def train_state(step: int = 0, width: int = 8) -> TrainState:
    return TrainState(
        params={"embed": jnp.full((4, width), step, jnp.bfloat16), "scale": jnp.float32(step)},
        codebook=(jnp.full((3, width), step, jnp.float32), None),
        opt_state=[np.full((4, width), step), ()],
        key=jax.random.key(step),
        step=step,
    )


def raw(leaf) -> tuple:
    """Kind, dtype, shape and bytes: equal for leaves that are the same in every bit."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), raw(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    kind = jax.Array if isinstance(leaf, jax.Array) else type(leaf)
    return kind, array.dtype, array.shape, array.tobytes()


def assert_same(tree, other) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, other_leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert raw(leaf) == raw(other_leaf)


def refused(call, *args, **kwargs) -> str:
    """The message of the `CheckpointError`: one sentence, one line."""
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message
