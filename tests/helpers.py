"""What tests of several modules stand on: tiny models, inputs, runs, and comparisons."""

import dataclasses
import functools
import gzip
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from safetensors.numpy import load as load_arrays

from transformer_vq import Model, ModelConfig, TrainConfig, init_model
from transformer_vq.cli import main
from transformer_vq.data import Batch, Batches, ByteTokenizer
from transformer_vq.nn import products
from transformer_vq.ops.train import init_train_state
from transformer_vq.run.folder import DataSource, RunInfo, checkpoints_of, open_run
from transformer_vq.sharding import data_mesh

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BATCH, LENGTH = 3, 19  # of `random_inputs`
TOLERANCE = 1e-10
DOUBLE = dict.fromkeys(("compute_dtype", "param_dtype", "state_dtype"), "float64")
SINGLE = dict.fromkeys(("compute_dtype", "param_dtype", "state_dtype"), "float32")


# Compiled in half the time; numbers do not need fast code.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tune(monkeypatch, **changes) -> None:
    """Products as on another machine. What was compiled before is not compiled anew by this."""
    tuning = dataclasses.replace(products.CPU, **changes)
    monkeypatch.setattr(products, "tuning", lambda: tuning)


def make_config(head_type="shga", **fields):
    """Two units, tiny, float64. Most sizes are odd, and none is equal to another."""
    sizes = dict(vocab_size=13, d_model=8, d_k=4, d_v=6, codebook_size=5)
    layers = 1 if head_type == "shga" else 2
    return ModelConfig(
        **{**sizes, "head_type": head_type, "num_layers": layers, **DOUBLE, **fields}
    )


def random_model(config, seed=0):
    """No array of the model is at its initial value; some codes are used less than 0.01."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_model(config, 0))

    def draw(path, leaf):
        name = path[-1].key
        x = rng.normal(size=leaf.shape)
        if name == "gain":
            x = 1 + 0.3 * x
        elif name.startswith("w_"):
            x = x * leaf.shape[-2] ** -0.5
        elif name == "position_scale":
            x = 0.7
        elif name != "embedding":
            x = 0.5 * x
        return jnp.asarray(x, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes.params)
    sums = shapes.codebook["sum"]
    count = np.exp(rng.normal(size=sums.shape[:-1]))
    count[..., 1::3] = 0.004  # its codeword is its sum over 0.01
    words = config.d_k**-0.25 * rng.normal(size=sums.shape)
    codebook = {"sum": words * np.maximum(count, 0.01)[..., None], "count": count}
    codebook = jax.tree.map(lambda x: jnp.asarray(x, sums.dtype), codebook)
    return Model(params=params, codebook=codebook, config=config)


def random_inputs(config, seed=0, batch=BATCH, length=LENGTH):
    """Tokens, document ids that grow (documents of 1 token too, and an id that is skipped), and
    a cotangent of the logits."""
    rng = np.random.default_rng([seed, 1])
    tokens = rng.integers(0, config.vocab_size, (batch, length)).astype(np.int32)
    steps = rng.choice([0, 1, 2], p=[0.8, 0.15, 0.05], size=(batch, length))
    steps[0] *= np.arange(length) == length // 2  # one row with long documents
    document_ids = np.cumsum(steps, axis=1).astype(np.int32)
    cotangent = rng.normal(size=(batch, length, config.vocab_size))
    return tokens, document_ids, cotangent


def close(actual, expected, tolerance=TOLERANCE):
    """Trees of arrays, array by array: relative to its largest entry, or absolute below 1."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, path
        limit = tolerance * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


def far(actual, expected):
    """Not a matter of rounding."""
    with pytest.raises(AssertionError):
        close(actual, expected, 1e-4)


# Training: a small model, a text that can be learnt, and what is compared.

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=8, window_len=5
)
START = jax.jit(init_train_state, static_argnums=(0, 1))


def walk(length) -> np.ndarray:
    """A walk of small steps round 32 tokens: the last token says much of the next."""
    return (np.random.default_rng(0).integers(0, 8, length).cumsum() % 32).astype(np.uint8)


