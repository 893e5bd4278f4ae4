"""What commands share: names on the terminal, and memory that does not suffice."""

import shutil

import pytest

from tests.helpers import MODEL, fails
from transformer_vq.cli import main
from transformer_vq.cli.common import quoted

ODD = "run\x1b]0;title\x07\x1b[31m[bold]"  # sets the title of a terminal, and its colour


@pytest.fixture(scope="module")
def odd_run(run, tmp_path_factory):
    return str(shutil.copytree(run, tmp_path_factory.mktemp("odd") / ODD))


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["eval", "--chunk-len", "64"],
        ["report", "--no-eval"],
        ["score", "--text", "abc"],
    ],
)
def test_names_reach_the_terminal_as_text(capsys, odd_run, command):
    assert main([*command, "--run", odd_run]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed
    assert "[bold]" in "".join(printed.split("\n"))  # which is no mark-up


def test_names_in_errors_too(capsys, odd_run, tmp_path):
    said = fails(capsys, 1, "info", "--run", f"{odd_run}x")
    assert "\\x1b]0;title" in said and "\x1b" not in said


def test_a_path_for_a_shell():
    assert quoted("a b") == "'a b'" and quoted("runs/x") == "runs/x"
    assert quoted("a\x1b") == "'a\\x1b'"


@pytest.mark.parametrize("what", ["decode", "prefill", "sample", "train", "evaluate"])
def test_bench_refuses_what_memory_does_not_hold(capsys, what):
    model = [f"--config.{name}={value}" for name, value in (MODEL | {"d-model": 2**26}).items()]
    said = fails(capsys, 1, "bench", what, "--batch", "1", *model)
    assert "the parameters, " in said and ", and the memory is " in said
    assert "make the model (--config.*) or --batch smaller" in said
