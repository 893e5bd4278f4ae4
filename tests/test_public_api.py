"""What other programs may rely on: the public names, where they lead, and how they are called."""

import importlib
import inspect
import subprocess
import sys

import pytest

import transformer_vq
from tests.helpers import make_run
from transformer_vq import SamplingParams, generate, load

# Taking a name away, or renaming an argument, breaks programs: neither happens by accident.
NAMES = {
    "Model": "params, codebook, config",
    "ModelConfig": None,  # its fields are in docs/api and in test_config
    "SampleConfig": "global_batch_size, sequence_len, p_nucleus",
    "SamplingParams": None,
    "State": "position, document_start, document_id, logits, units",
    "StateError": None,
    "Token": None,
    "TrainConfig": None,
    "evaluate": "model, tokens",
    "extend": "model, state, tokens, *lengths, *document_ids",
    "generate": "model, prompts, params, state, *mesh",
    "init_model": "config, key",
    "init_state": "config, batch_size, dtype",
    "load": "folder, checkpoint",
    "load_state": "path, model",
    "sample_op": "config, eos_id, model, key",
    "save_state": "path, state, model",
    "score": "model, texts, state",
    "stream": "model, prompts, params, state, *mesh",
    "train": "config, train, tokens, validation, folder",
}
KEPT = [
    ("transformer_vq.nn.prob", "nucleus", "logits, p"),
    ("transformer_vq.ops.sample", "SampleConfig", "global_batch_size, sequence_len, p_nucleus"),
    ("transformer_vq.ops.sample", "sample_op", "config, eos_id, model, key"),
    ("transformer_vq.io.official", "from_official", "params, config"),
    ("transformer_vq.ops.run", "load_run", "folder, step"),
    ("transformer_vq.ops.loop", "train", "config, train, tokens, validation, folder"),
]


def begins_with(function, expected: str) -> bool:
    """Whether the arguments are these; after them only options may come, which have defaults."""
    parameters = list(inspect.signature(function).parameters.values())
    names = [f"{'*' * (p.kind is p.KEYWORD_ONLY)}{p.name}" for p in parameters]
    wanted = expected.split(", ")
    optional = all(p.default is not p.empty for p in parameters[len(wanted) :])
    return names[: len(wanted)] == wanted and optional


def test_the_public_names_are_these():
    assert transformer_vq.__all__ == sorted(NAMES)
    assert set(NAMES) <= set(dir(transformer_vq))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        transformer_vq.lode  # noqa: B018


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_is_called_as_before(name):
    value = getattr(transformer_vq, name)
    assert value.__name__ == name and value.__doc__
    if NAMES[name]:
        assert begins_with(value, NAMES[name]), inspect.signature(value)
        assert not begins_with(value, "other, " + NAMES[name])  # control


@pytest.mark.parametrize(("module", "name", "arguments"), KEPT)
def test_a_kept_path_stays(module, name, arguments):
    value = getattr(importlib.import_module(module), name)
    assert begins_with(value, arguments), inspect.signature(value)


def test_a_name_is_imported_when_it_is_asked_for():
    code = """
import sys
from transformer_vq import ModelConfig
assert "jax" not in sys.modules, "a configuration waits for JAX"
from transformer_vq import extend
assert "jax" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_gives_what_generate_needs(tmp_path):
    folder = make_run(tmp_path / "run")
    model, tokenizer = load(folder)
    prompt, params = tokenizer.encode("Call me"), SamplingParams(max_tokens=4)
    expected = generate(model, [prompt], params)
    for checkpoint in ("latest", "1", 1):
        assert generate(load(folder, checkpoint)[0], [prompt], params) == expected
    with pytest.raises(ValueError, match="the checkpoint is 'newest': it must be latest, best or"):
        load(folder, "newest")
    with pytest.raises(ValueError, match="there is no run folder"):
        load(tmp_path / "nothing")
