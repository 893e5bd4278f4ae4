"""Tiny programs compiled for devices that are not here; for TPUs where libtpu is installed."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from tests.programs import operations
from transformer_vq.cli import main
from transformer_vq.config import MeshConfig, ModelConfig, TrainConfig
from transformer_vq.errors import UserError
from transformer_vq.measure import compile, hlo
from transformer_vq.nn import products
from transformer_vq.nn.model import init_state

TINY = {
    "d_model": 16, "d_k": 8, "num_layers": 1, "codebook_size": 8, "window_len": 8, "block_len": 8,
    "forget": "none",
}  # fmt: skip
CONFIG = ModelConfig.preset("tiny", **TINY)
OPTIONS = [
    word for name, n in TINY.items() for word in (f"--config.{name.replace('_', '-')}", str(n))
]
RECIPE = ["--train.batch-size", "4", "--train.sequence-len", "8", "--train.update-len", "8"]
RECIPE += ["--train.optimizer", "adamw"]  # of which less is to compile


@pytest.fixture
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("NOT TESTED: libtpu is not installed (pip install 'transformer-vq[tpu]')")


def records(capsys, topologies, *programs):
    command = ["bench", "compile", "--topology", *topologies, "--preset", "tiny", "--json"]
    assert main([*command, *OPTIONS, *RECIPE, "--batch", "2", "--programs", *programs]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_programs_for_this_machine(capsys):
    """What is told of a program: on a mesh, training exchanges and decoding does not."""
    decode, train = records(capsys, ["cpu:2"], "decode", "train")
    assert decode["topology"] == "cpu:2" and decode["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert decode["collectives"] == {} and "flops" not in decode
    copies = decode["copies"]
    assert copies["least_bytes"] == 2 * CONFIG.table_rows * CONFIG.d_v * 4
    assert copies["copies"] == copies["returns"] == 0
    assert decode["memory"]["arguments"] > copies["least_bytes"]
    assert train["rows"] == 2 and train["flops"] > 0
    assert train["collectives"]["all-reduce"]["bytes"] > 0
    for record in (decode, train):
        memory = record["memory"]
        assert memory["total"] == sum(n for name, n in memory.items() if name != "total")
        assert record["compile_seconds"] > 0 and record["jax"] == jax.__version__


def test_programs_for_cuda_are_lowered(capsys):
    for record in records(capsys, ["cuda", "cuda:2"], "decode", "prefill"):
        assert record["operations"] > 100 and "compile_seconds" not in record


@pytest.mark.parametrize("topology", ["cpu", "cuda"])
def test_a_program_has_the_form_of_its_target(topology):
    """On a CPU, products of few rows have the matrix first, behind barriers; elsewhere not, though
    a CPU traces them."""
    config = CONFIG.replace(head_type="mqa")  # a gated head has barriers of its own
    mesh = compile.target(topology, MeshConfig()).mesh
    traced = compile.trace_program("decode", config, TrainConfig(), mesh, 2)
    found = operations(traced.lower(lowering_platforms=(topology,)))
    assert ("optimization_barrier" in found) == (topology == "cpu")


@pytest.mark.parametrize(
    ("topology", "mesh", "sentence"),
    [
        ("cpu:99", {}, "this process has 8 CPU devices: XLA_FLAGS="),
        ("cpu:x", {}, "the topology is 'cpu:x': after cpu: comes a number"),
        ("cuda:0", {}, "the topology is 'cuda:0': after cuda: comes a number"),
        ("cuda:8", {"fsdp": 3}, "fsdp 3 times tensor 1: it must be a divisor of the 8 devices"),
        ("cpu:8", {"data": 3}, "data 3 times fsdp 1 times tensor 1: it must be the number of dev"),
    ],
)
def test_what_cannot_be_had(topology, mesh, sentence):
    with pytest.raises(UserError, match=sentence):
        compile.target(topology, MeshConfig(**mesh))


def test_a_topology_without_libtpu(monkeypatch):
    def missing(name):
        raise compile.PackageNotFoundError(name)

    monkeypatch.setattr(compile, "version", missing)
    with pytest.raises(UserError, match=r"'v5e:2x2' takes the package libtpu: .*pip install 't"):
        compile.target("v5e:2x2", MeshConfig())


def test_memory_that_is_short():
    hbm = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 24.29G of 15.75G hbm. Exceeded hbm capacity by 8.54G."
    )
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (25.50G) exceeds available HBM (15.75G)."
    )
    said = [compile._reason(RuntimeError(text)) for text in (hbm, temporaries)]
    assert said == [
        "does not fit: all take 24.29 GiB, and a device has 15.75 GiB",
        "does not fit: temporaries take 25.50 GiB, and a device has 15.75 GiB",
    ]
    assert compile._reason(RuntimeError("UNIMPLEMENTED:\n  nothing")) == "UNIMPLEMENTED: nothing"


# For TPUs.


@pytest.mark.slow
def test_programs_for_a_tpu(libtpu, capsys):
    """For one chip and four; training exchanges, and decoding copies no whole state."""
    alone = records(capsys, ["v5e:1x1"], "decode", "sample", "prefill")
    shared = records(capsys, ["v5e:2x2"], "decode", "train")
    assert [(r["program"], r["devices"]) for r in alone + shared] == [
        ("decode", 1), ("sample", 1), ("prefill", 1), ("decode", 4), ("train", 4),
    ]  # fmt: skip
    for record in alone + shared:
        assert record["device"] == "TPU v5 lite" and record["memory"]["total"] > 0
        assert bool(record["collectives"]) == (record["program"] == "train")
        assert "copies" not in record or record["copies"]["copies"] == 0


@pytest.mark.slow
def test_prompts_hold_states_once_on_a_tpu(libtpu, monkeypatch):
    """The states of all units, which are scanned, are written where they were read."""
    sizes = dict(num_layers=8, codebook_size=512, d_v=512)
    config, mesh = CONFIG.replace(**sizes), compile.target("v5e:1x1", MeshConfig()).mesh
    found = {}
    for in_place in (True, False):  # the second: control
        tuned = dataclasses.replace(products.TPU, states_in_place=in_place)
        monkeypatch.setattr(products, "TPU", tuned)
        jax.clear_caches()
        traced = compile.trace_program("prefill", config, TrainConfig(), mesh, 8)
        found[in_place] = traced.lower().compile().memory_analysis().temp_size_in_bytes
    jax.clear_caches()
    states = sum(x.nbytes for x in jax.tree.leaves(init_state(config, 8).units))
    assert states < found[True] < found[False] - 0.8 * states


@pytest.mark.slow
def test_a_copy_for_a_tpu_is_counted(libtpu):
    """Control: of a table that is too large for a chip's own memory, whose old version is needed
    after it is written."""
    mesh = compile.target("v5e:1x1", MeshConfig()).mesh
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    table = jax.ShapeDtypeStruct((2**14, 2**12), jnp.float32, sharding=place)

    def body(i, carry):
        table, row = carry
        new = table.at[i].set(row[0, 0])
        return new, row + new[i] + jnp.tanh(row @ table.T) @ new

    def loop(table):
        return jax.lax.fori_loop(0, 9, body, (table, jnp.ones((8, 2**12))))

    compiled = jax.jit(loop, donate_argnums=0).lower(table).compile()
    assert hlo.large_copies(hlo.Program.parse(compiled.as_text()), 2**28).copies > 0


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v9:1", "v5e:", "v5e:1x1x1x1"])
def test_topologies_that_there_are_not(libtpu, topology):
    with pytest.raises(UserError, match=f"there is no topology '{topology}': "):
        compile.target(topology, MeshConfig())
