"""Configuration: every size and switch of a model and of a training run; published presets.

Standard library only, so that a configuration can be read, checked and written anywhere.
Names and symbols follow `docs/mathematics.md`; defaults follow the paper (arXiv 2309.16354).
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformer_vq.errors import UserError

HeadType = Literal["shga", "mqa", "mha"]
Attention = Literal["vq", "full"]
DType = Literal["float32", "bfloat16", "float16", "float64"]
Optimizer = Literal["adamw", "lion", "adafactor", "muon"]
Schedule = Literal["cosine", "linear", "inverse-sqrt", "wsd"]
CodebookInit = Literal["data", "random"]

MLP_WIDTH = {"mqa": 5, "mha": 4}  # times d_model; shga has no MLP


def _doc(default: Any, text: str) -> Any:
    """A dataclass field whose help text the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a model, except its parameters. Hashable: a static jit argument.

    `d_v` and `num_heads` left out (or 0) follow from the head type and are filled in.
    Raises `ValueError`, naming the field, the value and the limit, if a value makes no sense.
    """

    vocab_size: int = _doc(256, "number of tokens; 256 for bytes")
    d_model: int = _doc(256, "width of the residual stream (D)")
    d_k: int = _doc(64, "width of queries, keys and codewords, per head (K)")
    d_v: int = _doc(0, "width of values per head (V); 0: 2 d_model (shga) or d_k (mqa, mha)")
    num_heads: int = _doc(0, "query heads (H); 0: 1 (shga) or d_model / d_k (mqa, mha)")
    head_type: HeadType = _doc("shga", "shga: gated heads; mqa: one key/value head; mha: H of them")
    num_layers: int = _doc(4, "layers: two gated units (shga), or attention and an MLP (mqa, mha)")
    codebook_size: int = _doc(256, "codewords per key/value head (S)")
    block_len: int = _doc(256, "queries handled together when the input is long (L)")
    window_len: int = _doc(256, "largest distance with a position bias and its own key (M)")
    attention: Attention = _doc("vq", "vq: linear time; full: the quadratic baseline")
    use_cache: bool = _doc(True, "attend keys beyond the window, by their codes")
    grad_through_cache: bool = _doc(True, "let gradients reach values beyond the window")
    reset_at_document: bool = _doc(False, "a document attends to nothing before its start")
    absolute_positions: bool = _doc(False, "add a sinusoid times a learned scalar to the input")
    max_wavelength: float = _doc(100_000.0, "longest wavelength of the sinusoids, over 2 pi")
    tie_embeddings: bool = _doc(False, "use the input embedding as the output projection")
    final_norm: bool = _doc(True, "normalise before the output projection")
    logit_scale: float = _doc(1.0, "factor on the logits")
    commit_coefficient: float = _doc(1e-4, "weight of the commitment loss (beta)")
    codebook_decay: float = _doc(0.99, "moving average of codebook statistics (gamma)")
    dropout_embedding: float = _doc(0.0, "dropout on the embedded input")
    dropout_sinusoid: float = _doc(0.0, "dropout on the relative sinusoids, one mask a sequence")
    dropout_residual: float = _doc(0.0, "dropout on what each unit adds")
    dropout_layer: float = _doc(0.0, "drop a whole unit for a row, one mask a sequence (LayerDrop)")
    compute_dtype: DType = _doc("float32", "activations and products")
    param_dtype: DType = _doc("float32", "parameters and codebook")
    state_dtype: DType = _doc("float32", "values kept in a decoding state")

    def __post_init__(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("compute_dtype", "param_dtype", "state_dtype"):
            value = getattr(self, name)  # numpy and jax dtypes are welcome: keep their name
            fill(name, getattr(value, "name", None) or getattr(value, "__name__", None) or value)
        _check_choices(self)
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if not value and name in ("d_v", "num_heads"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"{name} is {value!r}: it must be a whole number of at least {low}")
        for name in (*_PROBABILITIES, *_FINITE):
            try:
                fill(name, float(getattr(self, name)))
            except (TypeError, ValueError):
                raise UserError(f"{name} is {getattr(self, name)!r}: not a number") from None
        for name in _PROBABILITIES:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        for name in ("max_wavelength", "logit_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}: it must be a finite number above 0")
        if not (math.isfinite(self.commit_coefficient) and self.commit_coefficient >= 0):
            raise UserError(
                f"commit_coefficient is {self.commit_coefficient}: it must be finite, 0 or more"
            )
        if self.d_model % 2:
            raise UserError(f"d_model is {self.d_model}: it must be even (sine and cosine halves)")
        if not self.num_heads:
            if self.head_type != "shga" and self.d_model % self.d_k:
                raise UserError(
                    f"d_model is {self.d_model}, not a multiple of d_k, {self.d_k}: "
                    f"change one of them, or give num_heads"
                )
            fill("num_heads", 1 if self.head_type == "shga" else self.d_model // self.d_k)
        if not self.d_v:
            fill("d_v", 2 * self.d_model if self.head_type == "shga" else self.d_k)

    # Sizes that follow from the fields.

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
        """Rows of an attention unit's table: the ring's, one for each code, and up to 7 spare ones,
        so that their number can be divided (`nn.layers.parts_of`)."""
        return -(-(self.ring_len + self.codebook_size) // 8) * 8

    # Presets and files.

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ModelConfig":
        """The named configuration, with some fields replaced.

        Fields that follow from others (`d_v`, `num_heads`) follow the replaced ones.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}: the presets are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def replace(self, **changes: Any) -> "ModelConfig":
        """This configuration with some fields replaced, and checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises `ValueError` for a field it does not know."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UserError(
                f"unknown configuration field {unknown[0]!r}: the fields are {', '.join(known)}"
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"the configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"the configuration is a JSON {type(values).__name__}, not an object")
        return cls.from_dict(values)


_AT_LEAST = {
    "vocab_size": 1,
    "d_model": 2,
    "d_k": 1,
    "d_v": 1,
    "num_heads": 1,
    "num_layers": 1,
    "codebook_size": 1,
    "block_len": 1,
    "window_len": 0,
}
_PROBABILITIES = (
    "codebook_decay",
    "dropout_embedding",
    "dropout_sinusoid",
    "dropout_residual",
    "dropout_layer",
)
_FINITE = ("max_wavelength", "logit_scale", "commit_coefficient")


def _check_choices(config: Any) -> None:
    """Raise `ValueError` for a field with a few named values, or a switch, that has another."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{name} is {value!r}: it must be one of {', '.join(get_args(hint))}")
        if hint is bool and not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}: it must be true or false")


