"""What a model costs: numbers, bytes and floating-point operations, from its configuration alone.

Standard library only. Symbols as in `docs/mathematics.md`: D d_model, H query heads, G key/value
heads, K d_k, V d_v, S codebook_size, L block_len, M window_len, W = M + 1, N units. A product of
`[a, b]` and `[b, c]` counts 2 a b c operations; everything else (norms, softmax, activations) is
left out, as is customary. What the programs compute is counted, masked or not.
"""

from transformer_vq.config import DEFAULT_CAPACITY, ModelConfig, TrainConfig

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_INT_BYTES = 4


def parameter_count(config: ModelConfig) -> int:
    """Numbers that are trained by gradient.

    N units of D (H K + G K + G V) for q, k, v, D H K for the positions, 2 H K for u and w, H V D
    for the output, 2 D for the norm, and D H V for the gate (shga) or an MLP of 2 D F + 2 D (mqa,
    mha; F its width). Outside of them vocab D for the embedding, as much for the output unless it
    is tied, vocab for its bias, and what the switches add: in a unit G for a rate of forgetting, D
    G for its gate, G K for key shift, H for gains and H for sinks, 2 for the shortcut.
    """
    d, vocab = config.d_model, config.vocab_size
    hk, hv = config.num_heads * config.d_k, config.num_heads * config.d_v
    unit = d * _qkv_width(config) + d * hk + 2 * hk + hv * d + 2 * d
    if config.head_type == "shga":
        unit += d * hv
    else:
        unit += 2 * d * config.d_mlp + 2 * d
    groups = config.num_kv_heads
    unit += groups if config.forget != "none" else 0
    unit += d * groups if config.forget == "gated" else 0
    unit += groups * config.d_k if config.key_shift else 0
    unit += config.num_heads * (config.score_gain + config.sink)
    unit += 2 if config.embedding_shortcut else 0
    outside = vocab * d + vocab
    outside += 0 if config.tie_embeddings else d * vocab
    outside += 2 * d if config.final_norm else 0
    outside += 1 if config.absolute_positions else 0
    return config.num_units * unit + outside


def least_training_bytes(config: ModelConfig, train: TrainConfig) -> int:
    """Bytes that training cannot do without: parameters, their gradients, codebooks, a batch."""
    numbers = 2 * parameter_count(config) + codebook_count(config)
    batch = train.batch_size * train.sequence_len * 2 * _INT_BYTES
    return numbers * _BYTES[config.param_dtype] + batch


