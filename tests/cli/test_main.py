"""The frame of `tvq`: help, wrong options, and what is whose fault."""

import errno
import io
import os
import subprocess
import sys

import pytest

from tests.helpers import TVQ, fails
from transformer_vq.cli import COMMANDS, main
from transformer_vq.cli.cache import cache_folder
from transformer_vq.cli.streams import open_streams
from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.errors import UserError


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options_defaults_and_examples(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: tvq {command}")
    assert "\n\n" in printed and "\n\n\n" not in printed
    assert "(default: " in printed or command == "info"
    assert f"  tvq {command} " in printed.partition("examples:\n")[2]


def test_help_reaches_every_field(capsys):
    assert main(["train", "--help"]) == 0
    words = set(capsys.readouterr().out.split())
    for prefix, kind in (("config", ModelConfig), ("train", TrainConfig)):
        for name in kind.__dataclass_fields__:
            assert f"--{prefix}.{name.replace('_', '-')}" in words


@pytest.mark.parametrize("columns", ["1", "9", "40"])
def test_help_on_a_narrow_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["demo", "--help"]) == 0 and os.environ["COLUMNS"] == columns
    assert "Train a small model" in capsys.readouterr().out


def test_overview_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "no command 'trian': perhaps you meant train; the commands are demo, train"),
        (["xyz"], "no command 'xyz': the commands are demo, train"),
        (["info", "runs/x"], "no use for 'runs/x': perhaps you meant --run runs/x (see"),
        (["train", "book.txt", "--out", "x"], "perhaps you meant --data book.txt (see"),
        (["train", "--out", "x"], "--data FILE"),
        (["train", "--data", "x"], "--out is missing"),
        (["train", "--out", "x", "--resume"], "no run in x to resume"),
        (["train", "--dry-run", "--resume"], "leave out --resume"),
        (
            ["train", "--dry-run", "--train.optimizer", "adam"],
            "one of adamw, lion, adafactor, muon",
        ),
        (["train", "--dry-run", "--train.accumulate", "3"], "--train.batch-size is 8, not a mul"),
        (["train", "--dry-run", "--preset", "huge"], "'huge': the presets are tiny"),
        (
            ["train", "--out", "x", "--data", "x", "--preset", "huge"],
            "'huge': the presets are tiny",
        ),
        (["train", "--out", "x", "--data", "x", "--config.d-k", "-1"], "--config.d-k is -1"),
        (["train", "--out", "x", "--data", "x", "--config.d-k", "one"], "--config.d-k is 'one'"),
        (["train", "--out", "x", "--data", "x", "--config.dk", "1"], "no option --config.dk"),
        (["train", "--out", "x", "--data", "x", "--config.attention", "best"], "one of vq, full"),
        (["train", "--out", "x", "--data", "x", "--train.batch-size", "0"], "--train.batch-size"),
        (["train", "--out", "x", "--data", "x", "--steps", "1", "--train.steps", "2"], "give one"),
        (["sample", "--run", "x", "more"], "'more'"),
        (["sample", "--run", "x", "--top-p", "0"], "--top-p is 0.0: it must be above 0"),
        (["sample", "--run", "x", "--top-p", "1.5"], "--top-p is 1.5: it must be above 0 and at"),
        (["sample", "--run", "x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["sample", "--run", "x", "--stop", ""], "--stop is empty: give a text"),
        (["sample", "--run", "x", *["--stop", "a"] * 9], "--stop is given 9 times: at most 8"),
        (["sample", "--run", "x", "--typical-p", "2"], "--typical-p is 2.0"),
        (["sample", "--run", "x", "--prompt", "a", "--prompt-file", "b"], "both given"),
        (["sample", "--run", "x", "--num-samples", "0"], "--num-samples is 0"),
        (["sample", "--run", "x", "--num-samples", "1000000000"], "from 1 to 1,000,000"),
        (["draw", "--run", "x", "--num-images", "1000000000"], "from 1 to 10,000"),
        (["sample", "--run", "x", "--num-samples", "2", "--save-state", "s"], "one state"),
        (["sample", "--run", "x", "--save-state", "no/s"], "no such folder"),
        (["sample", "--run", "x", "--save-state", "."], "a folder: give the name of a file"),
        (["sample", "--run", "x", "--save-state", "/dev/null"], "no regular file: give the name"),
        (["sample", "--run", "x", "--save-state", "/proc/s"], "cannot be written to"),
        (["train", "--out", "x", "--data", "x", "a\0b"], r"--data has 'a\x00b': leave out the NUL"),
        (["demo", "--out=a\0"], "leave out the NUL"),
        (["eval", "--run", "x", "--rows", "0"], "--rows is 0"),
        (["demo", "--minutes", "0"], "--minutes is 0"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, 2, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eval", "sample", "info"])
def test_a_folder_without_a_model(capsys, tmp_path, command):
    assert "no run folder" in fails(capsys, 1, command, "--run", str(tmp_path / "none"))
    assert "no checkpoint" in fails(capsys, 1, command, "--run", str(tmp_path))


def test_unusable_files(capsys, tmp_path, run):
    text = tmp_path / "text"
    text.write_text("no state")
    assert "not a state file" in fails(capsys, 1, "sample", "--run", run, "--state", str(text))
    gone = str(tmp_path / "gone")
    assert "no file" in fails(capsys, 1, "sample", "--run", run, "--prompt-file", gone)
    assert "unknown split" in fails(capsys, 1, "eval", "--run", run, "--split", "best")


def test_faults_of_the_program_keep_their_traceback(monkeypatch, run):
    monkeypatch.setattr("transformer_vq.run.folder.load_run", lambda *_: int("x"))
    with pytest.raises(ValueError, match="invalid literal") as error:
        main(["sample", "--run", run])
    assert "a fault of the program" in error.value.__notes__[0]


def test_help_and_wrong_options_do_not_wait_for_jax(user_env):
    code = (
        "import sys; from transformer_vq.cli import main\n"
        "assert main(['train', '--help']) == 0\n"
        "assert main(['train', '--out', 'x', '--data', 'x', '--config.d-k', '-1']) == 2\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=user_env, check=True, capture_output=True)


# What is the machine's: memory, files, the user's folders


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "memory does not suffice; make "),
        (
            MemoryError("Unable to allocate 3.73 TiB for an array with shape (9,) and"),
            "memory does not suffice: 3.73 TiB were needed at once; make ",
        ),
        (
            type("JaxRuntimeError", (RuntimeError,), {})(
                "RESOURCE_EXHAUSTED: Out of memory allocating 4000000000000 bytes."
            ),
            "memory does not suffice: 4,000.0 GB were needed at once; make ",
        ),
        (OSError(errno.EIO, "Input/output error", "a\x1b]0;x\x07"), r"cannot use a\x1b]0;x\x07: "),
        (OSError(errno.EIO, "Input/output error"), "cannot use a file: Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write a file: No space left on"),
        (
            ValueError("invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
            "tvq: JAX_ENABLE_X64 is maybe in the environment: invalid truth value 'maybe'",
        ),
        (UserError("x\x1b[2J" + 9_999 * "y"), r"tvq: x\x1b[2Jyyy"),
    ],
)
def test_what_is_no_fault_of_the_program(capsys, monkeypatch, error, says):
    monkeypatch.setenv("JAX_ENABLE_X64", "maybe")

    def fail(*_):
        raise error

    monkeypatch.setattr("transformer_vq.cli.info.describe", fail)
    printed = fails(capsys, 1, "info", "--run", "x")
    assert says in printed and len(printed) < 1010


@pytest.mark.parametrize("error", [RuntimeError("Backend 'x' is not known"), AssertionError()])
def test_without_a_device(capsys, monkeypatch, run, error):
    """As with JAX_PLATFORMS=cuda and no GPU: no damage of the run, and no bug of ours."""

    def fail(*_):
        raise error

    import jax

    monkeypatch.setenv("JAX_PLATFORMS", "x")
    monkeypatch.setattr(jax, "devices", fail)
    for command in (["info"], ["sample", "--max-tokens", "1"]):
        monkeypatch.setattr("transformer_vq.cli.info.describe", fail)
        printed = fails(capsys, 1, *command, "--run", run)
        assert "JAX finds no device to compute on, with JAX_PLATFORMS=x: " in printed
        assert (str(error) or "there is none") in printed and printed.endswith("or unset it\n")


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--run", "RUN", "--save-state", "there/s"],
        ["prefill", "--run", "RUN", "--prompt-file", "x", "--save-state", "there/s"],
        ["report", "--run", "RUN", "--out", "there/r.html"],
        ["tokenizer", "train", "--data", "x", "--out", "there/t.json"],
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(
    capsys, monkeypatch, tmp_path, run, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    option, name = command[-2:]
    given = [run if word == "RUN" else word for word in command]

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    for work in ("data.open_source", "run.folder.load_run"):
        monkeypatch.setattr(f"transformer_vq.{work}", None)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", refuse)
        printed = fails(capsys, 2, *given)
    assert printed.startswith(
        f"tvq: {option} is {name}: its folder cannot be written to (Read-only"
    )
    gone = fails(capsys, 2, *given[:-1], "gone/x.json")
    assert f"{option} is gone/x.json: there is no such folder, make it first" in gone


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", '-- # +- "?" ?'), ("latin-1", '-- # ± "é" ?')]
)
def test_a_terminal_shows_what_it_can(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    open_streams()
    print("── █ ± “é” 日", end="", flush=True)
    assert stream.buffer.getvalue().decode(encoding) == shown


def test_a_link_to_itself(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    printed = fails(capsys, 1, "train", "--data", "loop", "--out", "x")
    assert "loop: Too many levels of symbolic links" in printed


@pytest.mark.parametrize("cache", [None, "", "folder"])
def test_without_a_home_folder(tmp_path, monkeypatch, cache):
    """A user id that no list of users has, and no HOME: then there is no cache."""
    for name in ("HOME", "XDG_CACHE_HOME", "TVQ_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if cache is not None:
        monkeypatch.setenv("TVQ_CACHE", cache and str(tmp_path / cache))
    monkeypatch.setattr("pathlib.Path.home", _no_home)
    assert main(["--help"]) == 0
    found = cache_folder("data")
    assert found == (tmp_path / "folder" / "data" if cache else None)


def test_small_programs_are_kept_too(tmp_path, user_env):
    """So a second start compiles nothing: JAX keeps what takes it no time."""
    code = (
        "from transformer_vq.cli.cache import use_compilation_cache; use_compilation_cache();"
        "import jax; jax.jit(lambda x: x + 1)(1).block_until_ready()"
    )
    env = {k: v for k, v in user_env.items() if "CACHE" not in k} | {"TVQ_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert any(tmp_path.iterdir())


# Libraries that save, train, draw or show: importing them takes time that writing does not need.
OTHERS = ("orbax", "optax", "grain", "matplotlib", "rich", "PIL", "tokenizers", "scipy", "flax")


def test_what_writes_imports_no_library_of_others(user_env):
    code = (
        "import sys, transformer_vq.cli.sample, transformer_vq.run.folder\n"
        "import transformer_vq.engine.batch, transformer_vq.engine.ready, transformer_vq.io.state\n"
        f"assert not [name for name in {OTHERS} if name in sys.modules]\n"
        "import transformer_vq.io.handler; assert 'orbax' in sys.modules"  # control
    )
    subprocess.run([sys.executable, "-c", code], env=user_env, check=True)


@pytest.mark.slow
def test_a_second_start_traces_nothing_and_imports_little(tmp_path, user_env, run):
    code = (
        "import sys; from transformer_vq.cli import main\n"
        f"status = main(['sample', '--run', {run!r}, '--prompt', 'It was', '--max-tokens', '3'])\n"
        f"sys.exit(status or [name for name in {OTHERS} if name in sys.modules] or 0)"
    )
    env = {name: value for name, value in user_env.items() if "CACHE" not in name}
    env |= {"TVQ_CACHE": str(tmp_path), "JAX_LOG_COMPILES": "1"}
    first, second = (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        for _ in range(2)
    )
    assert second.stdout == first.stdout
    for name in (b"prepare", b"prefill_few", b"generate_tokens"):
        traced = b"Finished tracing " + name
        assert traced in first.stderr and traced not in second.stderr


def _no_home():
    raise RuntimeError("Could not determine home directory.")


# Streams


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("info --run RUN >&-", 0, ""),
        ("info --run none 2>&-", 1, ""),
        ("--help >&- 2>&- <&-", 0, ""),
        ("info --run RUN | head -c 1", 141, ""),
        ("info --run RUN >/dev/full", 1, "tvq: cannot write the output: No space left on device\n"),
        ("sample --run RUN --prompt-file - <&-", 2, "tvq: standard input is closed: give a file"),
        ("score --run RUN --file - <&-", 2, "tvq: standard input is closed: give a file"),
    ],
)
def test_streams_that_are_closed_or_full(user_env, run, command, status, says):
    line = f"set -o pipefail; {TVQ} {command.replace('RUN', run)}"
    user_env.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(["bash", "-c", line], env=user_env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(says) and bool(done.stderr) == bool(says)


def test_a_full_output_that_is_not_buffered(user_env):
    line, env = f"{TVQ} --version >/dev/full", {**user_env, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "tvq: cannot write the output: No space left on device\n"
