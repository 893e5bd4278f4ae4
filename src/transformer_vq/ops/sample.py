"""The classic operation: sequences drawn from nothing, over all devices."""

import functools
import numbers
from dataclasses import MISSING, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer_vq import sharding
from transformer_vq.errors import UserError, require_kind, shown
from transformer_vq.fields import check, real, whole
from transformer_vq.nn import prob
from transformer_vq.nn.decode import decode_step, prepare
from transformer_vq.nn.layers import as_key, iota
from transformer_vq.nn.model import Model, init_state
from transformer_vq.ops.decode import draw_at


@dataclass(frozen=True)
class SampleConfig:
    """What `sample_op` draws. Hashable: a static argument.

    Raises `ValueError`, naming the field, the value and the limit, if a value makes no sense.
    """

    global_batch_size: int = whole(MISSING, "sequences, over all devices", low=1)
    sequence_len: int = whole(MISSING, "tokens in each", low=1)
    p_nucleus: float = real(1.0, "mass of the nucleus", "(0, 1]")

    def __post_init__(self) -> None:
        check(self)


def sample_op(config: SampleConfig, eos_id: int, model: Model, key: Any) -> jax.Array:
    """Sequences from nothing: int32 `[global_batch_size, sequence_len]`, spread over all devices.

    Every row starts from `eos_id` (not returned) and draws `sequence_len` tokens from the nucleus;
    its document id grows at each `eos_id` it draws. Rows do not depend on the number of devices,
    up to float rounding. `key`: a JAX key, raw key data (JAX or numpy) or a whole
    number of 32 bits.

    Raises `ValueError` if the batch is no multiple of the number of devices, `eos_id` no token or
    `key` no key.
    """
    require_kind("config", config, SampleConfig)
    require_kind("model", model, Model, "from init_model or of a run (load)")
    mesh = sharding.data_mesh()
    sharding.require_divisible(config.global_batch_size, mesh, "global_batch_size")
    last = model.config.vocab_size - 1
    is_whole = isinstance(eos_id, numbers.Integral) and not isinstance(eos_id, bool)
    if not is_whole or not 0 <= eos_id <= last:
        raise UserError(f"eos_id is {shown(eos_id)}: tokens go from 0 to {last}")
    key_data = jax.random.key_data(as_key(key))
    model, key_data = jax.device_put((model, key_data), sharding.replicated(mesh))
    return sample_sequences(config, int(eos_id), mesh, model, key_data)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sample_sequences(
    config: SampleConfig, eos_id: int, mesh: Mesh, model: Model, key_data: jax.Array
) -> jax.Array:
    """The program of `sample_op`, for the devices of a mesh; `key_data` is that of a JAX key."""

    def per_device(whole: tuple[Model, jax.Array], row: jax.Array) -> jax.Array:
        (model, key_data), batch = whole, row.shape[0]
        key = jax.random.wrap_key_data(key_data)
        keys = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i)))(row)
        state = init_state(model.config, batch, room=config.sequence_len)
        decoder = prepare(model, state)

        def step(carry, position):
            state, token, document = carry
            state = decode_step(decoder, state, token, None, document)
            logits = prob.nucleus(state.logits, config.p_nucleus)
            token = draw_at(keys, jnp.broadcast_to(position, batch), logits)
            return (state, token, document + (token == eos_id).astype(jnp.int32)), token

        start = (state, jnp.full(batch, eos_id, jnp.int32), jnp.zeros(batch, jnp.int32))
        _, tokens = jax.lax.scan(step, start, iota(config.sequence_len))
        return tokens.T

    rows = iota(config.global_batch_size)
    return sharding.map_rows(per_device, mesh)((model, key_data), rows)
