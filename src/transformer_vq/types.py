"""Axis legend and array aliases, used in every signature of the package.

| letter | size                                   | letter | size                            |
|--------|----------------------------------------|--------|---------------------------------|
| `B`    | batch rows                             | `K`    | width of a query or key, `d_k`  |
| `T`    | time: tokens in this call              | `V`    | width of a value, `d_v`         |
| `D`    | residual stream, `d_model`             | `S`    | codewords, `codebook_size`      |
| `H`    | query heads, `num_heads`               | `L`    | block length, `block_len`       |
| `G`    | key/value heads, `num_kv_heads`        | `M`    | window length, `window_len`     |
| `R`    | query heads per key/value head, `H/G`  | `W`    | ring slots, `M + 1`             |
| `N`    | residual units, `num_units`            |        |                                 |
"""

from typing import Any

import jax
from jaxtyping import Bool, Float, Int

Key = jax.Array  # a typed JAX key, or the raw uint32 data of one
Params = dict[str, Any]  # nested names to arrays

Tokens = Int[jax.Array, "B T"]
Logits = Float[jax.Array, "B T vocab"]
PerRow = Int[jax.Array, "B"]
PerRowFlag = Bool[jax.Array, "B"]
Features = Float[jax.Array, "B T D"]
