"""The engine done plainly: every token from scratch, all controls by lists and sorts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq import (
    Model,
    ModelConfig,
    SamplingParams,
    extend,
    init_state,
)
from transformer_vq.nn.model import model_specs

BATCH = 8  # the one batch shape of these tests: each shape is compiled
LENGTH = 96  # the longest sequence of the slow loop
VOCAB = 64  # so that digits and spaces are tokens


SIZES = dict(
    vocab_size=VOCAB,
    d_model=16,
    d_k=8,
    num_layers=1,
    codebook_size=6,
    window_len=7,
    block_len=32,
)


@functools.cache
def make_model(**fields):
    """A model of random numbers, made without a compilation; its predictions are not flat."""
    config = ModelConfig(**{**SIZES, **fields})
    rng = np.random.default_rng(0)

    def numbers(spec):
        if spec.init == "ones":
            return jnp.ones(spec.shape)
        return jnp.asarray(spec.scale * rng.normal(size=spec.shape), jnp.float32)

    params, codebook = jax.tree.map(numbers, model_specs(config))
    return Model({**params, "w_out": 1.5 * params["w_out"]}, codebook, config)


MODEL = make_model()
FULL = make_model(attention="full")
EXTEND = jax.jit(extend)


def padded(sequences, length):
    tokens = np.zeros((BATCH, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    lengths = np.zeros(BATCH, np.int32)
    lengths[: len(sequences)] = [len(s) for s in sequences]
    return tokens, lengths


def logits_after(model, sequences):
    """What follows each sequence, from scratch: `[rows, vocab]`."""
    tokens, lengths = padded(sequences, LENGTH)
    logits, _ = EXTEND(model, empty_state(model), tokens, lengths=lengths)
    return np.stack([logits[row, len(s) - 1] for row, s in enumerate(sequences)])


def log_softmax(logits):
    x = np.float64(logits) - np.float64(logits).max()
    return x - np.log(np.exp(x).sum())


def plain_filters(logits, prompt, output, p):
    """All controls, one row, by lists and sorts; a token that may not be drawn gets -inf."""
    x = np.float64(logits)
    for token, value in p.logit_bias.items():
        x[token] += value
    banned = set(p.banned_tokens)
    if p.allowed_tokens is not None:
        banned |= set(range(VOCAB)) - set(p.allowed_tokens)
    if len(output) < p.min_tokens:
        banned |= set(p.stop_tokens())
    for token in {*prompt, *output}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else (
            x[token] * p.repetition_penalty
        )  # fmt: skip
    for token in set(output):
        x[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    x[list(banned)] = -np.inf
    if p.temperature == 0:
        return np.where(np.arange(VOCAB) == x.argmax(), x, -np.inf)
    x /= p.temperature
    if p.top_k:
        x[x < np.sort(x)[-min(p.top_k, VOCAB)]] = -np.inf
    if p.top_p < 1:
        order = np.argsort(-x)
        mass = np.exp(log_softmax(x))[order]
        x[order[np.cumsum(mass) - mass >= p.top_p]] = -np.inf
    if p.min_p:
        mass = np.exp(log_softmax(x))
        x[mass < p.min_p * mass.max()] = -np.inf
    if p.typical_p < 1:
        log_p = log_softmax(x)
        mass = np.exp(log_p)
        entropy = -(mass[mass > 0] * log_p[mass > 0]).sum()
        order = np.argsort(np.abs(-log_p - entropy))
        mass = mass[order]
        x[order[np.cumsum(mass) - mass >= p.typical_p]] = -np.inf
    return x


def noise(seed, position):
    data = jnp.asarray([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(data), position)
    return np.asarray(jax.random.gumbel(key, (VOCAB,), jnp.float32))


def ends(output, p):
    """Length of the output without the stop sequence that it ends with; None without one."""
    for stop in p.stop_sequences():
        rest = len(output) - len(stop)
        if rest >= p.min_tokens and tuple(output[rest:]) == stop:
            return rest
    return None


def plain_generate(model, prompts, params):
    """The same requests as `generate`, one token at a time, each from scratch."""
    outputs = [[] for _ in prompts]
    done = [False] * len(prompts)
    while not all(done):
        logits = logits_after(model, [[*a, *b] for a, b in zip(prompts, outputs, strict=True)])
        for row, (prompt, output, p) in enumerate(zip(prompts, outputs, params, strict=True)):
            if done[row]:
                continue
            x = plain_filters(logits[row], prompt, output, p)
            output.append(int(np.argmax(x + noise(p.seed, len(prompt) + len(output)))))
            rest = ends(output, p)
            if rest is not None:
                del output[rest:]
            done[row] = rest is not None or len(output) == p.max_tokens
    return outputs


def random_prompt(rng, longest=16):
    return rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist()


def prompts_and_seeds(count=BATCH, seed=0, longest=16, **fields):
    rng = np.random.default_rng(seed)
    prompts = [random_prompt(rng, longest) for _ in range(count)]
    return prompts, [SamplingParams(seed=row, **fields) for row in range(count)]


def empty_state(model, rows=BATCH):
    """Always of the same capacity: each is compiled."""
    capacity = LENGTH if model.config.attention == "full" else None
    return init_state(model.config, rows, capacity=capacity)


def random_request(rng):
    def choose(*values):
        return values[rng.integers(len(values))]

    longest = choose(3, 16, 16, 40, 150)
    params = SamplingParams(
        max_tokens=int(choose(1, 5, 20, 33)),
        temperature=choose(0.0, 0.7, 1.0, 1.0, 1.8),
        top_k=choose(0, 0, 5),
        top_p=choose(1.0, 1.0, 0.9, 0.5),
        min_p=choose(0.0, 0.0, 0.1),
        typical_p=choose(1.0, 1.0, 0.8),
        repetition_penalty=choose(1.0, 1.0, 1.4),
        presence_penalty=choose(0.0, 0.0, 0.5),
        frequency_penalty=choose(0.0, 0.0, 0.2),
        logit_bias=choose({}, {}, {4: 1.0}),
        banned_tokens=choose((), (), (1, 2)),
        min_tokens=choose(0, 0, 4),
        stop=choose((), (), (7, 8), ([9], [3, 4])),
        logprobs=choose(False, False, False, True),
        seed=int(rng.integers(0, 2**63)),
    )
    return random_prompt(rng, longest), params