TOKENS = walk(600)


def replace(config, **changes):
    return type(config)(**{**vars(config), **changes})


def one_batch(train, index=0, tokens=TOKENS) -> Batch:
    options = dict(batch_size=train.batch_size, sequence_len=train.sequence_len, seed=train.seed)
    return Batches(tokens, **options).batch(index)


def raw(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def recorded(name: str) -> dict[str, np.ndarray]:
    """Arrays by name of a file of `tests/data/recorded`; texts as bytes, whole numbers as int32."""
    content = (TESTS / f"data/recorded/{name}.safetensors.gz").read_bytes()
    arrays = load_arrays(gzip.decompress(content))
    return {k: v.astype(np.int32) if v.dtype == np.int8 else v for k, v in arrays.items()}


def make_run(folder: Path, tokenizer=None, image_shape=None, **changes) -> str:
    """A run folder with an untrained model, whose weights are large enough to have opinions."""
    tokenizer = tokenizer or ByteTokenizer()
    sizes = dict(d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=16, window_len=8)
    config = ModelConfig(**{**sizes, "vocab_size": tokenizer.vocab_size, **changes})
    train = TrainConfig(batch_size=1, sequence_len=16)
    data = DataSource("text", 1, "", image_shape=image_shape)
    info = RunInfo(config, train, data, tokenizer.name)
    open_run(folder, info, resume=False)
    tokenizer.save(folder)
    state = jax.jit(init_train_state, static_argnums=(0, 1))(config, train)
    params = jax.tree.map(lambda x: 8 * x, state.params)
    with checkpoints_of(folder) as checkpoints:
        state = dataclasses.replace(state, params=params)
        checkpoints.save(1, state, dataclasses.replace(info, step=1).to_dict())
    return str(folder)


def hugging_face():
    """`(torch, transformers)`; neither is a dependency of ours. Skips where they are missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        import torch
        from transformers.generation import logits_process
    return torch, logits_process


# ---------------------------------------------------------------- the command line

TVQ = str(Path(sys.executable).with_name("tvq"))
STEPS = 4
MODEL = {"d-model": 32, "d-k": 16, "num-layers": 1, "codebook-size": 16, "window-len": 16}
TRAINING = {"batch-size": 8, "sequence-len": 64, "evaluate-tokens": 500, "log-every": 1}
SIZES = [
    *(f"--config.{name}={value}" for name, value in MODEL.items()),
    "--config.block-len=256",
    *(f"--train.{name}={value}" for name, value in TRAINING.items()),
]


def train_on_one_device(monkeypatch) -> None:
    """`train` uses one device where it would use all eight."""
    mesh = data_mesh(jax.devices()[:1])
    monkeypatch.setattr("transformer_vq.run.loop.data_mesh", lambda: mesh)


def sample(capsys, run: str, *arguments: str) -> dict:
    """The first sample, as JSON."""
    assert main(["sample", "--run", run, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["samples"][0]


def fails(capsys, status: int, *arguments: str) -> str:
    """The sentence with which a command refuses, after notes of a line each if there are any."""
    capsys.readouterr()
    assert main(arguments) == status
    printed = capsys.readouterr().err
    *notes, sentence = printed.splitlines(keepends=True)
    assert all(line.startswith("tvq: ") for line in (*notes, sentence))
    assert "Traceback" not in printed
    return sentence


def start(user_env: dict, *arguments: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen([TVQ, *arguments], env=user_env, stdout=pipe, stderr=pipe)


def hub_cache(home: Path, files: dict[str, bytes], revision="main") -> Path:
    """What `huggingface_hub` keeps of the model owner/name: its snapshot."""
    model, commit = home / "hub/models--owner--name", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / revision).write_text(commit)
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def flax_bytes(tree) -> bytes:
    """msgpack with arrays as flax has them: extension 1 of (shape, dtype, bytes), 3 for scalars."""

    def extension(x):
        content = msgpack.packb((x.shape, x.dtype.name, x.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1 if isinstance(x, np.ndarray) else 3, content)

    return msgpack.packb(tree, default=extension, strict_types=True)