def least_decoding_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes that decoding cannot do without: parameters, codebooks, a state for each row."""
    numbers = parameter_count(config) + codebook_count(config)
    return numbers * _BYTES[config.param_dtype] + batch * state_bytes(config)


def codebook_count(config: ModelConfig) -> int:
    """Numbers that are moving averages: N G S (K + 1), a sum and a count for each codeword."""
    return config.num_units * config.num_kv_heads * config.codebook_size * (config.d_k + 1)


def state_bytes(config: ModelConfig, capacity: int = DEFAULT_CAPACITY) -> int:
    """Bytes that a model remembers of one sequence.

    Per unit and key/value head, W + S whole numbers and a table of as many rows or a few more, V
    values each; for full attention the keys and values of `capacity` tokens, K + V each. Besides W
    ages where keys fade, and K of a key with key shift. Once, the logits and three whole numbers.
    """
    value = _BYTES[config.state_dtype]
    wide = max(_BYTES[config.compute_dtype], 4)
    if config.attention == "full":
        head = capacity * (config.d_k + config.d_v) * value
    else:
        head = config.table_rows * config.d_v * value + _attended(config) * _INT_BYTES
        head += config.ring_len * wide if config.fades else 0
    head += config.d_k * wide if config.key_shift else 0
    logits = config.vocab_size * wide
    return config.num_units * config.num_kv_heads * head + logits + 3 * _INT_BYTES


def slot_bytes(config: ModelConfig, capacity: int = DEFAULT_CAPACITY) -> int:
    """Bytes of a sequence in a slot of an engine.

    Its state, and for each token of the vocabulary what is added to its score, whether it was read,
    and how often it was written: 4, 1 and 4.
    """
    return state_bytes(config, capacity) + 9 * config.vocab_size


def serving_bytes(config: ModelConfig, slots: int, capacity: int = DEFAULT_CAPACITY) -> int:
    """Bytes that an engine has: the model, its weights again as decoding wants them, and rows.

    Those are the slots, the batch of one, and the prompt that is being read. What programs need on
    the way, and states that are kept, come on top.
    """
    model = least_decoding_bytes(config, 0)
    prepared = decode_bytes(config) - state_bytes(config)
    return model + prepared + (slots + 2) * slot_bytes(config, capacity)


def slots_that_fit(config: ModelConfig, memory: int, capacity: int = DEFAULT_CAPACITY) -> int:
    """The most slots of which the `serving_bytes` fit in so many bytes; 0 if not one does."""
    rest = memory - serving_bytes(config, 0, capacity)
    return max(0, rest // slot_bytes(config, capacity))


def decode_flops(config: ModelConfig, history: int = DEFAULT_CAPACITY) -> int:
    """Operations to decode one token, whatever came before it.

    The projections, and per unit 2 H K S for scores of the codes, 2 H K W for position biases,
    2 H V (W + S) for values, 2 G K S to find the key's code. For full attention, over a state with
    room for `history` tokens, 2 H (2 K + V) for each of them.
    """
    heads, k, v = config.num_heads, config.d_k, config.d_v
    if config.attention == "full":
        attention = 2 * heads * history * (2 * k + v)
    else:
        attention = 2 * heads * k * (config.codebook_size + config.ring_len)
        attention += 2 * heads * v * _attended(config)
        attention += _assign_flops(config)
    return config.num_units * (_projection_flops(config) + attention) + _output_flops(config)


def decode_bytes(config: ModelConfig, batch: int = 1) -> int:
    """Bytes read to decode one token for each of `batch` sequences: all weights once, states once.

    Every parameter but the embedding, of which each sequence reads a row (tied, it is the output
    projection and read whole). A prepared decoder reads a table of W H K numbers per unit in the
    place of the position matrix, D H K, and N G S K codewords. A step writes next to nothing.
    """
    number = _BYTES[config.compute_dtype]
    hk = config.num_heads * config.d_k
    weights = parameter_count(config)
    if not config.tie_embeddings:
        weights -= (config.vocab_size - batch) * config.d_model
    distances = DEFAULT_CAPACITY if config.attention == "full" else config.ring_len
    weights += config.num_units * (distances - config.d_model) * hk
    if config.attention == "vq":
        codewords = config.num_kv_heads * config.codebook_size * config.d_k
        weights += config.num_units * codewords
    return weights * number + batch * state_bytes(config)


def forward_flops(config: ModelConfig, length: int | None = None) -> int:
    """Operations per token of a forward pass over many tokens.

    It goes by blocks of L tokens (or `length`, if chunks are shorter). Per unit and token it takes
    the projections; scores and values over M + L keys and S codes, 2 H (K + V) each; position
    biases, 2 H K W; and codes, 2 G K S. Keys that leave join the cache by additions, which count
    nothing (devices that add by products make 2 G S V more). The output makes logits of every
    token, as scoring a text does; reading a prompt does not (2 D vocab less).
    """
    if config.attention == "full":
        return full_attention_train_flops(config, length or DEFAULT_CAPACITY) // 3
    heads, k, v = config.num_heads, config.d_k, config.d_v
    block = min(config.block_len, length or config.block_len)
    columns = config.window_len + block
    attention = 2 * heads * k * config.ring_len + _assign_flops(config)
    if config.use_cache:
        columns += config.codebook_size
    attention += 2 * heads * columns * (k + v)
    unit = _projection_flops(config) + attention
    return config.num_units * unit + _output_flops(config)


def prompt_flops(config: ModelConfig, length: int | None = None) -> int:
    """Operations per token of reading a prompt: `forward_flops`, without logits."""
    return forward_flops(config, length) - _output_flops(config)


def train_flops(config: ModelConfig, length: int | None = None) -> int:
    """Operations per token of training: three times the forward pass, for the gradients.

    Recomputing units (`TrainConfig.remat`) comes on top, another forward pass.
    """
    return 3 * forward_flops(config, length)


def run_flops(config: ModelConfig, train: TrainConfig) -> int:
    """`train_flops` of a run, per token: full attention meets the whole sequence in any update."""
    full = config.attention == "full"
    return train_flops(config, train.sequence_len if full else train.update_len)


def full_attention_train_flops(config: ModelConfig, length: int) -> int:
    """`train_flops` of the quadratic baseline on sequences of `length` tokens.

    Blocks of L queries (`length`, if that is less) meet the blocks of keys up to their own, so of
    n blocks n (n + 1) / 2 pairs of L L tokens are computed: (length + L) / 2 keys for a token where
    L divides the length, and all of them with one block, which is the whole matrix. For each key 2
    H (2 K + V): content score, position bias, value. (What a block computes twice is not counted:
    scores for the backward pass, and biases of up to 2 L distances for L keys.)
    """
    heads, k, v = config.num_heads, config.d_k, config.d_v
    block = min(config.block_len, length)
    blocks = -(-length // block)
    keys = blocks * (blocks + 1) * block**2 // 2 / length
    attention = round(2 * heads * keys * (2 * k + v))
    unit = _projection_flops(config) + attention
    return 3 * (config.num_units * unit + _output_flops(config))


def _attended(config: ModelConfig) -> int:
    """Keys that a token attends to when decoding: the window's, and one for each code."""
    return config.ring_len + config.codebook_size


def _qkv_width(config: ModelConfig) -> int:
    heads, groups = config.num_heads, config.num_kv_heads
    return heads * config.d_k + groups * (config.d_k + config.d_v)


def _projection_flops(config: ModelConfig) -> int:
    """Per unit and token: q, k, v, gate or MLP, and output; each weight multiplies and adds."""
    d, hv = config.d_model, config.num_heads * config.d_v
    extra = d * hv if config.head_type == "shga" else 2 * d * config.d_mlp
    return 2 * (d * _qkv_width(config) + hv * d + extra)


def _assign_flops(config: ModelConfig) -> int:
    return 2 * config.num_kv_heads * config.codebook_size * config.d_k


def _output_flops(config: ModelConfig) -> int:
    return 2 * config.d_model * config.vocab_size
