"""Models where requests are decoded: on their devices, and prepared.

Preparing a model (`nn.decode.prepare`) costs as much as some tokens, and a copy on every device of
a mesh costs memory. Both are made at the first call, and kept while the model lives. Whoever wants
the memory back drops the model.
"""

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import jax
from jax.sharding import Mesh

from transformer_vq import sharding
from transformer_vq.engine import ready
from transformer_vq.nn.decode import Decoder, kept_weights
from transformer_vq.nn.model import Model, State
from transformer_vq.nn.products import Weights
from transformer_vq.ops.decode import prepare_decoder


@dataclass
class _Kept:
    """What was made of a model. Nothing in here refers to the model itself."""

    copies: dict[Mesh, Model] = field(default_factory=dict)  # on all devices of a mesh
    # by capacity of the state and what the matrices are kept in
    decoders: dict[tuple[int | None, Weights], Decoder] = field(default_factory=dict)


_kept: WeakKeyDictionary[Model, _Kept] = WeakKeyDictionary()


def model_on(model: Model, mesh: Mesh | None) -> Model:
    """The model, whole on every device of the mesh; as it is without one."""
    if mesh is None:
        return model
    copies = _kept.setdefault(model, _Kept()).copies
    if mesh not in copies:
        copies[mesh] = jax.device_put(model, sharding.replicated(mesh))
    return copies[mesh]


def decoder_for(model: Model, state: State, rows: int | None = None) -> Decoder:
    """The model prepared for decoding states like this one, where the model is (`model_on`).

    `rows`: how many go through it at once, if not those of the state.
    """
    decoders = _kept.setdefault(model, _Kept()).decoders
    weights = kept_weights(model, rows or state.position.shape[0])
    key = (state.capacity, weights)
    if key not in decoders:
        decoders[key] = ready.call(prepare_decoder, model, state, weights=weights)
    return decoders[key]