@dataclass(frozen=True)
class TrainConfig:
    """A training run: data per update, schedule, optimizer, and what is written when.

    Raises `ValueError`, naming the field, the value and the limit, if a value makes no sense.
    """

    batch_size: int = _doc(8, "sequences in a batch, over all devices")
    sequence_len: int = _doc(1024, "tokens in a sequence")
    update_len: int = _doc(0, "tokens of each sequence per update, its state carried; 0: all")
    steps: int = _doc(1000, "updates")
    accumulate: int = _doc(0, "parts of a batch, by rows, that take turns; 0: 1, on a CPU more")
    optimizer: Optimizer = _doc("adamw", "muon: for matrices of units, with Adam for the rest")
    learning_rate: float = _doc(1e-3, "peak learning rate")
    schedule: Schedule = _doc(
        "cosine", "after the warm-up; wsd: stable, and a line down at the end"
    )
    warmup_steps: int = _doc(100, "updates of linear warm-up from 0")
    decay_steps: int = _doc(0, "wsd: updates that the line down takes; 0: a fifth of all")
    final_learning_rate: float = _doc(0.1, "where the schedule ends, as a fraction of the peak")
    weight_decay: float = _doc(2e-4, "decay of matrices per update, not scaled by the rate")
    grad_clip: float = _doc(1.0, "largest global norm of the gradient; 0: no limit")
    beta1: float = _doc(0.9, "Adam and Lion, decay of the first moment")
    beta2: float = _doc(0.98, "Adam, decay of the second moment; Lion, of the momentum it keeps")
    epsilon: float = _doc(1e-9, "Adam, added to the root of the second moment")
    ema_decay: float = _doc(0.0, "average the weights, to evaluate and sample with; 0: do not")
    codebook_init: CodebookInit = _doc("random", "data: keys of the first batch as codewords")
    revive_below: float = _doc(
        0.0, "set codewords used less than this part of the mean to keys; 0: none"
    )
    streaming: bool = _doc(False, "rows go on where they stopped, their state carried over batches")
    remat: bool = _doc(True, "recompute units in the backward pass: less memory, a little slower")
    seed: int = _doc(0, "of parameters, data order and dropout")
    log_every: int = _doc(10, "updates between lines of metrics.jsonl")
    evaluate_every: int = _doc(250, "updates between validations; 0: only at the end")
    evaluate_tokens: int = _doc(65_536, "tokens of the validation split that are scored; 0: all")
    checkpoint_every: int = _doc(250, "updates between checkpoints")
    keep_checkpoints: int = _doc(3, "checkpoints that stay, besides the best one")
    sample_tokens: int = _doc(200, "tokens written to samples.jsonl at each validation; 0: none")
    max_loss_spike: float = _doc(
        3.0, "stop if the loss is so many nats above the median of recent updates; 0: never"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        for name, low in _TRAIN_AT_LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"{name} is {value!r}: it must be a whole number, {low} or more")
        for name in _TRAIN_NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UserError(f"{name} is {value!r}: it must be a number")
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}: it must be a finite number above 0")
        for name in ("final_learning_rate", "weight_decay", "grad_clip", "max_loss_spike"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}: it must be a finite number, 0 or more")
        for name in ("beta1", "beta2", "ema_decay", "revive_below"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        if not self.update_len:
            object.__setattr__(self, "update_len", self.sequence_len)
        if self.sequence_len % self.update_len:
            raise UserError(
                f"sequence_len is {self.sequence_len}, not a multiple of update_len, "
                f"{self.update_len}: change one of them"
            )
        if self.accumulate and self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size is {self.batch_size}, not a multiple of accumulate, "
                f"{self.accumulate}: change one of them"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TrainConfig":
        """How the model of that name is trained, with some fields replaced."""
        if name not in TRAIN_PRESETS:
            raise UserError(f"unknown preset {name!r}: the presets are {', '.join(TRAIN_PRESETS)}")
        return cls(**{**TRAIN_PRESETS[name], **overrides})

    @property
    def updates_per_sequence(self) -> int:
        """Updates that one batch of sequences gives."""
        return self.sequence_len // self.update_len


_TRAIN_NUMBERS = (
    "learning_rate",
    "final_learning_rate",
    "weight_decay",
    "grad_clip",
    "beta1",
    "beta2",
    "epsilon",
    "max_loss_spike",
    "ema_decay",
    "revive_below",
)
_TRAIN_AT_LEAST = {
    "batch_size": 1,
    "sequence_len": 1,
    "update_len": 0,
    "steps": 1,
    "accumulate": 0,
    "warmup_steps": 0,
    "decay_steps": 0,
    "seed": 0,
    "log_every": 1,
    "evaluate_every": 0,
    "evaluate_tokens": 0,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "sample_tokens": 0,
}


@dataclass(frozen=True)
class MeshConfig:
    """How training is spread over devices: the size of each axis of the mesh.

    Raises `ValueError`, naming the field, the value and the limit, if a value makes no sense.
    """

    data: int = _doc(-1, "groups of devices that differ in their rows; -1: as many as there are")
    fsdp: int = _doc(1, "devices that share the parameters of a group, and differ in their rows")
    tensor: int = _doc(1, "devices that share heads, hidden units and vocabulary of the same rows")

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            automatic = name == "data" and value == -1
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or (value < 1 and not automatic):
                raise UserError(f"{name} is {value!r}: it must be a whole number, 1 or more")


# The models of the paper (appendix, tables of hyperparameters) and two for small machines.
_PAPER = dict(
    d_k=128,
    num_layers=24,
    codebook_size=512,
    block_len=512,
    window_len=512,
    commit_coefficient=1e-4,
    codebook_decay=0.99,
    compute_dtype="bfloat16",
)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(d_model=128, d_k=32, num_layers=2, codebook_size=64, block_len=64, window_len=64),
    "small": dict(d_model=256, d_k=64, num_layers=4, codebook_size=256),
    "enwik8": dict(
        **_PAPER,
        vocab_size=256,
        d_model=768,
        final_norm=False,
        dropout_sinusoid=0.2,
        dropout_residual=0.5,
        dropout_layer=0.3,
    ),
    "pg19": dict(
        **_PAPER,
        vocab_size=32_000,
        d_model=2048,
        tie_embeddings=True,
        logit_scale=0.005,
        dropout_sinusoid=0.1,
        dropout_residual=0.1,
        dropout_layer=0.1,
    ),
    "imagenet64": dict(
        **_PAPER,
        vocab_size=256,
        d_model=2048,
        absolute_positions=True,
        tie_embeddings=True,
        logit_scale=0.005,
        dropout_sinusoid=0.1,
    ),
}

# How they are trained, in the same order (docs/training.md says what is of the paper).
_PAPER_TRAIN = dict(
    batch_size=128,
    warmup_steps=10_000,
    log_every=100,
    evaluate_every=1000,
    checkpoint_every=1000,
    keep_checkpoints=5,
)
_PAPER_ADAFACTOR = dict(
    **_PAPER_TRAIN,
    optimizer="adafactor",
    learning_rate=0.01,
    steps=500_000,
    weight_decay=0.0,
    grad_clip=0.0,
)
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": dict(sequence_len=2048, update_len=1024, steps=5000, warmup_steps=200),
    "enwik8": dict(
        **_PAPER_TRAIN,
        sequence_len=8192,
        update_len=2048,
        steps=125_000,
        learning_rate=4e-4,
        weight_decay=2e-4,
        grad_clip=0.1,
    ),
    "pg19": dict(**_PAPER_ADAFACTOR, sequence_len=8192, update_len=2048),
    "imagenet64": dict(**_PAPER_ADAFACTOR, sequence_len=12_288, update_len=1536),
}
