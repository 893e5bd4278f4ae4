"""Configurations: files and back, clear refusals, and presets with the published sizes."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_vq import ModelConfig, init_model
from transformer_vq.config import PRESETS, TRAIN_PRESETS, TrainConfig

# ---------------------------------------------------------------- files


@st.composite
def model_configs(draw):
    """Any valid configuration; every field is drawn."""
    head_type = draw(st.sampled_from(["shga", "mqa", "mha"]))
    size, rate = st.integers(1, 10**6), st.floats(0, 1, exclude_max=True)
    positive = st.floats(0, 1e300, exclude_min=True)
    dtype = st.sampled_from(["float32", "bfloat16", "float16", "float64"])
    d_k, heads = draw(st.integers(1, 99)), draw(st.integers(1, 99))
    derived = draw(st.booleans())  # leave out what follows from other fields
    fields = {
        "vocab_size": draw(size),
        "d_model": 2 * d_k * heads,
        "d_k": d_k,
        "d_v": 0 if derived else draw(size),
        "num_heads": 0 if derived else draw(size),
        "head_type": head_type,
        "num_layers": draw(size),
        "codebook_size": draw(size),
        "block_len": draw(size),
        "window_len": draw(st.integers(0, 10**6)),
        "attention": draw(st.sampled_from(["vq", "full"])),
        "max_wavelength": draw(positive),
        "logit_scale": draw(positive),
        "commit_coefficient": draw(st.floats(0, 1e300)),
    }
    for name, value in _fields(ModelConfig).items():
        if isinstance(value, bool):
            fields[name] = draw(st.booleans())
        elif name.startswith("dropout_") or name == "codebook_decay":
            fields[name] = draw(rate)
        elif name.endswith("_dtype"):
            fields[name] = draw(dtype)
    assert fields.keys() == _fields(ModelConfig).keys()
    return ModelConfig(**fields)


def _fields(cls):
    return {field.name: field.default for field in dataclasses.fields(cls)}


@given(model_configs())
def test_json_and_back(config):
    text = config.to_json()
    again = ModelConfig.from_json(text)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == text
    assert json.loads(text) == config.to_dict()
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.replace() == config
    assert config.replace(vocab_size=config.vocab_size + 1) != config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the configuration is not JSON: "),
        ("[1, 2]", "the configuration is a JSON list, not an object"),
        ("3", "the configuration is a JSON int, not an object"),
        ('{"d_modle": 8}', "unknown configuration field 'd_modle': the fields are vocab_size, "),
        ('{"d_model": -8}', "d_model is -8: "),
        ('{"d_model": "8"}', "d_model is '8': "),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ModelConfig.from_json(text)


def test_a_missing_field_has_its_default():
    assert ModelConfig.from_json('{"d_model": 128}') == ModelConfig(d_model=128)


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), jax.numpy.float32, "float32"])
def test_dtypes_are_named(dtype):
    config = ModelConfig(compute_dtype=dtype)
    assert config.compute_dtype == "float32"
    assert config == ModelConfig()
    assert ModelConfig(param_dtype=jax.numpy.bfloat16).param_dtype == "bfloat16"


def test_standard_library_only():
    """A configuration can be read where nothing else is installed."""
    code = "import sys; sys.modules['jax'] = sys.modules['numpy'] = None; exec(open({!r}).read())"
    path = sys.modules["transformer_vq.config"].__file__
    subprocess.run([sys.executable, "-I", "-c", code.format(path)], check=True)


# ---------------------------------------------------------------- refusals


def refused(make, cls, fields, message):
    """Refused with just this sentence, which names a field and its value."""
    with pytest.raises(ValueError) as error:
        make(cls, **fields)
    assert str(error.value) == message
    name, value = next(iter(fields.items()))
    assert message.startswith(f"{name} is ")
    assert str(value) in message


WHOLE = "it must be a whole number of at least"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vocab_size=0), f"vocab_size is 0: {WHOLE} 1"),
        (dict(d_model=1), f"d_model is 1: {WHOLE} 2"),
        (dict(d_k=0), f"d_k is 0: {WHOLE} 1"),
        (dict(d_v=-1), f"d_v is -1: {WHOLE} 1"),
        (dict(num_heads=-3), f"num_heads is -3: {WHOLE} 1"),
        (dict(num_layers=0), f"num_layers is 0: {WHOLE} 1"),
        (dict(codebook_size=0), f"codebook_size is 0: {WHOLE} 1"),
        (dict(block_len=0), f"block_len is 0: {WHOLE} 1"),
        (dict(window_len=-1), f"window_len is -1: {WHOLE} 0"),
        (dict(num_layers=2.0), f"num_layers is 2.0: {WHOLE} 1"),
        (dict(num_layers=True), f"num_layers is True: {WHOLE} 1"),
        (dict(num_layers="2"), f"num_layers is '2': {WHOLE} 1"),
        (dict(num_layers=None), f"num_layers is None: {WHOLE} 1"),
        (dict(d_v=1.5), f"d_v is 1.5: {WHOLE} 1"),
        (dict(d_model=7), "d_model is 7: it must be even (sine and cosine halves)"),
        (
            dict(d_model=100, d_k=64, head_type="mqa"),
            "d_model is 100, not a multiple of d_k, 64: change one of them, or give num_heads",
        ),
        (dict(head_type="gqa"), "head_type is 'gqa': it must be one of shga, mqa, mha"),
        (dict(attention="linear"), "attention is 'linear': it must be one of vq, full"),
        (
            dict(compute_dtype="int8"),
            "compute_dtype is 'int8': it must be one of float32, bfloat16, float16, float64",
        ),
        (
            dict(param_dtype="f32"),
            "param_dtype is 'f32': it must be one of float32, bfloat16, float16, float64",
        ),
        (
            dict(state_dtype=None),
            "state_dtype is None: it must be one of float32, bfloat16, float16, float64",
        ),
        (dict(codebook_decay=1.0), "codebook_decay is 1.0: it must be in [0, 1)"),
        (dict(codebook_decay=float("nan")), "codebook_decay is nan: it must be in [0, 1)"),
        (dict(dropout_embedding=-0.1), "dropout_embedding is -0.1: it must be in [0, 1)"),
        (dict(dropout_sinusoid=1.5), "dropout_sinusoid is 1.5: it must be in [0, 1)"),
        (dict(dropout_residual="x"), "dropout_residual is 'x': not a number"),
        (dict(dropout_layer=None), "dropout_layer is None: not a number"),
        (dict(max_wavelength=0.0), "max_wavelength is 0.0: it must be a finite number above 0"),
        (
            dict(max_wavelength=float("inf")),
            "max_wavelength is inf: it must be a finite number above 0",
        ),
        (dict(logit_scale=-1.0), "logit_scale is -1.0: it must be a finite number above 0"),
        (
            dict(commit_coefficient=-1e-4),
            "commit_coefficient is -0.0001: it must be finite, 0 or more",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_model_config_refuses(fields, message):
    refused(lambda cls, **f: cls(**f), ModelConfig, fields, message)
    refused(lambda cls, **f: cls().replace(**{"num_heads": 0, **f}), ModelConfig, fields, message)


@pytest.mark.parametrize("name", [n for n, v in _fields(ModelConfig).items() if type(v) is bool])
def test_switches_are_true_or_false(name):
    for value in ("false", "no", 2, None):
        with pytest.raises(ValueError, match=f"^{name} is {value!r}: "):
            ModelConfig(**{name: value})


MORE = "it must be a whole number,"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(batch_size=0), f"batch_size is 0: {MORE} 1 or more"),
        (dict(sequence_len=0), f"sequence_len is 0: {MORE} 1 or more"),
        (dict(update_len=-1), f"update_len is -1: {MORE} 0 or more"),
        (dict(steps=0), f"steps is 0: {MORE} 1 or more"),
        (dict(steps=10.0), f"steps is 10.0: {MORE} 1 or more"),
        (dict(steps=True), f"steps is True: {MORE} 1 or more"),
        (dict(warmup_steps=-1), f"warmup_steps is -1: {MORE} 0 or more"),
        (dict(seed=-1), f"seed is -1: {MORE} 0 or more"),
        (dict(log_every=0), f"log_every is 0: {MORE} 1 or more"),
        (dict(evaluate_every=-1), f"evaluate_every is -1: {MORE} 0 or more"),
        (dict(evaluate_tokens=-1), f"evaluate_tokens is -1: {MORE} 0 or more"),
        (dict(checkpoint_every=0), f"checkpoint_every is 0: {MORE} 1 or more"),
        (dict(keep_checkpoints=0), f"keep_checkpoints is 0: {MORE} 1 or more"),
        (dict(learning_rate=0.0), "learning_rate is 0.0: it must be a finite number above 0"),
        (
            dict(learning_rate=float("nan")),
            "learning_rate is nan: it must be a finite number above 0",
        ),
        (dict(epsilon=-1e-9), "epsilon is -1e-09: it must be a finite number above 0"),
        (
            dict(final_learning_rate=-0.1),
            "final_learning_rate is -0.1: it must be a finite number, 0 or more",
        ),
        (dict(weight_decay=-1.0), "weight_decay is -1.0: it must be a finite number, 0 or more"),
        (
            dict(grad_clip=float("inf")),
            "grad_clip is inf: it must be a finite number, 0 or more",
        ),
        (dict(beta1=1.0), "beta1 is 1.0: it must be in [0, 1)"),
        (dict(beta2=-0.5), "beta2 is -0.5: it must be in [0, 1)"),
        (
            dict(sequence_len=100, update_len=64),
            "sequence_len is 100, not a multiple of update_len, 64: change one of them",
        ),
        (
            dict(sequence_len=64, update_len=128),
            "sequence_len is 64, not a multiple of update_len, 128: change one of them",
        ),
        (
            dict(optimizer="adam"),
            "optimizer is 'adam': it must be one of adamw, lion, adafactor, muon",
        ),
        (
            dict(schedule="flat"),
            "schedule is 'flat': it must be one of cosine, linear, inverse-sqrt, wsd",
        ),
        (dict(decay_steps=-1), "decay_steps is -1: it must be a whole number, 0 or more"),
        (dict(accumulate=-1), "accumulate is -1: it must be a whole number, 0 or more"),
        (
            dict(batch_size=8, accumulate=3),
            "batch_size is 8, not a multiple of accumulate, 3: change one of them",
        ),
        (dict(ema_decay=1.0), "ema_decay is 1.0: it must be in [0, 1)"),
        (dict(revive_below=-0.1), "revive_below is -0.1: it must be in [0, 1)"),
        (dict(codebook_init="zeros"), "codebook_init is 'zeros': it must be one of data, random"),
        (dict(streaming=1), "streaming is 1: it must be true or false"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_train_config_refuses(fields, message):
    refused(lambda cls, **f: cls(**f), TrainConfig, fields, message)


@pytest.mark.parametrize("name", ["learning_rate", "grad_clip", "beta1"])
def test_train_config_wants_numbers(name):
    with pytest.raises(ValueError, match=f"^{name} is 'x': "):
        TrainConfig(**{name: "x"})


def test_limits_are_allowed():
    """What stands just inside of each limit."""
    ModelConfig(vocab_size=1, d_model=2, d_k=1, d_v=1, num_heads=1, num_layers=1, window_len=0)
    ModelConfig(codebook_size=1, block_len=1, codebook_decay=0, commit_coefficient=0)
    ModelConfig(dropout_layer=0.999, logit_scale=1e-30, d_model=100, head_type="mqa", num_heads=3)
    TrainConfig(warmup_steps=0, seed=0, evaluate_every=0, evaluate_tokens=0, grad_clip=0, beta1=0)
    assert TrainConfig(sequence_len=96, update_len=0).update_len == 96
    assert TrainConfig(sequence_len=96, update_len=32).updates_per_sequence == 3
    assert TrainConfig(sequence_len=96).updates_per_sequence == 1


def test_configs_are_frozen_and_documented():
    for cls in (ModelConfig, TrainConfig):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), next(iter(_fields(cls))), 3)
        for field in dataclasses.fields(cls):
            assert len(field.metadata["help"]) > 5, field.name


# ---------------------------------------------------------------- sizes that follow


@pytest.mark.parametrize(
    ("head_type", "sizes"),
    [
        # num_heads, num_kv_heads, d_v, num_units, d_mlp
        ("shga", (1, 1, 128, 6, 0)),
        ("mqa", (4, 1, 16, 3, 320)),
        ("mha", (4, 4, 16, 3, 256)),
    ],
)
def test_sizes_that_follow(head_type, sizes):
    config = ModelConfig(d_model=64, d_k=16, num_layers=3, window_len=7, head_type=head_type)
    names = ("num_heads", "num_kv_heads", "d_v", "num_units", "d_mlp")
    assert tuple(getattr(config, name) for name in names) == sizes
    assert config.ring_len == 8
    assert config.replace(d_v=10, num_heads=2).d_v == 10
    two = ModelConfig(d_model=64, num_heads=2)
    assert (two.num_heads, two.num_kv_heads) == (2, 2)  # several gated heads have their own keys


# ---------------------------------------------------------------- presets

PAPER = dict(
    head_type="shga",
    d_k=128,
    num_heads=1,
    num_layers=24,
    codebook_size=512,
    block_len=512,
    window_len=512,
    attention="vq",
    use_cache=True,
    max_wavelength=100_000.0,
    commit_coefficient=1e-4,
    codebook_decay=0.99,
    compute_dtype="bfloat16",
    param_dtype="float32",
)
PUBLISHED = {
    "enwik8": dict(
        vocab_size=256,
        d_model=768,
        d_v=1536,
        final_norm=False,
        tie_embeddings=False,
        absolute_positions=False,
        dropout_embedding=0.0,
        dropout_sinusoid=0.2,
        dropout_residual=0.5,
        dropout_layer=0.3,
    ),
    "pg19": dict(
        vocab_size=32_000,
        d_model=2048,
        d_v=4096,
        final_norm=True,
        tie_embeddings=True,
        absolute_positions=False,
        dropout_sinusoid=0.1,
        dropout_residual=0.1,
        dropout_layer=0.1,
    ),
    "imagenet64": dict(
        vocab_size=256,
        d_model=2048,
        d_v=4096,
        final_norm=True,
        tie_embeddings=True,
        absolute_positions=True,
        dropout_sinusoid=0.1,
        dropout_residual=0.0,
        dropout_layer=0.0,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    config = ModelConfig.preset(name)
    for field, value in {**PAPER, **PUBLISHED[name]}.items():
        assert getattr(config, field) == value, field
    assert config.num_units == 48


def count(config):
    shapes = jax.eval_shape(lambda: init_model(config, 0)).params
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("enwik8", (180, 195)), ("pg19", (1250, 1350)), ("imagenet64", (1200, 1250))],
)
def test_published_parameter_counts(name, millions):
    """190M, 1.3B and 1.2B in the paper."""
    low, high = millions
    assert low < count(ModelConfig.preset(name)) / 1e6 < high
    assert not low < count(ModelConfig.preset(name, num_layers=22)) / 1e6  # control


def test_recipes_are_the_published_ones():
    recipes = {name: TrainConfig.preset(name) for name in PRESETS}
    assert list(TRAIN_PRESETS) == list(PRESETS) and recipes["tiny"] == TrainConfig()
    billions = {"enwik8": 32.8, "pg19": 131, "imagenet64": 98.3}
    for name, tokens in billions.items():
        recipe = recipes[name]
        total = recipe.steps * recipe.batch_size * recipe.update_len / 1e9
        assert total == pytest.approx(tokens, rel=0.01)
        assert (recipe.batch_size, recipe.warmup_steps, recipe.schedule) == (128, 10_000, "cosine")
    adamw = recipes["enwik8"]
    assert (adamw.learning_rate, adamw.grad_clip, adamw.weight_decay) == (4e-4, 0.1, 2e-4)
    assert (adamw.beta1, adamw.beta2, adamw.epsilon) == (0.9, 0.98, 1e-9)
    for name in ("pg19", "imagenet64"):
        assert (recipes[name].optimizer, recipes[name].learning_rate) == ("adafactor", 0.01)
        assert recipes[name].grad_clip == recipes[name].weight_decay == 0
    assert TrainConfig.preset("enwik8", steps=7).steps == 7
    with pytest.raises(ValueError, match="unknown preset 'enwik9': the presets are tiny"):
        TrainConfig.preset("enwik9")


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_json(config.to_json()) == config
    wide = ModelConfig.preset(name, d_model=64, head_type="mqa", d_k=16)  # what follows, follows
    assert (wide.d_model, wide.num_heads, wide.d_v) == (64, 4, 16)
    assert wide.num_layers == config.num_layers
    if name in ("tiny", "small"):
        assert count(config) < 5e6


def test_unknown_preset():
    with pytest.raises(ValueError) as error:
        ModelConfig.preset("enwik9")
    assert "unknown preset 'enwik9'" in str(error.value)
    for name in PRESETS:
        assert name in str(error.value)
