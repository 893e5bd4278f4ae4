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


def quadratic_attention(q, k, v, codewords, u, w, r, config, document_ids):
    """Outputs `[B, T, H, V]`, codes `[B, T, H]` and |k - C_z|^2 `[B, T, H]`.

    q, k `[B, T, H, K]`, v `[B, T, H, V]`, codewords `[H, S, K]`, u, w `[H, K]`, r `[T, H, K]`
    (one row per distance), document_ids `[B, T]`. Key/value heads are repeated by the caller.
    """
    t = jnp.arange(q.shape[1])
    distance = t[:, None] - t[None, :]
    near = distance <= config.window_len
    errors = jnp.sum((k[..., None, :] - codewords) ** 2, axis=-1)  # [B, T, H, S]
    codes = jnp.argmin(errors, axis=-1)
    if config.attention == "vq":
        quantized = sg(jnp.take_along_axis(codewords[None, None], codes[..., None, None], axis=3))
        quantized = quantized[..., 0, :]
        # Straight-through gradients reach the keys from the window of the query's block on.
        block_start = t // config.block_len * config.block_len
        reach = t[None, :] >= block_start[:, None] - config.window_len
        content = jnp.where(
            reach,
            jnp.einsum("bthk,bjhk->bhtj", q + u, k + sg(quantized - k)),
            jnp.einsum("bthk,bjhk->bhtj", q + u, quantized),
        )
        position_bias_reach = near
    else:
        content = jnp.einsum("bthk,bjhk->bhtj", q + u, k)
        position_bias_reach = jnp.ones_like(near)
    bias = jnp.einsum("bthk,tjhk->bhtj", q + w, r[jnp.maximum(distance, 0)])
    scores = content + jnp.where(position_bias_reach, bias, 0.0)
    if config.far_decay:
        scores = scores - jnp.maximum(distance, 0).astype(scores.dtype) / config.far_decay
    if config.far_cap:  # as if no more keys than so many were beyond the window
        start = first_of_document(document_ids) if config.reset_at_document else 0
        beyond = jnp.maximum(t - start - config.window_len, 1)
        offset = -jnp.log(jnp.maximum(beyond / config.far_cap, 1.0))
        offset = jnp.broadcast_to(offset, q.shape[:2])[:, None, :, None]
        scores = scores + jnp.where(near, 0.0, offset)

    visible = jnp.broadcast_to(distance >= 0, (q.shape[0], 1, *distance.shape))
    if config.attention == "vq" and not config.use_cache:
        visible = visible & near
    if config.reset_at_document:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
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
    commitment = 0.0
    for i in range(config.num_units):
        p, c = jax.tree.map(lambda a, i=i: a[i], (params["units"], codebook))

        def split(y, n):
            return y.reshape(batch, length, n, -1)

        y = rms(x) * p["norm"]["gain"] + p["norm"]["bias"]
        q = scale * rms(split(y @ p["w_q"], heads))
        k = scale * rms(split(y @ p["w_k"], kv_heads))
        v = split(y @ p["w_v"], kv_heads)
        if config.head_type == "shga":
            v = jax.nn.silu(v)
        wave = sinusoid(jnp.arange(length), config.d_model, config.max_wavelength)
        u, w = (scale * p[name].reshape(heads, -1) for name in ("u", "w"))
        r = scale * (wave @ p["w_r"]).reshape(length, heads, -1)
        words = sg(c["sum"] / jnp.maximum(c["count"], 0.01)[..., None])

        repeats = heads // kv_heads
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        words = jnp.repeat(words, repeats, axis=0)
        o, _, errors = quadratic_attention(q, k, v, words, u, w, r, config, document_ids)
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
    return config.logit_scale * (x @ w_out + params["output_bias"]), commitment
