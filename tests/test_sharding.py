"""Meshes of eight virtual devices: layouts by rule, and the numbers of one device."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tests.helpers import tune
from tests.ops.models import make_model
from transformer_vq import ModelConfig, SamplingParams, costs, generate, stream
from transformer_vq.config import MeshConfig, TrainConfig
from transformer_vq.data import Batches
from transformer_vq.engine.batch import Session
from transformer_vq.engine.slots import take_rows
from transformer_vq.measure import hlo
from transformer_vq.nn.attention import blocks
from transformer_vq.nn.model import init_model, model_specs
from transformer_vq.ops import optimizer
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.loss import token_nll
from transformer_vq.ops.train import init_train_state, make_train_step, train_state_shardings
from transformer_vq.sharding import (
    axis_rules,
    data_mesh,
    make_mesh,
    process_share,
    require_divisible,
    shard_arrays,
    shard_rows,
    traced_on,
)

CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    d_k=8,
    num_layers=1,
    codebook_size=8,
    block_len=8,
    window_len=5,
    **{name: "float64" for name in ("compute_dtype", "param_dtype", "state_dtype")},
)
TRAIN = TrainConfig(batch_size=8, sequence_len=16, update_len=8, warmup_steps=0, learning_rate=0.02)
TOKENS = (np.random.default_rng(0).integers(0, 8, 600).cumsum() % 32).astype(np.uint8)
BATCHES = Batches(TOKENS, batch_size=8, sequence_len=16, seed=0)
CONFIGS = {
    "shga": CONFIG,
    "mqa": CONFIG.replace(head_type="mqa", num_heads=2, d_v=0),
    "full": CONFIG.replace(attention="full", head_type="mha", num_heads=2, d_v=0),
}


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


# Training


@functools.cache
def start(name):
    return jax.device_get(jax.jit(init_train_state, static_argnums=(0, 1))(CONFIGS[name], TRAIN))


@functools.cache
def compiled_step(name, shape):
    config, mesh = CONFIGS[name], mesh_of(*shape)
    batch = shard_rows(mesh, BATCHES.batch(0))
    return make_train_step(config, TRAIN, mesh).lower(start_on(name, mesh), batch).compile()


def start_on(name, mesh):
    return jax.device_put(start(name), train_state_shardings(CONFIGS[name], TRAIN, mesh))


@functools.cache
def trained(name, shape, first_batch=0):
    """The losses and the end of three batches of two updates."""
    mesh, step = mesh_of(*shape), compiled_step(name, shape)
    state, losses = start_on(name, mesh), []
    for i in range(3):
        state, metrics = step(state, shard_rows(mesh, BATCHES.batch(first_batch + i)))
        losses.append([metrics[name] for name in ("loss", "commitment", "grad_norm")])
    return np.array(losses), state


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("shga", (2, 2, 2)),
        pytest.param("mqa", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("full", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("shga", (1, 8, 1), marks=pytest.mark.slow),
        pytest.param("shga", (8, 1, 1), marks=pytest.mark.slow),
        pytest.param("mqa", (8, 1, 1), marks=pytest.mark.slow),
        pytest.param("mqa", (1, 8, 1), marks=pytest.mark.slow),
        pytest.param("full", (8, 1, 1), marks=pytest.mark.slow),
        pytest.param("full", (1, 8, 1), marks=pytest.mark.slow),
    ],
)
def test_any_mesh_is_as_one_device(double, name, shape):
    losses, end = trained(name, (1, 1, 1))
    sharded_losses, sharded_end = trained(name, shape)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-6)  # metrics are float32
    pairs = zip(jax.tree.leaves(end), jax.tree.leaves(sharded_end), strict=True)
    for one, many in pairs:
        np.testing.assert_allclose(many, one, rtol=1e-8, atol=1e-8 * np.abs(one).max())


def test_sharded_from_the_start(double):
    """Parameters are drawn where they live, and are those of one device to the bit."""
    mesh = mesh_of(2, 2, 2)
    placed = train_state_shardings(CONFIG, TRAIN, mesh)
    init = jax.jit(init_train_state, static_argnums=(0, 1), out_shardings=placed)
    jax.tree.map(np.testing.assert_array_equal, init(CONFIG, TRAIN), start("shga"))


def test_it_would_be_noticed(double):
    """Control: other rows give other losses."""
    losses, _ = trained("shga", (1, 1, 1))
    others, _ = trained("shga", (1, 1, 1), first_batch=3)
    assert np.abs(others / losses - 1).min(axis=0).max() > 1e-4


def test_devices_share_the_train_state(double):
    def bytes_of_a_device(*shape):
        placed = train_state_shardings(CONFIG, TRAIN, mesh_of(*shape))
        state = jax.device_put(start("shga"), placed)
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))

    one = bytes_of_a_device(1, 1, 1)
    assert bytes_of_a_device(8, 1, 1) == one
    assert bytes_of_a_device(1, 8, 1) < one / 5  # norms and codebooks are whole
    assert bytes_of_a_device(2, 2, 2) < one / 3
    trained_state = trained("shga", (2, 2, 2))[1]  # and it stays so
    assert trained_state.params["w_out"].sharding.spec == PartitionSpec("fsdp", "tensor")


def test_devices_gather_weights_and_nothing_else(double):
    """A third of the bytes that were gathered when caches were, which have the rows of a batch."""
    found = hlo.collectives(hlo.Program.parse(compiled_step("shga", (2, 2, 2)).as_text()))
    weights = costs.parameter_count(CONFIG) * np.dtype(CONFIG.param_dtype).itemsize
    for kind in ("all-gather", "all-reduce"):
        assert 0.5 * weights < found[kind].bytes / TRAIN.updates_per_sequence < 1.5 * weights


@pytest.mark.slow
def test_muon_exchanges_matrices_and_gathers_none(double, monkeypatch):
    """Each device makes some units' matrices orthogonal, all of each: six units of four devices."""
    config = CONFIG.replace(num_layers=3)
    params = jax.jit(lambda: init_model(config, 0).params)()
    mesh, specs = mesh_of(1, 4, 2), model_specs(config)[0]

    def changes(mesh):
        muon = optimizer.make_optimizer(dataclasses.replace(TRAIN, optimizer="muon"), config)

        def update(params):
            with traced_on(mesh):
                return muon.update(params, muon.init(params), params)[0]

        place = None if mesh is None else shard_arrays(mesh, config, specs, params)
        sharded = {} if mesh is None else dict(in_shardings=(place,), out_shardings=place)
        update = jax.jit(update, **sharded)
        compiled = update.lower(params).compile()
        given = params if mesh is None else jax.device_put(params, place)
        return hlo.collectives(hlo.Program.parse(compiled.as_text())), compiled(given)

    _, alone = changes(None)
    found, shared = changes(mesh)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-8, atol=1e-10)
    matrices = sum(params["units"][name].nbytes for name in ("w_q", "w_k", "w_v", "w_g", "w_o"))
    # Of eight units, with those that fill up, a quarter; there and back, and nothing else.
    assert "all-gather" not in found
    assert 0 < found["all-to-all"].bytes <= 2 * matrices * 8 / 6 / 4
    monkeypatch.setattr(optimizer, "spread_units", lambda function, x: function(x))  # control
    assert changes(mesh)[0]["all-gather"].bytes > 2 * matrices


