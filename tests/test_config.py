"""Configurations: files and back, clear refusals, and presets with the published sizes."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_vq import ModelConfig, init_model
from transformer_vq.config import FOR_CODES, MeshConfig, TrainConfig
from transformer_vq.errors import ConfigError
from transformer_vq.presets import PRESETS, TRAIN_PRESETS

# ---------------------------------------------------------------- files


@st.composite
def model_configs(draw):
    """Any valid configuration; every field is drawn."""
    head_type = draw(st.sampled_from(["shga", "mqa", "mha"]))
    size, rate = st.integers(1, 10**6), st.floats(0, 0.999)
    positive = st.floats(1e-30, 1e30)
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
        "logit_cap": draw(st.just(0.0) | positive),
        "commit_coefficient": draw(st.floats(0, 1e30)),
    }
    fields["forget_horizon"] = draw(st.floats(1.001, 1e30))
    for name, value in _fields(ModelConfig).items():
        if isinstance(value, bool):
            fields[name] = draw(st.booleans())
        elif name.startswith("dropout_") or name == "codebook_decay":
            fields[name] = draw(rate)
        elif name.endswith("_dtype"):
            fields[name] = draw(dtype)
    rounds = fields["compute_dtype"] == "float32"
    fields["products"] = draw(st.sampled_from(["float32", "bfloat16"][: 1 + rounds]))
    fields |= FOR_CODES  # off, for what full attention has no use for
    if fields["attention"] == "vq":
        fields |= dict(
            far_decay=draw(st.just(0.0) | st.floats(1e-6, 1e30)),
            far_cap=draw(st.integers(0, 10**6)),
            forget=draw(st.sampled_from(["none", "constant", "gated"])),
            long_units=draw(st.integers(0, 1)),
            reach=draw(st.integers(0, 10**6)),
            sphere_codewords=draw(st.booleans()),
            soft_writes=draw(st.booleans()),
        )
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
    code = (
        "import sys; sys.modules['jax'] = sys.modules['numpy'] = None; sys.path.insert(0, {!r})\n"
        "from transformer_vq.config import ModelConfig; ModelConfig.preset('tiny')"
    )
    source = Path(sys.modules["transformer_vq.config"].__file__).parents[1]
    subprocess.run([sys.executable, "-I", "-c", code.format(str(source))], check=True)


# ---------------------------------------------------------------- refusals


def refused(make, fields, message):
    """Refused with just this sentence, which names a field and its value."""
    with pytest.raises(ConfigError) as error:
        make(**fields)
    name, value = next(iter(fields.items()))
    if not message.startswith(name):
        message = f"{name} is {value!r}: it must be {message}"
    assert str(error.value) == message
    assert error.value.field == name


ONE, ZERO = "a whole number from 1 to 2^31 - 1", "a whole number from 0 to 2^31 - 1"
SIZE = "a whole number from 1 to 2^30 - 1"
ABOVE, OR_MORE = "a finite number above 0", "a finite number, 0 or more"
PART = "at least 0 and below 1"

DTYPES = "one of float32, bfloat16, float16, float64"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vocab_size=0), SIZE),
        (dict(vocab_size=2**30), SIZE),
        (dict(d_model=1), "a whole number from 2 to 2^30 - 1"),
        (dict(d_k=0), SIZE),
        (dict(d_v=-1), f"{ONE}, or 0 (2 d_model (shga) or d_k (mqa, mha))"),
        (dict(num_heads=-3), f"{SIZE}, or 0 (1 (shga) or d_model / d_k (mqa, mha))"),
        (dict(num_layers=0), SIZE),
        (dict(num_layers=2.0), SIZE),
        (dict(num_layers=True), SIZE),
        (dict(num_layers="2"), SIZE),
        (dict(num_layers=None), SIZE),
        (dict(codebook_size=0), SIZE),
        (dict(block_len=0), SIZE),
        (dict(window_len=-1), "a whole number from 0 to 2^30 - 1"),
        (dict(d_model=7), "even (sine and cosine halves)"),
        (
            dict(d_model=100, d_k=64, head_type="mqa"),
            "d_model is 100, not a multiple of d_k, 64: change one of them, or give num_heads",
        ),
        (dict(head_type="gqa"), "one of shga, mqa, mha"),
        (dict(attention="linear"), "one of vq, full"),
        (dict(compute_dtype="int8"), DTYPES),
        (dict(param_dtype="f32"), DTYPES),
        (dict(state_dtype=None), DTYPES),
        (dict(codebook_decay=1.0), PART),
        (dict(codebook_decay=float("nan")), PART),
        (dict(dropout_embedding=-0.1), PART),
        (dict(dropout_sinusoid=1.5), PART),
        (dict(dropout_residual="x"), "a number"),
        (dict(dropout_layer=None), "a number"),
        (dict(max_wavelength=0.0), ABOVE),
        (dict(max_wavelength=float("inf")), ABOVE),
        (dict(logit_scale=-1.0), ABOVE),
        (dict(commit_coefficient=-1e-4), OR_MORE),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_model_config_refuses(fields, message):
    refused(ModelConfig, fields, message)
    refused(lambda **f: ModelConfig().replace(**{"num_heads": 0, **f}), fields, message)


@pytest.mark.parametrize("name", [n for n, v in _fields(ModelConfig).items() if type(v) is bool])
def test_switches_are_true_or_false(name):
    for value in ("false", "no", 2, None):
        with pytest.raises(ValueError, match=f"^{name} is {value!r}: "):
            ModelConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(batch_size=0), ONE),
        (dict(sequence_len=0), ONE),
        (dict(update_len=-1), f"{ONE}, or 0 (all)"),
        (dict(steps=0), ONE),
        (dict(steps=10.0), ONE),
        (dict(steps=True), ONE),
        (dict(steps=10**23), ONE),
        (dict(warmup_steps=-1), ZERO),
        (dict(warmup_steps=2**31), ZERO),
        (dict(seed=-1), "a whole number from 0 to 2^32 - 1"),
        (dict(seed=2**32), "a whole number from 0 to 2^32 - 1"),
        (dict(log_every=0), ONE),
        (dict(evaluate_every=-1), f"{ONE}, or 0 (only at the end)"),
        (dict(evaluate_tokens=-1), f"{ONE}, or 0 (all)"),
        (dict(checkpoint_every=0), ONE),
        (dict(keep_checkpoints=0), ONE),
        (dict(sample_tokens=-1), f"{ONE}, or 0 (none)"),
        (dict(learning_rate=0.0), ABOVE),
        (dict(learning_rate=float("nan")), ABOVE),
        (dict(epsilon=-1e-9), ABOVE),
        (dict(final_learning_rate=-0.1), OR_MORE),
        (dict(weight_decay=-1.0), OR_MORE),
        (dict(grad_clip=float("inf")), f"{ABOVE}, or 0 (no limit)"),
        (dict(max_loss_spike=-1), f"{ABOVE}, or 0 (never)"),
        (dict(beta1=1.0), PART),
        (dict(beta2=-0.5), PART),
        (
            dict(sequence_len=100, update_len=64),
            "sequence_len is 100, not a multiple of update_len, 64: change one of them",
        ),
        (
            dict(sequence_len=64, update_len=128),
            "sequence_len is 64, not a multiple of update_len, 128: change one of them",
        ),
        (dict(optimizer="adam"), "one of adamw, lion, adafactor, muon"),
        (dict(schedule="flat"), "one of cosine, linear, inverse-sqrt, wsd"),
        (dict(decay_steps=-1), f"{ONE}, or 0 (a fifth of all)"),
        (dict(accumulate=-1), f"{ONE}, or 0 (1, on a CPU more)"),
        (
            dict(batch_size=8, accumulate=3),
            "batch_size is 8, not a multiple of accumulate, 3: change one of them",
        ),
        (dict(ema_decay=1.0), "above 0 and below 1, or 0 (do not)"),
        (dict(revive_below=-0.1), "above 0 and below 1, or 0 (none)"),
        (dict(codebook_init="zeros"), "one of data, random"),
        (dict(streaming=1), "true or false"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_train_config_refuses(fields, message):
    refused(TrainConfig, fields, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(data=0), f"{ONE}, or -1 (as many as there are)"),
        (dict(fsdp=-1), ONE),
        (dict(tensor=2**31), ONE),
    ],
    ids=["data", "fsdp", "tensor"],
)
def test_mesh_config_refuses(fields, message):
    refused(MeshConfig, fields, message)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(steps=20), "the warm-up takes 100 updates and the run has 20: the learning rate "
                         "reaches 0.00019, not 0.001; lower warmup_steps"),
        (dict(steps=100), "reaches 0.00099, not 0.001"),
        (dict(steps=110, schedule="wsd", decay_steps=50), "decay_steps is 50 and 10 updates"),
        (dict(steps=101), None),
        (dict(steps=1, warmup_steps=0), None),
        (dict(steps=150, schedule="wsd", decay_steps=50), None),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_the_run_says_so(fields, says):
    notes = TrainConfig(**fields).notes()
    assert len(notes) == (says is not None)
    assert says is None or says in notes[0]


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
    assert list(TRAIN_PRESETS) == list(PRESETS)
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
    ours = name not in PUBLISHED  # what the paper's models have not
    assert (config.forget, config.key_shift) == (("gated", True) if ours else ("none", False))
    assert ModelConfig.from_json(config.to_json()) == config
    wide = ModelConfig.preset(name, d_model=64, head_type="mqa", d_k=16)  # what follows, follows
    assert (wide.d_model, wide.num_heads, wide.d_v) == (64, 4, 16)
    assert wide.num_layers == config.num_layers
    full = config.replace(attention="full")
    assert full == ModelConfig.preset(name, attention="full") and full.forget == "none"
    assert full.key_shift == config.key_shift
    with pytest.raises(ConfigError, match="forget is gated: full attention has no cache"):
        config.replace(attention="full", forget="gated")
    if name.endswith("m"):  # named by size
        assert count(config) / 1e6 == pytest.approx(int(name[:-1]), rel=0.03)
    elif ours:
        assert count(config) < 5e6


def test_unknown_preset():
    with pytest.raises(ValueError) as error:
        ModelConfig.preset("enwik9")
    assert "unknown preset 'enwik9'" in str(error.value)
    for name in PRESETS:
        assert name in str(error.value)
