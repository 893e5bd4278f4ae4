"""The oracle: Transformer-VQ as plain quadratic attention over quantized keys.

Slow and short on purpose; imports nothing of ours. Everything fast is tested against it.
Shapes use the legend of `transformer_vq.types`; `params` and `codebook` are a model's.
"""

import jax
import jax.numpy as jnp

sg = jax.lax.stop_gradient


def rms(x):
    """x over its root mean square along the last axis."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def sinusoid(positions, width, max_wavelength):
    """Sines and cosines of positions `[...]`: `[..., width]`."""
    frequencies = max_wavelength ** (-jnp.arange(0, width, 2) / width)
    angles = positions[..., None].astype(frequencies.dtype) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def log_fades(x, p, unit, config):
    """l `[B, T, G]` of normed features, below 0: what token t adds to the score of every older key.

    No l is below -20: nothing is left of a key then, and long sums stay small.
    """
    fades = jnp.zeros((*x.shape[:2], config.num_kv_heads), x.dtype)
    if config.forget != "none":
        gate = x @ p["w_forget"] if config.forget == "gated" else 0.0
        if unit < config.num_units - config.long_units:
            fades -= jax.nn.softplus(-(gate + p["b_forget"]))
        fades -= 1 / config.forget_horizon
    if config.far_decay:
        fades -= 1 / config.far_decay
    return jnp.maximum(fades, -20.0)


def shifted(k, p, config, document_ids):
    """Keys `[B, T, G, K]`, each mixed with the one before it in its document."""
    mix = jax.nn.sigmoid(p["key_shift"]).reshape(config.num_kv_heads, config.d_k)
    before = jnp.pad(k, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    if config.reset_at_document:
        same = document_ids == jnp.pad(document_ids, ((0, 0), (1, 0)))[:, :-1]
        before = jnp.where(same[..., None, None], before, 0.0)
    return (1 - mix) * k + mix * before


def soft_scores(q, k, codewords, codes, far):
    """Content scores `[B, H, T, J]` of keys in the cache, whose gradient is that of soft writes.

    Key j is written to code s with weight A_js: 1 or 0 in value, in gradient softmax_s(k_j . C_s).
    A code that holds none of the keys `far` `[B or 1, H or 1, T, J]` from a query takes no part.
    """
    chosen = jax.nn.one_hot(codes, codewords.shape[1], dtype=q.dtype)  # [B, J, H, S]
    soft = jax.nn.softmax(jnp.einsum("bjhk,hsk->bjhs", k, codewords), axis=-1)
    weights = chosen + soft - sg(soft)
    far = jnp.broadcast_to(far, (q.shape[0], q.shape[2], *far.shape[2:]))
    held = jnp.einsum("bhtj,bjhs->bhts", far.astype(q.dtype), chosen)
    content = jnp.einsum("bthk,hsk->bhts", q, codewords)
    top = sg(content.max(-1, keepdims=True))
    mass = jnp.where(held > 0, jnp.exp(content - top), 0.0)
    exponentials = jnp.einsum("bhts,bjhs->bhtj", mass, weights)
    return jnp.where(far, top + jnp.log(jnp.where(far, exponentials, 1.0)), 0.0)


def quadratic_attention(
    q, k, v, codewords, u, w, r, config, document_ids, *, gain=None, fades=None, sink=None
):
    """Outputs `[B, T, H, V]`, codes `[B, T, H]` and |k - C_z|^2 `[B, T, H]`.

    q, k `[B, T, H, K]`, v `[B, T, H, V]`, codewords `[H, S, K]`, u, w `[H, K]`, r `[T, H, K]`
    (one row per distance), document_ids `[B, T]`. Key/value heads are repeated by the caller.
    Where a model has them: gain `[H]`, fades l `[B, T, H]` (`log_fades`) and sink `[H]`.
    The formulas are those of docs/mathematics.md: "One attention unit", and "A bounded past".
    """
    if gain is not None:
        q, u, w = (gain[:, None] * x for x in (q, u, w))
    t = jnp.arange(q.shape[1])
    distance = t[:, None] - t[None, :]
    near = distance <= config.window_len
    visible = jnp.broadcast_to(distance >= 0, (q.shape[0], 1, *distance.shape))
    if config.attention == "vq" and not config.use_cache:
        visible = visible & near
    if config.reset_at_document:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])

    errors = jnp.sum((k[..., None, :] - codewords) ** 2, axis=-1)  # [B, T, H, S]
    codes = jnp.argmin(errors, axis=-1)
    if config.attention == "vq":
        quantized = sg(jnp.take_along_axis(codewords[None, None], codes[..., None, None], axis=3))
        quantized = quantized[..., 0, :]
        # Straight-through gradients reach the keys from the window of the query's block on.
        block_start = t // config.block_len * config.block_len
        span = t[None, :] >= block_start[:, None] - max(config.window_len, config.reach)
        straight = k + sg(quantized - k)
        beyond = jnp.einsum("bthk,bjhk->bhtj", q + u, quantized)
        if config.soft_writes:
            beyond = soft_scores(q + u, straight, codewords, codes, visible & ~span)
        content = jnp.where(span, jnp.einsum("bthk,bjhk->bhtj", q + u, straight), beyond)
        biased = near
    else:
        content = jnp.einsum("bthk,bjhk->bhtj", q + u, k)
        biased = jnp.ones_like(near)
    bias = jnp.einsum("bthk,tjhk->bhtj", q + w, r[jnp.maximum(distance, 0)])
    scores = content + jnp.where(biased, bias, 0.0)
    if fades is not None:  # D_t - D_j: the sum of l over the tokens after the key, up to the query
        total = jnp.moveaxis(jnp.cumsum(fades, axis=1), 1, 2)
        scores = scores + total[..., :, None] - total[..., None, :]
    if config.far_cap:  # as if no more keys than so many were beyond the window
        start = first_of_document(document_ids) if config.reset_at_document else 0
        beyond = jnp.maximum(t - start - config.window_len, 1)
        offset = -jnp.log(jnp.maximum(beyond / config.far_cap, 1.0))
        offset = jnp.broadcast_to(offset, q.shape[:2])[:, None, :, None]
        scores = scores + jnp.where(near, 0.0, offset)

    scores = jnp.where(visible, scores, -jnp.inf)
    if sink is not None:  # a key of value 0 that every query sees
        nothing = jnp.broadcast_to(sink[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, nothing], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : len(t)]
    commitment = jnp.min(errors, axis=-1)
    return jnp.einsum("bhtj,bjhv->bthv", weights, v), codes, commitment


def first_of_document(document_ids):
    """Index `[B, T]` of the first token of each token's document."""
    t = jnp.broadcast_to(jnp.arange(document_ids.shape[1]), document_ids.shape)
    starts = document_ids != jnp.pad(document_ids, ((0, 0), (1, 0)))[:, :-1]
    return jax.lax.cummax(jnp.where(starts, t, 0), axis=1)


