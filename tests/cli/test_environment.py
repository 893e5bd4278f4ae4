"""Variables of the environment that JAX reads."""

import os
import subprocess
import sys

import pytest

from transformer_vq.cli import main
from transformer_vq.cli.environment import settle_environment


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("JAX_DISABLE_JIT", "1", "false"),
        ("JAX_NO_TRACING", "true", "0"),
        ("JAX_TRANSFER_GUARD", "disallow", "log"),
        ("JAX_TRANSFER_GUARD_HOST_TO_DEVICE", "disallow_explicit", "allow"),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg", "threefry2x32"),
        ("JAX_THREEFRY_PARTITIONABLE", "0", "1"),
    ],
)
def test_what_this_program_cannot_work_with_is_named(capsys, monkeypatch, name, bad, good):
    """Some end in an error of JAX; by others, a seed means other tokens and nobody says so."""
    monkeypatch.setenv(name, bad)
    assert main(["info", "--run", "none"]) == 1
    said = f"tvq: {name} is {bad} in the environment, with which this program cannot work: unset it"
    assert capsys.readouterr().err == said + "\n"
    for value in (good, ""):  # controls
        monkeypatch.setenv(name, value)
        settle_environment()


def test_what_jax_then_finds(user_env):
    """Checks of how a program is written are none of a user's business, nor are XLA's reports."""
    code = (
        "import os\n"
        "from transformer_vq.cli.environment import settle_environment\n"
        "settle_environment()\n"
        "import jax\n"
        "print(jax.config.jax_numpy_rank_promotion, os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    )

    def found(**given: str) -> str:
        env = {k: v for k, v in user_env.items() if k != "TF_CPP_MIN_LOG_LEVEL"} | given
        process = subprocess.run(
            [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
        )
        return process.stdout

    assert found(JAX_NUMPY_RANK_PROMOTION="raise") == "allow 3\n"
    assert found(TF_CPP_MIN_LOG_LEVEL="0") == "allow 0\n"  # who asks for them has them


def test_jax_that_is_imported_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
    settle_environment()
    assert "jax" in sys.modules and os.environ["JAX_NUMPY_RANK_PROMOTION"] == "raise"


def test_numbers_that_jax_was_asked_to_look_for(capsys, monkeypatch):
    def fail(*_):
        raise FloatingPointError("invalid value (nan) encountered in jit(step)")

    monkeypatch.setattr("transformer_vq.cli.info.describe", fail)
    monkeypatch.setenv("JAX_DEBUG_NANS", "1")
    assert main(["info", "--run", "x"]) == 1
    said = "tvq: JAX_DEBUG_NANS is 1 in the environment: invalid value (nan) encountered in jit"
    assert said in capsys.readouterr().err
    monkeypatch.delenv("JAX_DEBUG_NANS")  # control: else it is a fault of ours
    with pytest.raises(FloatingPointError):
        main(["info", "--run", "x"])
