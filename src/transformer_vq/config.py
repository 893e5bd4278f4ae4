"""Configuration: every size and switch of a model, of a training run and of a mesh of devices.

Standard library only, so that a configuration can be read, checked and written anywhere.
Names and symbols follow `docs/mathematics.md`; defaults follow the paper (arXiv 2309.16354).
A field has its default, its help and its limit in one line (`fields.py`); where a value such as 0
stands for something else, `also` says for what.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformer_vq.errors import ConfigError, shown
from transformer_vq.fields import MOST_SEED, check, choice, real, size, switch, whole
from transformer_vq.presets import PRESETS, TRAIN_PRESETS

HeadType = Literal["shga", "mqa", "mha"]
Attention = Literal["vq", "full"]
Forget = Literal["none", "constant", "gated"]
DType = Literal["float32", "bfloat16", "float16", "float64"]
Optimizer = Literal["adamw", "lion", "adafactor", "muon"]
Schedule = Literal["cosine", "linear", "inverse-sqrt", "wsd"]
Products = Literal["float32", "bfloat16"]
CodebookInit = Literal["data", "random"]

DEFAULT_CAPACITY = 4096  # tokens that a state of full attention holds, unless told otherwise
AUTO = 0  # left out: follows from other fields
# Fields that full attention has no use for, and the value that turns them off.
FOR_CODES = dict(
    far_decay=0,
    far_cap=0,
    forget="none",
    long_units=0,
    sphere_codewords=False,
    reach=0,
    soft_writes=False,
)
MLP_WIDTH = {"mqa": 5, "mha": 4}  # times d_model; shga has no MLP


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a model, except its parameters. Hashable: a static jit argument.

    `d_v` and `num_heads` left out (or 0) follow from the head type and are filled in.
    Raises `ConfigError`, naming the field, the value and the limit, if a value makes no sense.
    """

    vocab_size: int = size(256, "number of tokens; 256 for bytes")
    d_model: int = size(256, "width of the residual stream (D)", low=2)
    d_k: int = size(64, "width of queries, keys and codewords, per head (K)")
    d_v: int = whole(AUTO, "width of values per head (V)", low=1,
                     also={AUTO: "2 d_model (shga) or d_k (mqa, mha)"})  # fmt: skip
    num_heads: int = size(AUTO, "query heads (H)",
                          also={AUTO: "1 (shga) or d_model / d_k (mqa, mha)"})  # fmt: skip
    head_type: HeadType = choice(
        "shga", "shga: gated heads; mqa: one key/value head; mha: H of them"
    )
    num_layers: int = size(4, "layers: two gated units (shga), or attention and an MLP (mqa, mha)")
    codebook_size: int = size(256, "codewords per key/value head (S)")
    block_len: int = size(256, "queries handled together when the input is long (L)")
    window_len: int = size(256, "largest distance with a position bias and its own key (M)", low=0)
    attention: Attention = choice("vq", "vq: linear time; full: the quadratic baseline")
    use_cache: bool = switch(True, "attend keys beyond the window, by their codes")
    far_decay: float = real(0.0, "lower the score of a key at distance d by d / this, so that far "
                            "keys fade", "(9e-7, inf)", also={0: "never"})  # fmt: skip
    far_cap: int = whole(0, "let keys beyond the window weigh as if they were no more than this; "
                         "0: no limit")  # fmt: skip
    forget: Forget = choice(
        "none", "constant: keys fade, with a learned rate per key/value head; gated: the token "
        "decides how much the keys before it fade"
    )  # fmt: skip
    forget_horizon: float = real(8192.0, "no key outlives about so many tokens (tau_max), where "
                                 "there is forgetting", "(1, inf)")  # fmt: skip
    long_units: int = whole(0, "so many units, the last ones, forget by the horizon alone, where "
                            "there is forgetting: a gate may learn to keep little")  # fmt: skip
    key_shift: bool = switch(False, "mix each key with the one before it, by a learned share")
    score_gain: bool = switch(
        False, "a learned factor on the scores, per query head; sqrt(128 / d_k) at the start"
    )
    sink: bool = switch(False, "let queries attend to nothing, with a learned score per head")
    sphere_codewords: bool = switch(False, "codewords of the norm of keys: means, normalised")
    reach: int = whole(0, "in training, see keys one by one so many tokens back, so that they get "
                       "gradients; 0: the window's", high=2**20)  # fmt: skip
    soft_writes: bool = switch(False, "let gradients reach keys beyond the window, through the "
                               "codes that they might have had")  # fmt: skip
    zero_outputs: bool = switch(False, "what units add to the stream starts at zero")
    embedding_shortcut: bool = switch(False, "mix the embedded input into the input of each unit, "
                                      "by learned shares")  # fmt: skip
    grad_through_cache: bool = switch(True, "let gradients reach values beyond the window")
    reset_at_document: bool = switch(False, "a document attends to nothing before its start")
    absolute_positions: bool = switch(False, "add a sinusoid times a learned scalar to the input")
    max_wavelength: float = real(1e5, "longest wavelength of the sinusoids, over 2 pi", "(0, inf)")
    tie_embeddings: bool = switch(False, "use the input embedding as the output projection")
    final_norm: bool = switch(True, "normalise before the output projection")
    logit_scale: float = real(1.0, "factor on the logits", "(0, inf)")
    logit_cap: float = real(0.0, "keep logits between minus and plus this, by a tanh", "(0, inf)",
                            also={0: "do not"})  # fmt: skip
    commit_coefficient: float = real(1e-4, "weight of the commitment loss (beta)", "[0, inf)")
    codebook_decay: float = real(0.99, "moving average of codebook statistics (gamma)", "[0, 1)")
    dropout_embedding: float = real(0.0, "dropout on the embedded input", "[0, 1)")
    dropout_sinusoid: float = real(0.0, "dropout on the relative sinusoids, one mask a sequence",
                                   "[0, 1)")  # fmt: skip
    dropout_residual: float = real(0.0, "dropout on what each unit adds", "[0, 1)")
    dropout_layer: float = real(0.0, "drop a whole unit for a row, one mask a sequence (LayerDrop)",
                                "[0, 1)")  # fmt: skip
    compute_dtype: DType = choice("float32", "activations and products")
    param_dtype: DType = choice("float32", "parameters and codebook")
    products: Products = choice("float32", "bfloat16: round what products of training and prompts "
                                "multiply, their sums in float32; fast on some CPUs")  # fmt: skip
    state_dtype: DType = choice("float32", "values kept in a decoding state")

    def __post_init__(self) -> None:
        for name in ("compute_dtype", "param_dtype", "state_dtype"):
            value = getattr(self, name)  # numpy and jax dtypes are welcome: keep their name
            self._fill(name, getattr(value, "name", None) or getattr(value, "__name__", value))
        check(self)
        if self.d_model % 2:
            raise ConfigError(
                f"d_model is {self.d_model}: it must be even (sine and cosine halves)", "d_model"
            )
        if self.products != "float32" and self.compute_dtype != "float32":
            raise ConfigError(
                f"products is {self.products} and compute_dtype is {self.compute_dtype}: products "
                f"of float32 are what it rounds, so one of the two must be float32",
                "products",
            )
        if self.attention == "full":
            for name, off in FOR_CODES.items():
                if (value := getattr(self, name)) != off:
                    raise ConfigError(
                        f"{name} is {value}: full attention has no cache of codes, so it must be "
                        f'{off}, or attention "vq"',
                        name,
                    )
        if self.long_units > self.num_units:
            raise ConfigError(
                f"long_units is {self.long_units}, and there are {self.num_units} units: lower it",
                "long_units",
            )
        if self.num_heads == AUTO:
            if self.head_type != "shga":
                _require_multiple(self, "d_model", "d_k", ", or give num_heads")
            self._fill("num_heads", 1 if self.head_type == "shga" else self.d_model // self.d_k)
        if self.d_v == AUTO:
            self._fill("d_v", 2 * self.d_model if self.head_type == "shga" else self.d_k)

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    # Sizes that follow from the fields.

    @property
    def default_capacity(self) -> int | None:
        """Tokens that a state holds, unless it is made for more or fewer; None: any number."""
        return DEFAULT_CAPACITY if self.attention == "full" else None

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads (G): one codebook each."""
        return 1 if self.head_type == "mqa" else self.num_heads

    @property
    def num_units(self) -> int:
        """Residual attention units: what the layer scan runs over."""
        return 2 * self.num_layers if self.head_type == "shga" else self.num_layers

    @property
    def d_mlp(self) -> int:
        """Width of the MLP after each attention; 0 where there is none."""
        return MLP_WIDTH.get(self.head_type, 0) * self.d_model

    @property
    def ring_len(self) -> int:
        """Slots of the window ring: distances 0 to `window_len`, both included."""
        return self.window_len + 1

    @property
    def table_rows(self) -> int:
        """Rows of an attention unit's table: the ring's, one for each code, and up to 7 spare ones:
        a multiple of 8, so that a product with the table can be made in parts."""
        return -(-(self.ring_len + self.codebook_size) // 8) * 8

    @property
    def fades(self) -> bool:
        """Whether keys weigh less as tokens come after them."""
        return self.forget != "none" or self.far_decay > 0

    # Presets and files.

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ModelConfig":
        """The named configuration, with some fields replaced.

        Fields that follow from others (`d_v`, `num_heads`) follow the replaced ones, and what full
        attention has no use for is off where it is asked for.
        """
        return cls(**{**_preset(PRESETS, name), **_for_full(overrides), **overrides})

    def replace(self, **changes: Any) -> "ModelConfig":
        """This configuration with some fields replaced, and checked again.

        With `attention="full"` what it has no use for is turned off, unless it is in the changes.
        """
        return dataclasses.replace(self, **{**_for_full(changes), **changes})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises `ConfigError` for a field it does not know."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"the configuration is {shown(values)}: it must be a dictionary")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(
                f"unknown configuration field {shown(unknown[0])}: the fields are "
                f"{', '.join(known)}"
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """The inverse of `to_json`. Raises `ConfigError` for what is no such text."""
        if not isinstance(text, str | bytes):
            raise ConfigError(f"the configuration is {shown(text)}: it must be text, in JSON")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"the configuration is a JSON {type(values).__name__}, not an object")
        return cls.from_dict(values)


@dataclass(frozen=True)
class TrainConfig:
    """A training run: data per update, schedule, optimizer, and what is written when.

    Raises `ConfigError`, naming the field, the value and the limit, if a value makes no sense.
    """

    batch_size: int = whole(8, "sequences in a batch, over all devices", low=1)
    sequence_len: int = whole(1024, "tokens in a sequence", low=1)
    update_len: int = whole(AUTO, "tokens of each sequence per update, its state carried", low=1,
                            also={AUTO: "all"})  # fmt: skip
    steps: int = whole(1000, "updates", low=1)
    accumulate: int = whole(AUTO, "micro-batches that a batch is cut into, by rows", low=1,
                            also={AUTO: "1, on a CPU more"})  # fmt: skip
    optimizer: Optimizer = choice("adamw", "muon: for matrices of units, with Adam for the rest")
    learning_rate: float = real(1e-3, "peak learning rate", "(0, inf)")
    schedule: Schedule = choice(
        "cosine", "after the warm-up; wsd: stable, and a line down at the end"
    )
    warmup_steps: int = whole(100, "updates of linear warm-up from 0")
    decay_steps: int = whole(AUTO, "wsd: updates that the line down takes", low=1,
                             also={AUTO: "a fifth of all"})  # fmt: skip
    final_learning_rate: float = real(
        0.1, "where the schedule ends, as a fraction of the peak", "[0, inf)"
    )
    weight_decay: float = real(
        2e-4, "decay of matrices per update, not scaled by the rate", "[0, inf)"
    )
    grad_clip: float = real(1.0, "largest global norm of the gradient", "(0, inf)",
                            also={0: "no limit"})  # fmt: skip
    beta1: float = real(0.9, "Adam and Lion, decay of the first moment", "[0, 1)")
    beta2: float = real(
        0.98, "Adam, decay of the second moment; Lion, of the momentum it keeps", "[0, 1)"
    )
    momentum_warmup_steps: int = whole(
        0, "Muon, updates in which its momentum rises from 0.85 to 0.95; 0: it is 0.95"
    )
    epsilon: float = real(1e-9, "Adam, added to the root of the second moment", "(0, inf)")
    ema_decay: float = real(0.0, "average the weights, to evaluate and sample with", "(0, 1)",
                            also={0: "do not"})  # fmt: skip
    codebook_init: CodebookInit = choice("random", "data: keys of the first batch as codewords")
    revive_below: float = real(
        0.0,
        "set codewords used less than this part of the mean to keys",
        "(0, 1)",
        also={0: "none"},
    )
    streaming: bool = switch(
        False, "rows go on where they stopped, their state carried over batches"
    )
    repeat_passages: float = real(
        0.0,
        "share of the rows of text, until the last quarter, in which passages come again: "
        "to learn to copy",
        "(0, 1]",
        also={0: "none"},
    )
    remat: bool = switch(True, "recompute units in the backward pass: less memory, a little slower")
    seed: int = whole(0, "of parameters, data order and dropout", high=MOST_SEED)
    log_every: int = whole(10, "updates between lines of metrics.jsonl", low=1)
    evaluate_every: int = whole(250, "updates between validations", low=1,
                                also={0: "only at the end"})  # fmt: skip
    evaluate_tokens: int = whole(65_536, "tokens of the validation split that are scored", low=1,
                                 also={0: "all"})  # fmt: skip
    checkpoint_every: int = whole(250, "updates between checkpoints", low=1)
    keep_checkpoints: int = whole(3, "checkpoints that stay, besides the best one", low=1)
    sample_tokens: int = whole(200, "tokens written to samples.jsonl at each validation", low=1,
                               also={0: "none"})  # fmt: skip
    max_loss_spike: float = real(
        3.0, "stop if the loss is so many nats above the median of recent updates", "(0, inf)",
        also={0: "never"})  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.update_len == AUTO:
            object.__setattr__(self, "update_len", self.sequence_len)
        _require_multiple(self, "sequence_len", "update_len")
        if self.accumulate != AUTO:
            _require_multiple(self, "batch_size", "accumulate")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TrainConfig":
        """How the model of that name is trained, with some fields replaced."""
        return cls(**{**_preset(TRAIN_PRESETS, name), **overrides})

    @property
    def updates_per_sequence(self) -> int:
        """Updates that one batch of sequences gives."""
        return self.sequence_len // self.update_len

    def notes(self) -> list[str]:
        """What is allowed, and perhaps not meant: a sentence each."""
        notes, rest = [], self.steps - self.warmup_steps
        if rest <= 0:
            reached = self.learning_rate * (self.steps - 1) / self.warmup_steps
            notes.append(
                f"the warm-up takes {self.warmup_steps:,} updates and the run has {self.steps:,}: "
                f"the learning rate reaches {reached:.2g}, not {self.learning_rate:.2g}; lower "
                f"warmup_steps"
            )
        elif self.schedule == "wsd" and self.decay_steps > rest:
            notes.append(
                f"decay_steps is {self.decay_steps:,} and {rest:,} updates follow the warm-up: "
                f"the line down takes those"
            )
        return notes


@dataclass(frozen=True)
class MeshConfig:
    """How training is spread over devices: the size of each axis of the mesh.

    Raises `ConfigError`, naming the field, the value and the limit, if a value makes no sense.
    """

    data: int = whole(-1, "groups of devices that differ in their rows", low=1,
                      also={-1: "as many as there are"})  # fmt: skip
    fsdp: int = whole(
        1, "devices that share the parameters of a group, and differ in their rows", low=1
    )
    tensor: int = whole(
        1, "devices that share heads, hidden units and vocabulary of the same rows", low=1
    )

    def __post_init__(self) -> None:
        check(self)


def _preset(presets: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if not isinstance(name, str) or name not in presets:
        raise ConfigError(f"unknown preset {shown(name)}: the presets are {', '.join(presets)}")
    return presets[name]


def _for_full(changes: dict[str, Any]) -> dict[str, Any]:
    """What goes off with a change to full attention."""
    return FOR_CODES if changes.get("attention") == "full" else {}


def _require_multiple(config: Any, name: str, of: str, advice: str = "") -> None:
    """Raise `ConfigError` unless field `name` is a multiple of field `of`."""
    value, divisor = getattr(config, name), getattr(config, of)
    if value % divisor:
        raise ConfigError(
            f"{name} is {value}, not a multiple of {of}, {divisor}: change one of them{advice}",
            name,
        )
