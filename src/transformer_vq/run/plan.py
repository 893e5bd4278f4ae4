"""What a training run would take: the train step is compiled, and no array is allocated."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer_vq import costs
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import Batch
from transformer_vq.ops.train import init_train_state, make_train_step, require_trainable
from transformer_vq.sharding import data_mesh


@dataclass(frozen=True)
class Plan:
    """Sizes and costs of a run. Bytes are those of one device."""

    bytes: dict[str, int]  # by what they are for
    devices: str
    num_devices: int
    compile_seconds: float
    flops_per_token: int  # of training, by formula (`costs.train_flops`)
    tokens_per_update: int

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def plan(config: ModelConfig, train: TrainConfig, mesh: Mesh | None = None) -> Plan:
    """Compile the train step for the devices of `mesh` (all by default) and count.

    Raises `ValueError` for a recipe that does not fit the model or the devices.
    """
    mesh = mesh or data_mesh()
    require_trainable(config, train, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, train))
    shape = (train.batch_size, train.sequence_len)
    tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
    starts = jax.ShapeDtypeStruct(shape[:1], jnp.bool_)
    batch = Batch._make((tokens, tokens, mask, tokens, starts))
    start = time.monotonic()
    compiled = make_train_step(config, train, mesh).lower(state, batch).compile()
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    kept = {
        "parameters": state.params,
        "codebooks": state.codebook,
        "optimizer": state.opt_state,
        "averaged weights": state.average,
        "states of streams": state.stream,
    }
    count = {name: _bytes(tree) for name, tree in kept.items() if tree is not None}
    if "states of streams" in count:
        count["states of streams"] //= mesh.size
    count["a batch"] = _bytes(batch) // mesh.size
    if memory is not None:
        count["activations, gradients"] = memory.temp_size_in_bytes
    kind = mesh.devices.flat[0].device_kind
    return Plan(
        bytes=count,
        devices=f"{mesh.size} device{'s' * (mesh.size > 1)} ({kind})",
        num_devices=mesh.size,
        compile_seconds=seconds,
        flops_per_token=costs.run_flops(config, train),
        tokens_per_update=train.batch_size * train.update_len,
    )


def _bytes(tree: object) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
