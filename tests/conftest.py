"""What every test stands on: eight virtual CPU devices, checked shapes, and enwik8 where it is."""

import gc
import os
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# A background job of a shell ignores Ctrl-C, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# ---------------------------------------------------------------- before anything imports jax

assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could set it up"

# Compiling takes more time than running: less of it.
_QUICK = {"--xla_backend_optimization_level": "0"}
_XLA_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    # On a busy machine eight devices on two cores may wait long for each other.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "600",
}
_workers = "PYTEST_XDIST_WORKER" in os.environ
if _workers:  # they share the cores: one compute thread each
    _XLA_FLAGS["--xla_cpu_multi_thread_eigen"] = "false"
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
# `make test-slow` makes programs as users' are.
_quick = _workers and not os.environ.get("TVQ_TEST_AS_USERS")
if _quick and version("jaxlib").startswith("0.10."):  # the last that has the older emitter
    # It compiles loops in half the time, one piece in less than many, and the plain scheduler is
    # quicker too.
    _QUICK["--xla_cpu_use_fusion_emitters"] = "false"
    _QUICK["--xla_cpu_parallel_codegen_split_count"] = "1"
    _QUICK["--xla_cpu_enable_concurrency_optimized_scheduler"] = "false"
_XLA_FLAGS |= _QUICK
_given = os.environ.get("XLA_FLAGS", "").split()
_names = {flag.split("=")[0] for flag in _given}
os.environ["XLA_FLAGS"] = " ".join(
    _given + [f"{name}={value}" for name, value in _XLA_FLAGS.items() if name not in _names]
)
os.environ["JAX_PLATFORMS"] = os.environ.get("TVQ_TEST_PLATFORM", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # in processes that tests start
os.environ["TVQ_CACHE"] = ""
os.environ["MPLBACKEND"] = "agg"

# Under test, every annotated shape and dtype in nn is checked at every call.
from jaxtyping import install_import_hook

install_import_hook("transformer_vq.nn", "beartype.beartype")

# ---------------------------------------------------------------- the rest

import jax
import pytest
from hypothesis import HealthCheck, settings

# Arrays of two dtypes do not meet without a cast: nothing is promoted in silence.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A program is compiled once: modules forget theirs (`_forget_programs`) and many make the same.
# pytest's first process makes the folder, its workers share it, and it ends with the first: a test
# never meets code of an older run.
_made = None
if "TVQ_TEST_PROGRAMS" not in os.environ:
    _made = tempfile.TemporaryDirectory(prefix="tvq-tests-")
    os.environ["TVQ_TEST_PROGRAMS"] = _made.name
_programs = os.environ["TVQ_TEST_PROGRAMS"]
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", _programs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tracing makes many objects and drops few: looking for garbage took a tenth of all time.
gc.set_threshold(50_000, 20, 100)

settings.register_profile(
    "tvq",
    deadline=None,  # the first example compiles
    derandomize=True,  # the same examples at every run
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tvq")

collect_ignore = ["clients"]  # `make test-clients`, in another environment

SHARED = Path(os.environ.get("TVQ_SHARED") or Path(__file__).parents[1].parent / "shared")


def pytest_unconfigure():
    if _made:
        _made.cleanup()


# Each compiled program holds memory maps, a few or, as users' are made, some 500; Linux gives a
# process 65,530, and without these two XLA fails with a segmentation fault.


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _forget_programs_in_time():
    yield
    maps = Path("/proc/self/maps")
    if not _quick and maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder with enwik8.gz, which is too large for the tree. Skips where it is missing."""
    folder = SHARED / "data"
    if not (folder / "enwik8.gz").is_file():
        pytest.skip(f"NOT TESTED: there is no {folder}/enwik8.gz; TVQ_SHARED can name its parent")
    return folder


@pytest.fixture
def double():
    """Computation in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def user_env() -> dict[str, str]:
    """The environment for a `tvq` subprocess: one device and all cores, as a user has it.

    In the fast suite its programs are made quickly. They are kept for the next process, as `tvq`
    keeps them.
    """
    ours = _XLA_FLAGS.keys() - (_QUICK if _quick else {})
    flags = [f for f in os.environ["XLA_FLAGS"].split() if f.split("=")[0] not in ours]
    dropped = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTEST_CURRENT_TEST")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": f"{_programs}/processes",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**env, "XLA_FLAGS": " ".join(flags)}


@pytest.fixture
def one_device(monkeypatch):
    """`train` uses one device, for any batch size: it compiles in a fraction of the time."""
    from tests.helpers import train_on_one_device

    train_on_one_device(monkeypatch)