def test_chunks_are_of_what_a_device_has(monkeypatch):
    """Each chunk of logits costs a gather of their matrix, and a sum of its gradient."""
    rows, length = 8, 16
    tune(monkeypatch, logits_per_chunk=rows * length * CONFIG.vocab_size // 4)
    scores = CONFIG.block_len * (CONFIG.window_len + CONFIG.block_len + CONFIG.codebook_size)
    monkeypatch.setattr(blocks, "SCORES_PER_CHUNK", rows * scores // 2)
    config = CONFIG.replace(**dict.fromkeys(("compute_dtype", "param_dtype"), "float32"))
    model = jax.eval_shape(lambda: init_model(config, 0))
    features = jax.ShapeDtypeStruct((rows, length, config.d_model), "float32")
    targets = jax.ShapeDtypeStruct((rows, length), "int32")
    found = {}
    for shape in ((1, 1, 1), (2, 1, 2), (2, 2, 2)):
        with traced_on(mesh_of(*shape)):
            loss = jax.make_jaxpr(lambda *xs: token_nll(*xs))(model, features, targets)
            found[shape] = (" scan[" in str(loss), blocks.layout(config, rows, length).chunks)
    assert found == {(1, 1, 1): (True, 2), (2, 1, 2): (True, 2), (2, 2, 2): (False, 1)}


# Rules


def test_heads_are_never_cut():
    mesh = mesh_of(1, 2, 4)
    rules = {
        "shga": (ModelConfig(), None, None, "tensor"),
        "mqa": (ModelConfig(head_type="mqa"), "tensor", None, "tensor"),
        "mha": (ModelConfig(head_type="mha"), "tensor", "tensor", "tensor"),
        "few": (ModelConfig(head_type="mha", num_heads=2), None, None, "tensor"),
    }
    for config, heads, kv_heads, hidden in rules.values():
        got = axis_rules(config, mesh)
        assert (got["heads"], got["kv_heads"], got["hidden"]) == (heads, kv_heads, hidden)
        assert (got["embed"], got["vocab"], got["unit"]) == ("fsdp", "tensor", None)
    odd = axis_rules(ModelConfig(vocab_size=30, d_model=34, d_k=2), mesh_of(1, 4, 2))
    assert odd["vocab"] == "tensor" and odd["embed"] is None
    assert set(axis_rules(ModelConfig(), data_mesh()).values()) == {None}


def test_what_mirrors_parameters_lies_as_they_do(double):
    """Moments of AdamW and averages, wherever they stand; factored moments are whole."""
    mesh = mesh_of(2, 2, 2)
    params, codebook = model_specs(CONFIG)
    shapes = jax.eval_shape(lambda: init_train_state(CONFIG, TRAIN).params)
    adafactor = jax.eval_shape(optax.adafactor(0.1, min_dim_size_to_factor=4).init, shapes)
    tree = {"opt": (adafactor, [shapes]), "average": shapes, "params": shapes}
    placed = shard_arrays(mesh, CONFIG, params | codebook, tree)
    for copy in (placed["opt"][1][0], placed["average"]):
        assert copy == placed["params"]
    assert placed["params"]["units"]["w_v"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed["params"]["units"]["w_q"].spec == PartitionSpec(None, "fsdp", None)
    assert placed["params"]["w_out"].spec == PartitionSpec("fsdp", "tensor")
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        sharding.shard_shape(leaf.shape)  # raises for what does not divide
    factored = [leaf for leaf in jax.tree.leaves(placed["opt"][0]) if leaf.is_fully_replicated]
    assert factored


def test_wrong_meshes_are_a_sentence():
    for fields, message in (
        (dict(data=3), "data 3 times fsdp 1 times tensor 1: it must be the number of devices, 8"),
        (dict(fsdp=3), "fsdp 3 times tensor 1: it must be a divisor of the 8 devices"),
        (dict(data=2, fsdp=2), "data 2 times fsdp 2 times tensor 1: it must be the number"),
    ):
        with pytest.raises(ValueError, match=message):
            make_mesh(MeshConfig(**fields), jax.devices()[:8])
    for fields in (dict(data=0), dict(data=-2), dict(fsdp=-1), dict(tensor=1.5), dict(fsdp=True)):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} is .*: it must be a whole"):
            MeshConfig(**fields)
    with pytest.raises(ValueError, match="batch_size is 6: it must be a multiple of the 4 devices"):
        require_divisible(6, mesh_of(2, 2, 2))
    require_divisible(4, mesh_of(2, 2, 2))


class Device:
    """Of another process: enough of a device for a mesh."""

    platform = device_kind = "cpu"

    def __init__(self, number, process):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    ("shape", "devices_each", "shares"),
    [
        ((4, 1, 1), 2, [(0, 2), (1, 2)]),
        ((1, 4, 1), 2, [(0, 2), (1, 2)]),
        ((2, 1, 2), 2, [(0, 2), (1, 2)]),
        ((1, 1, 4), 2, [(0, 1), (0, 1)]),  # the same rows for both
        ((2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 4, 2), 4, [(0, 2), (1, 2)]),
    ],
)
def test_process_share(monkeypatch, shape, devices_each, shares):
    count = np.prod(shape)
    devices = np.array([Device(i, i // devices_each) for i in range(count)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert process_share(mesh) == share


# Sampling

SAMPLER = make_model(reset_at_document=True)
PROMPTS = [[1, 2, 3], [4], list(range(16)), [5, 6], [7] * 9, [8, 9], [10], [11, 12], [3, 1]]


def requests():
    """Rows that end apart: by length, by a stop token, by a stop sequence."""
    kinds = itertools.cycle([dict(), dict(top_p=0.7), dict(stop=[3]), dict(stop=[[2]], top_k=5)])
    return [
        SamplingParams(max_tokens=5 + 9 * i, seed=i, **kind)
        for i, kind in zip(range(len(PROMPTS)), kinds, strict=False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 3])
def test_devices_share_requests(devices):
    mesh = data_mesh(jax.devices()[:devices])
    one = generate(SAMPLER, PROMPTS, requests())
    assert generate(SAMPLER, PROMPTS, requests(), mesh=mesh) == one
    assert list(stream(SAMPLER, PROMPTS[:2], requests()[:2], mesh=mesh))
    # Fewer slots than requests, one on each device: the last ones join where others have ended.
    assert generate(SAMPLER, PROMPTS, requests(), mesh=mesh, slots=devices) == one
    assert len({len(tokens) for tokens in one}) > 5  # control: they end apart
    others = [dataclasses.replace(p, seed=p.seed + 100) for p in requests()]
    assert generate(SAMPLER, PROMPTS, others, mesh=mesh) != one


@pytest.mark.slow
def test_states_go_between_meshes(tmp_path):
    """A session on a mesh goes on from a state of one device, and leaves one."""
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])

    def two_sessions(first, second, fork):
        session = Session(SAMPLER, PROMPTS, requests(), mesh=first)
        before = list(map(int, session))
        state = session.state
        if fork:
            state = take_rows(state, [2])
        after = generate(SAMPLER, PROMPTS, requests(), state, mesh=second)
        return before, after, np.asarray(session.state.position)

    for fork, meshes in ((False, [(mesh, None), (None, mesh)]), (True, [(mesh, mesh)])):
        expected = two_sessions(None, None, fork)
        for first, second in meshes:
            for given, wanted in zip(two_sessions(first, second, fork), expected, strict=True):
                assert np.all(np.asarray(given, object) == np.asarray(wanted, object))


def test_every_device_holds_its_rows():
    mesh = data_mesh(jax.devices()[:8])
    session = Session(SAMPLER, PROMPTS, mesh=mesh)
    for x in jax.tree.leaves(session._slots.rows):
        assert x.shape[0] == 16 and x.addressable_shards[0].data.shape[0] == 2
    for x in jax.tree.leaves((session._model, session._slots.decoder)):
        assert x.sharding.is_fully_replicated


# Evaluation


@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_evaluation_on_a_mesh(rows):
    mesh = mesh_of(2, 2, 2)
    params, codebook = model_specs(SAMPLER.config)
    placed = shard_arrays(mesh, SAMPLER.config, params | codebook, SAMPLER)
    tokens = TOKENS % SAMPLER.config.vocab_size
    one = evaluate(SAMPLER, tokens, chunk_len=16, rows=rows)
    many = evaluate(jax.device_put(SAMPLER, placed), tokens, chunk_len=16, rows=rows)
    assert many.tokens == one.tokens
    np.testing.assert_allclose(many.by_position, one.by_position, rtol=1e-5)
    assert abs(evaluate(SAMPLER, tokens[::-1], chunk_len=16, rows=rows).loss - one.loss) > 1e-3
