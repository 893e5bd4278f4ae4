"""Axis legend and array aliases, used in every signature of the package.

| letter | size                                   | letter | size                            |
|--------|----------------------------------------|--------|---------------------------------|
| `B`    | batch rows                             | `K`    | width of a query or key, `d_k`  |
| `T`    | time: tokens in this call              | `V`    | width of a value, `d_v`         |
| `D`    | residual stream, `d_model`             | `S`    | codewords, `codebook_size`      |
| `H`    | query heads, `num_heads`               | `L`    | block length, `block_len`       |
| `G`    | key/value heads, `num_kv_heads`        | `M`    | window length, `window_len`     |
| `R`    | query heads per key/value head, `H/G`  | `W`    | ring slots, `M + 1`             |
| `N`    | residual units, `num_units`            | `J`    | rows of a state's table         |

Lower case in attention: `n` blocks side by side, `c` queries of a block, `j` keys, `d` distances,
`m` blocks of keys. `*n` stands for any number of axes, or none.
"""

from typing import Any

import jax
from jaxtyping import Bool, Float, Int, Num, Shaped

Key = jax.Array  # a typed JAX key, or the raw uint32 data of one
Params = dict[str, Any]  # nested names to arrays

Tokens = Int[jax.Array, "B T"]
Logits = Float[jax.Array, "B T vocab"]
PerRow = Int[jax.Array, "B"]
PerToken = Int[jax.Array, "B T"]
PerRowFlag = Bool[jax.Array, "B"]
Features = Float[jax.Array, "B T D"]

# Attention, by role.
Queries = Float[jax.Array, "B T H K"]
Keys = Float[jax.Array, "B T G K"]
Values = Float[jax.Array, "B T G V"]
Codes = Int[jax.Array, "B T G"]
Outputs = Float[jax.Array, "B T H V"]
Codewords = Float[jax.Array, "G S K"]
HeadBias = Float[jax.Array, "H K"]  # what each query head adds to its queries
PositionBiases = Float[jax.Array, "d H K"]  # position vectors r, nearest distance first
Fades = Float[jax.Array, "B T G"]  # log of what a new token leaves of the weight of older keys
HeadScore = Float[jax.Array, "H"]
KeyMix = Float[jax.Array, "G K"]  # share of the key before, by channel
ByHead = Float[jax.Array, "*any H K"]
ByKeyHead = Float[jax.Array, "*any G R K"]

# The state of a unit, `*rows` being B; of one row, or stacked over units, other axes are there.
RingCodes = Int[jax.Array, "*rows G W"]
RingKeys = Float[jax.Array, "*rows G W K"]
Counts = Num[jax.Array, "*rows G S"]
RingFades = Float[jax.Array, "*rows G W"]
LastKey = Float[jax.Array, "*rows G K"]
TableOfValues = Float[jax.Array, "*rows G J V"]
CachedKeys = Float[jax.Array, "*rows G capacity K"]
CachedValues = Float[jax.Array, "*rows G capacity V"]

# Keys in the order of time: of the ring, the window, or the call.
TimedCodes = Int[jax.Array, "B G j"]
TimedKeys = Float[jax.Array, "B G j K"]
TimedValues = Float[jax.Array, "B G j V"]
TimedFades = Float[jax.Array, "B G j"]
Timed = Shaped[jax.Array, "B G j *any"]  # one of these four
TimedBlocks = Shaped[jax.Array, "B G n j *any"]  # of each of n blocks
KeyIndex = Int[jax.Array, "B j"]  # timeline index

# The cache of codes, one or as each of n blocks sees it.
Mass = Num[jax.Array, "B G *n S"]
LogMass = Float[jax.Array, "B G *n S"]
Means = Float[jax.Array, "B G *n S V"]
First = Int[jax.Array, "B *n"]  # timeline index of the first key of a document

# Blocks of queries against their spans of keys (`nn/attention/blockwise.py`).
BlockQueries = Float[jax.Array, "B G n R c K"]
BlockScores = Float[jax.Array, "B G n R c j"]
BlockOutputs = Float[jax.Array, "B G n R c V"]
LogSums = Float[jax.Array, "B G n R c"]
NearBiases = Float[jax.Array, "d G R K"]  # position vectors, farthest distance first
NearVisible = Bool[jax.Array, "B n c j"]  # whether the query sees the key
NearOffsets = Float[jax.Array, "B #G n #c j"]  # added to the query's score of the key
FarOffsets = Float[jax.Array, "B n c"]  # added to its scores of all codes
FarVisible = Bool[jax.Array, "B n c"]  # whether the query sees the cache
InReach = Bool[jax.Array, "c j"]

# Tiles: n blocks of queries against m >= n blocks of keys (`nn/attention/tiled.py`).
TileContent = Float[jax.Array, "n B G R c K"]
TilePosition = Float[jax.Array, "n G R B c K"]
TileKeys = Float[jax.Array, "m B G c K"]
TileValues = Float[jax.Array, "m B G c V"]
TileBiases = Float[jax.Array, "G R d K"]  # position vectors, farthest distance first
TileFirst = Int[jax.Array, "n B c"]  # the first key that each query sees
TileOutputs = Float[jax.Array, "n B G R c V"]
TileLogSums = Float[jax.Array, "n B G R c"]
TileScores = Float[jax.Array, "B G R c c"]  # of one tile: queries, keys
Index = int | Int[jax.Array, ""]
