"""The quadratic baseline: attention over unquantized keys, position biases at every distance.

Its state is a key/value cache of a capacity fixed when the state is made. Many tokens go block by
block (`tiled.py`); with one block for all of them the whole score matrix is there at once.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Shaped

from transformer_vq.config import ModelConfig
from transformer_vq.nn.attention import tiled
from transformer_vq.nn.attention.blockwise import MASKED
from transformer_vq.nn.attention.inputs import QKV, Attended, AttentionWeights
from transformer_vq.nn.attention.sink import share_of_keys, softmax
from transformer_vq.nn.attention.state import FullAttentionState
from transformer_vq.nn.layers import iota, wide
from transformer_vq.nn.timeline import Timeline
from transformer_vq.types import (
    CachedKeys,
    CachedValues,
    Keys,
    Outputs,
    PerRow,
    PerToken,
    Queries,
    Values,
)


@jax.named_scope("attend_full")
def attend_full(
    x: QKV,
    unit: AttentionWeights,
    state: FullAttentionState,
    timeline: Timeline,
    config: ModelConfig,
    *,
    from_empty: bool = False,
) -> Attended:
    """Attention of T new tokens per row over the cache and each other; any T.

    `unit.r` is `[capacity, H, K]`: one row per distance. A query beyond the capacity gives NaN:
    `extend` refuses it first wherever positions are known.
    `from_empty`: nothing was before this call, so the cache is not looked at; NaN if it was.
    """
    length, capacity = x.q.shape[1], state.capacity
    positions = timeline.start[:, None] + iota(length)
    real = iota(length) < timeline.length[:, None]
    # `first` counts from the oldest of W slots before this call: make it a position.
    first = timeline.first + (timeline.start - config.ring_len)[:, None]
    lost = (positions >= capacity) & real
    if from_empty:
        lost = lost | (timeline.start > 0)[:, None]
    if length > 1 or from_empty:
        before = None if from_empty else state
        relative = timeline.first - config.ring_len
        # What is lost, and may be no number, is not in the sums: 0 times it would be.
        k, v = (jnp.where(lost[..., None, None], 0, a) for a in (x.k, x.v))
        x = QKV(x.q, k, v)
        out = _attend_many(x, unit, before, timeline.start, relative, config.block_len)
        state = _write(state, x.k, x.v, positions, real)
    else:
        state = _write(state, x.k, x.v, positions, real)
        out = _attend_cache(x.q, unit, state, positions, first)
    return Attended(jnp.where(lost[..., None, None], jnp.nan, out), None, state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewFullKeys:
    """The keys of a few tokens, as a state takes them in."""

    keys: Keys  # [B, T, G, K]
    values: Values  # [B, T, G, V]


@jax.named_scope("attend_full_few")
def attend_full_few(
    x: QKV, unit: AttentionWeights, state: FullAttentionState, timeline: Timeline, ring_len: int
) -> tuple[Outputs, NewFullKeys]:
    """`attend_full` for few tokens per row, without the state after them: `commit_full` makes it.

    Scores of the cache and of the new keys, all at once.
    """
    batch, length, heads, d_k = x.q.shape
    groups, capacity = state.keys.shape[1:3]
    dtype = x.q.dtype
    positions = timeline.start[:, None] + iota(length)
    lost = (positions >= capacity) & (iota(length) < timeline.length[:, None])
    first = timeline.first + (timeline.start - ring_len)[:, None]
    # As the state would give them back; what is lost, and may be no number, is in no sum.
    k, v = (
        jnp.where(lost[..., None, None], 0, new).astype(old.dtype).astype(dtype)
        for new, old in ((x.k, state.keys), (x.v, state.values))
    )
    held = jnp.broadcast_to(iota(capacity), (batch, capacity))
    key_at = jnp.concatenate([held, positions], axis=1)[:, None]  # [B, 1, capacity + T]
    real = jnp.concatenate([held < timeline.start[:, None], positions < capacity], axis=1)[:, None]
    distance = positions[..., None] - key_at
    q = jnp.moveaxis(x.q.reshape(batch, length, groups, heads // groups, d_k), 1, 3)
    u, w = (a.reshape(groups, heads // groups, 1, d_k) for a in (unit.u, unit.w))
    r = unit.r.reshape(-1, groups, heads // groups, d_k)
    bias = jnp.einsum("bgrtk,dgrk->bgrtd", q + w, r)
    bias = jnp.take_along_axis(bias, jnp.clip(distance, 0)[:, None, None], axis=4, mode="clip")
    content = jnp.concatenate(
        [
            jnp.einsum("bgrtk,bgjk->bgrtj", q + u, state.keys.astype(dtype)),
            jnp.einsum("bgrtk,bjgk->bgrtj", q + u, k),
        ],
        axis=-1,
    )
    seen = real & (distance >= 0) & (key_at >= first[..., None])
    scores = jnp.where(seen[:, None, None], wide(content + bias), MASKED)
    old, own = jnp.split(softmax(scores, unit.sink).astype(dtype), [capacity], axis=-1)
    out = jnp.einsum("bgrtj,bgjv->btgrv", old, state.values.astype(dtype))
    out = (out + jnp.einsum("bgrtj,bjgv->btgrv", own, v)).reshape(batch, length, heads, -1)
    return jnp.where(lost[..., None, None], jnp.nan, out), NewFullKeys(x.k, x.v)


def commit_full(
    state: FullAttentionState, new: NewFullKeys, timeline: Timeline
) -> FullAttentionState:
    """The state after the first `timeline.length` of the new keys."""
    index = iota(new.keys.shape[1])
    real = index < timeline.length[:, None]
    return _write(state, new.keys, new.values, timeline.start[:, None] + index, real)


def _write(
    state: FullAttentionState,
    keys: Keys,
    values: Values,
    positions: PerToken,
    real: Bool[jax.Array, "B T"],
) -> FullAttentionState:
    """The state with the new keys and values at their positions, the real ones."""
    target = jnp.where(real, positions, state.capacity)  # past the end: dropped

    @jax.vmap  # by rows, so that devices that share the rows need not tell each other
    def put(
        cache: Shaped[jax.Array, "G capacity X"],
        new: Shaped[jax.Array, "T G X"],
        target: Int[jax.Array, "T"],
    ) -> Shaped[jax.Array, "G capacity X"]:
        new = jnp.moveaxis(new, 0, 1).astype(cache.dtype)
        return cache.at[:, target].set(new, mode="drop")

    keys, values = put(state.keys, keys, target), put(state.values, values, target)
    return replace(state, keys=keys, values=values)


def _attend_cache(
    q: Queries,
    unit: AttentionWeights,
    state: FullAttentionState,
    positions: PerToken,
    first: PerToken,
) -> Outputs:
    """Attention over the cache as it stands: all scores at once, for a token per row.

    `positions`, `first` `[B, T]`: of each query and of the first key that it sees.
    """
    batch, length, heads, d_k = q.shape
    groups, capacity = state.keys.shape[1:3]
    dtype = q.dtype
    q = jnp.moveaxis(q.reshape(batch, length, groups, heads // groups, d_k), 1, 3)
    u, w = (x.reshape(groups, heads // groups, 1, d_k) for x in (unit.u, unit.w))
    r = unit.r.reshape(capacity, groups, heads // groups, d_k)
    distance = positions[:, :, None] - iota(capacity)  # [B, T, capacity]
    bias = jnp.einsum("bgrtk,dgrk->bgrtd", q + w, r)
    bias = jnp.take_along_axis(bias, jnp.clip(distance, 0)[:, None, None], axis=4, mode="clip")
    scores = wide(jnp.einsum("bgrtk,bgjk->bgrtj", q + u, state.keys.astype(dtype)) + bias)
    visible = (distance >= 0) & (iota(capacity) >= first[..., None])
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = softmax(scores, unit.sink).astype(dtype)
    out = jnp.einsum("bgrtj,bgjv->btgrv", weights, state.values.astype(dtype))
    return out.reshape(batch, length, heads, -1)


def _attend_many(
    x: QKV,
    unit: AttentionWeights,
    before: FullAttentionState | None,
    start: PerRow,
    first: PerToken,
    block_len: int,
) -> Outputs:
    """Attention `[B, T, H, V]` of many tokens over each other and the cache before them, by blocks.

    Keys stand in the order of time and end with the call's own: those of the cache are moved so
    that in every row the last one is just before the call. `first` `[B, T]`: of the first key that
    a query sees, counted from the first token of the call, so below 0 in the cache.
    """
    batch, length, heads, d_k = x.q.shape
    groups, repeats = x.k.shape[2], heads // x.k.shape[2]
    block = min(block_len, length)
    blocks = -(-length // block)
    old_blocks = 0 if before is None else -(-before.capacity // block)

    def by_block(
        x: Shaped[jax.Array, "B T *any"], mode: str = "constant"
    ) -> Shaped[jax.Array, "n B c *any"]:
        """`[B, T, ...]` as `[n, B, c, ...]`, padded at the end."""
        pad = [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, mode=mode).reshape(batch, blocks, block, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def with_old(
        new: Keys | Values, cache: CachedKeys | CachedValues | None
    ) -> Shaped[jax.Array, "m B G c X"]:
        """Keys `[B, T, G, K]` and those of the cache before them: `[m, B, G, c, K]`."""
        new = jnp.moveaxis(by_block(new), 3, 2)
        if cache is None:
            return new
        at = start[:, None] + iota(-old_blocks * block, 0)
        old = jax.vmap(lambda x, at: x.at[:, at].get(mode="clip"))(cache, jnp.clip(at, 0))
        old = old.reshape(batch, groups, old_blocks, block, -1).astype(new.dtype)
        return jnp.concatenate([jnp.moveaxis(old, 2, 0), new])

    q = by_block(x.q.reshape(batch, length, groups, repeats, d_k))  # [n, B, c, G, R, K]
    u, w = (a.reshape(groups, repeats, d_k) for a in (unit.u, unit.w))
    rows = (old_blocks + blocks) * block
    r = jnp.pad(unit.r[:rows], [(0, max(0, rows - len(unit.r))), (0, 0), (0, 0)])
    tiles = tiled.Tiles(
        content=jnp.moveaxis(q + u, 2, 4),
        position=jnp.moveaxis(q + w, (3, 4), (1, 2)),
        keys=with_old(x.k, None if before is None else before.keys),
        values=with_old(x.v, None if before is None else before.values),
        biases=jnp.moveaxis(r[::-1].reshape(rows, groups, repeats, d_k), 0, 2),
    )
    out, lse = tiled.attend(tiles, by_block(first + old_blocks * block, mode="edge"))
    if unit.sink is not None:
        nothing = unit.sink.reshape(groups, repeats, 1)
        out = out * share_of_keys(lse, nothing)[..., None].astype(out.dtype)
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # [B, n, c, G, R, V]
    return out.reshape(batch, blocks * block, heads, -1)[:, :length]
