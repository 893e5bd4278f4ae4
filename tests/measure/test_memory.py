"""What compiling leaves behind is given back, by every process that uses an operation."""

import subprocess
import sys

import jax
import pytest

from transformer_vq.measure import memory as trim

COMPILE = """
import sys
import jax, jax.numpy as jnp
if sys.argv[1] == "ours":
    from transformer_vq import sample_op
    from transformer_vq.measure import memory as trim
    trim.LONG = 0.0
    trim.trim_after_compiling()

def loss(x):  # unrolled, so that there is much to compile
    for i in range(200):
        x = jnp.sin(x @ x) + jnp.cumsum(x, 0) / (i + 1)
    return x.sum()

program = jax.jit(jax.grad(loss)).lower(jnp.ones((8, 8))).compile()
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmRSS")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: only Linux tells what is resident")
def test_less_memory_stays(user_env):
    env = user_env | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # each compiles

    def resident(whose):
        command = [sys.executable, "-c", COMPILE, whose]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return int(done.stdout) / 1024  # MiB

    plain, ours = resident("plain"), resident("ours")
    assert ours < plain - 100, (ours, plain)  # though ours has imported more


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: there is no glibc")
def test_only_long_compilations(monkeypatch):
    """Short ones are many, and leave little."""
    calls = []

    class Library:
        malloc_trim = calls.append

    monkeypatch.setattr(trim.ctypes, "CDLL", lambda _: Library)
    trim.trim_after_compiling()
    monkeypatch.setattr(trim, "LONG", 1e9)  # seconds
    jax.jit(lambda x: x + 1)(1.0)
    assert calls == []
    monkeypatch.setattr(trim, "LONG", 0.0)
    jax.jit(lambda x: x + 2)(1.0)
    assert calls and set(calls) == {0}
