"""Arguments of the Python functions: the common mistakes get the sentence that mends them.

(Those of another type in `nn` cannot be tried here: the checks of all shapes come before them.)
"""

import math
import sys

import jax
import numpy as np
import pytest

import transformer_vq as tvq
from tests.helpers import CONFIG, SINGLE, TOKENS, make_config, random_model
from transformer_vq import (
    ModelConfig,
    SampleConfig,
    SamplingParams,
    extend,
    init_model,
    init_state,
    load,
    load_state,
    save_state,
)
from transformer_vq.config import TrainConfig
from transformer_vq.data import ByteTokenizer, Source, StreamDecoder, open_source
from transformer_vq.errors import UserError, to_install

PLAN = TrainConfig(batch_size=8, sequence_len=16, update_len=8)
MODEL = random_model(make_config(**SINGLE))
STATE = init_state(MODEL.config, 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: init_state(CONFIG, 2**40), "batch_size is 1099511627776: it must be a whole nu"),
        (lambda: init_state(CONFIG, 1, room=True), "room is True: it must be a whole number from"),
        (lambda: extend(MODEL, STATE, [[1, 2], [3]]), r"tokens is \[\[1, 2\], \[3\]\]: .*array of"),
        (lambda: extend(MODEL, STATE, [["a"]]), "tokens are .*: they must be whole numbers"),
        (lambda: extend(MODEL, STATE, [1, 2]), r"tokens have shape \(2,\): the state has 1 rows"),
        (lambda: load(5), "folder is 5: it must be a path, as text or as a Path"),
        (lambda: load(""), "folder is empty: give a path"),
        (lambda: Source.of(None), "the tokens are None: they must be a flat array of whole"),
        (lambda: Source.of("abc"), "the tokens are 'abc': they must be a flat array of whole"),
        (lambda: Source(np.ones(3), [0], 3), r"the tokens are float64 of shape \(3,\): they must"),
        (lambda: StreamDecoder("bytes"), "tokenizer is 'bytes': it must be a vocabulary"),
        (lambda: ByteTokenizer().encode(None), "the text is None: it must be text or bytes"),
        (lambda: ByteTokenizer().encode([1, 2]), r"the text is \[1, 2\]: it must be text or bytes"),
        (lambda: tvq.train(PLAN, CONFIG, TOKENS, None, "x"), "config is TrainConfig.*ModelConfig"),
        (lambda: tvq.train(CONFIG, {}, TOKENS, None, "x"), "train is {}: it must be a TrainConfig"),
        (lambda: tvq.train(CONFIG, PLAN, TOKENS, None, ""), "folder is empty: give a path"),
        (
            lambda: tvq.train(CONFIG, PLAN, "a", None, "x"),
            "the tokens are 'a': they must be a flat",
        ),
        (
            lambda: tvq.evaluate("run", TOKENS),
            "model is 'run': it must be a Model, from init_model",
        ),
        (lambda: tvq.evaluate(MODEL, None), "the tokens are None: they must be a flat array"),
        (lambda: tvq.evaluate(MODEL, TOKENS, rows="a"), "rows is 'a': it must be a whole number"),
        (lambda: tvq.evaluate(MODEL, [1, 2], chunk_len=1.5), "chunk_len is 1.5: it must be a who"),
        (lambda: tvq.generate(None, [[1]]), "model is None: it must be a Model, from init_model"),
        (lambda: save_state(STATE, "x", MODEL), r"path is State\(.*: it must be a path"),
        (lambda: save_state("x", MODEL, STATE), r"state is Model\(.*: it must be a State"),
        (lambda: load_state(5, MODEL), "path is 5: it must be a path"),
        (lambda: load_state("x", STATE), r"model is State\(.*: it must be a Model"),
        (lambda: load_state("a\0b", MODEL), r"path is 'a\\x00b': no file can have that name"),
        (lambda: load("a" * 5000), "there is no run folder aaa"),
        (lambda: load(".", 10**5000), "the checkpoint is .*: it must be latest, best or a step"),
        (
            lambda: init_model(CONFIG, [[1, 2], [3]]),
            r"key is \[\[1, 2\], \[3\]\]: it must be a JAX key",
        ),
        (lambda: init_state(CONFIG, 1, "bf16"), "dtype is 'bf16': it must be one of float32, bfl"),
        (
            lambda: init_state(CONFIG, 1, np.int8),
            "dtype is <class 'numpy.int8'>: it must be one of",
        ),
        (lambda: train(max_seconds="x"), "max_seconds is 'x': it must be a number of at least 0"),
        (
            lambda: train(max_seconds=math.nan),
            "max_seconds is nan: it must be a number of at least",
        ),
        (lambda: train(observers=[print]), "an observer is <built-in function print>: it must be"),
        (
            lambda: train(mesh=5),
            "mesh is 5: it must be one of transformer_vq.sharding.make_mesh or",
        ),
        (lambda: train(mesh=jax.make_mesh((8,), ("x",))), r"mesh is Mesh\(.*: it must be one of"),
        (lambda: train(decode="utf-8"), "decode is 'utf-8': it must be a function of tokens"),
        (lambda: train(data="x"), "data is 'x': it must be a DataSource"),
        (lambda: train(resume="yes"), "resume is 'yes': it must be a bool"),
        (lambda: tvq.generate(MODEL, [[1]], mesh=5), "mesh is 5: it must be one of"),
        (lambda: tvq.generate(MODEL, np.array(5)), r"prompts is array\(5\): it must be a list of"),
        (lambda: tvq.generate(MODEL, [[1]], np.array(5)), r"params is array\(5\): give SamplingP"),
        (lambda: SamplingParams(stop=np.array(5)), r"stop is array\(5\): it must be a list of tok"),
        (
            lambda: SamplingParams(banned_tokens=np.int8),
            "banned_tokens is <class .*: it must be a li",
        ),
        (
            lambda: tvq.evaluate(MODEL, [1, 2], context_len="x"),
            "context_len is 'x': it must be a wh",
        ),
        (lambda: tvq.evaluate(MODEL, TOKENS, far_gain=[]), r"far_gain is \[\]: it must be a bool"),
        (
            lambda: tvq.evaluate(MODEL, TOKENS, on_progress=5),
            "on_progress is 5: it must be a functi",
        ),
        (lambda: open_source([]), "there is no path: give a file or a folder at least"),
        (lambda: tvq.sample_op(None, 0, MODEL, 0), "config is None: it must be a SampleConfig"),
        (lambda: tvq.sample_op(SampleConfig(1, 1), 0, 5, 0), "model is 5: it must be a Model"),
        (lambda: ModelConfig.preset(["tiny"]), r"unknown preset \['tiny'\]: the presets are"),
        (
            lambda: ModelConfig.from_json(None),
            "the configuration is None: it must be text, in JSON",
        ),
        (
            lambda: ModelConfig.from_dict([1]),
            r"the configuration is \[1\]: it must be a dictionary",
        ),
        (lambda: ModelConfig(compute_dtype="bf16"), "compute_dtype is 'bf16': it must be one of"),
    ],
)
def test_a_mistake_is_a_sentence(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"(?s)^{says}") as caught:
        call()
    assert len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def train(**options):
    return tvq.train(CONFIG, PLAN, TOKENS, None, "x", **options)


def test_extend_takes_lists():
    logits, state = extend(MODEL, STATE, [[1, 2, 3]], lengths=[2])
    expected, _ = extend(MODEL, STATE, np.array([[1, 2, 3]]), lengths=np.array([2]))
    np.testing.assert_array_equal(logits, expected)
    assert int(state.position[0]) == 2


def test_an_extra_is_installed_where_we_run(monkeypatch, tmp_path):
    """By the shell's pip only if it is that of our environment."""
    bin_ = tmp_path / "env" / "bin"
    bin_.mkdir(parents=True)
    for name in ("pip", "python"):
        (bin_ / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(bin_ / "python"))
    monkeypatch.setenv("PATH", str(bin_))
    assert to_install("text") == "pip install 'transformer-vq[text]'"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert to_install("text") == f"{bin_}/python -m pip install 'transformer-vq[text]'"
    monkeypatch.chdir(tmp_path)
    assert to_install("text") == "env/bin/python -m pip install 'transformer-vq[text]'"