def reference_logits(params, codebook, config, tokens, document_ids=None):
    """Logits `[B, T, vocab_size]` of a whole sequence, and the sum of commitment errors."""
    batch, length = tokens.shape
    heads, kv_heads = config.num_heads, config.num_kv_heads
    scale = config.d_k**-0.25
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    if document_ids is None:
        document_ids = jnp.zeros_like(tokens)
    if config.reset_at_document:  # positions count from the start of each document
        positions -= first_of_document(document_ids)

    x = params["embedding"][tokens]
    if config.absolute_positions:
        wave = sinusoid(positions, config.d_model, config.max_wavelength)
        x = x + params["position_scale"] * wave
    embedded = x
    commitment = 0.0
    for i in range(config.num_units):
        p, c = jax.tree.map(lambda a, i=i: a[i], (params["units"], codebook))

        def split(y, n):
            return y.reshape(batch, length, n, -1)

        if config.embedding_shortcut:
            x = p["shortcut"][0] * x + p["shortcut"][1] * embedded
        y = rms(x) * p["norm"]["gain"] + p["norm"]["bias"]
        q = scale * rms(split(y @ p["w_q"], heads))
        k = split(y @ p["w_k"], kv_heads)
        k = scale * rms(shifted(k, p, config, document_ids) if config.key_shift else k)
        v = split(y @ p["w_v"], kv_heads)
        if config.head_type == "shga":
            v = jax.nn.silu(v)
        wave = sinusoid(jnp.arange(length), config.d_model, config.max_wavelength)
        u, w = (scale * p[name].reshape(heads, -1) for name in ("u", "w"))
        r = scale * (wave @ p["w_r"]).reshape(length, heads, -1)
        words = sg(c["sum"] / jnp.maximum(c["count"], 0.01)[..., None])
        if config.sphere_codewords:
            words = scale * rms(words)

        repeats = heads // kv_heads
        fades = None
        if config.forget != "none" or config.far_decay:
            fades = jnp.repeat(log_fades(y, p, i, config), repeats, axis=2)
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        words = jnp.repeat(words, repeats, axis=0)
        o, _, errors = quadratic_attention(
            *(q, k, v, words, u, w, r, config, document_ids),
            gain=p["score_gain"] if config.score_gain else None,
            fades=fades,
            sink=p["sink"] if config.sink else None,
        )
        commitment += jnp.sum(errors) / repeats
        o = o.reshape(batch, length, -1)
        if config.head_type == "shga":
            o = o * jax.nn.silu(y @ p["w_g"])
        x = x + o @ p["w_o"]
        if config.head_type != "shga":
            m = p["mlp"]
            y = rms(x) * m["norm"]["gain"] + m["norm"]["bias"]
            x = x + jax.nn.relu(y @ m["w_in"]) ** 2 @ m["w_out"]

    if config.final_norm:
        x = rms(x) * params["final_norm"]["gain"] + params["final_norm"]["bias"]
    w_out = params["embedding"].T if config.tie_embeddings else params["w_out"]
    logits = config.logit_scale * (x @ w_out + params["output_bias"])
    if config.logit_cap:
        logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
    return logits, commitment
