"""README and docs are true: their code runs, their commands parse, what they name is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers import ROOT, TESTS, make_run
from transformer_vq.cli import COMMANDS, parse, split_command
from transformer_vq.cli.parse import UsageError

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SOURCE = ROOT / "src/transformer_vq"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


# Code.

PYTHON = {
    code: f"{name(page)}-{i}" for page in PAGES for i, code in enumerate(blocks(page, "python"))
}  # what stands on two pages is run once


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder as it is after `make demo`, with a model of no size."""
    folder = tmp_path_factory.mktemp("docs")
    make_run(folder / "runs/demo")
    (folder / "book.txt").write_text("Call me Ishmael. " * 200)
    return folder


@pytest.mark.parametrize("code", PYTHON, ids=PYTHON.values())
def test_python_runs_as_it_is_printed(code, demo_folder, monkeypatch, one_device, capsys):
    monkeypatch.chdir(demo_folder)
    exec(compile(code, "<docs>", "exec"), {"__name__": "docs"})
    if "stream(" in code:
        assert len(capsys.readouterr().out) > 100  # text, and much of it


def test_readme_has_code_to_paste():
    (code,) = blocks(ROOT / "README.md", "python")
    assert 'load("runs/demo")' in code and "stream(" in code


# Commands.


def commands(page: Path) -> list[str]:
    """What stands in a block of code behind `tvq`, up to a comment or the shell's next word."""
    text = page.read_text()
    lines = "\n".join(re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.M | re.S))
    lines += "\n" + "\n".join(re.findall(r"^ {4}.*", text, re.M))
    lines = re.sub(r"\\\n\s*", " ", lines)
    found = re.findall(r"(?:^|[\s/])tvq ((?:--help|--version|[a-z-]+ ).*)", lines)
    return [re.split(r"\s#|[|&;]|\)$", line)[0].replace("$i", "0").strip() for line in found]


COMMAND_LINES = [
    pytest.param(line, id=f"{name(page)}-{line[:50]}") for page in PAGES for line in commands(page)
]


def command(name: str):
    module, kind, _ = COMMANDS[name]
    return getattr(importlib.import_module(f"transformer_vq.cli.{module}"), kind)


def check(line: str) -> None:
    """Raise `UsageError` unless `tvq` would take this line."""
    first, rest = split_command(shlex.split(line))
    if not first.startswith("--"):
        parse.options(command(first), first, rest)


def test_commands_are_found():
    assert len(COMMAND_LINES) > 40
    with pytest.raises(UsageError, match="there is no option --step"):  # control
        check("train --data book.txt --out runs/book --step 2000")


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_is_one_that_tvq_takes(line):
    check(line)


def test_options_within_sentences_exist(capsys):
    """Of `tvq NAME --option` in a sentence, and of an option of `tvq train` by itself."""
    texts = {name(page): page.read_text() for page in PAGES}
    inline = [
        (page, code) for page, text in texts.items() for code in re.findall("`([^`\n]+)`", text)
    ]
    known: dict[str, set[str]] = {}

    def options_of(first: str) -> set[str]:
        if first not in known:
            capsys.readouterr()
            parse.options(command(first), first, ["--help"])
            known[first] = set(re.findall(r"--[\w.-]+", capsys.readouterr().out)) | {"--help"}
        return known[first]

    for page, code in inline:
        options = {option.split("=")[0] for option in re.findall(r"--[\w.-]+", code)}
        if match := re.match(r"(?:tvq |\.venv/bin/tvq )([a-z-]+\b.*)", code):
            first, _ = split_command(match[1].split())
            assert first in COMMANDS, f"{page}: {code}"
            assert options <= options_of(first), f"{page}: {code}"
        elif code.startswith(("--train.", "--config.", "--mesh.")):
            assert options <= options_of("train"), f"{page}: {code}"


# What is named is there.


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(
        r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_at_most_115_wide(page):
    wide = [
        line
        for line in re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S).splitlines()
        if len(line) > 115 and not line.startswith("|")
    ]
    assert not wide


def test_the_tree_of_architecture_is_the_tree():
    """A new file gets its line in docs/architecture.md, and a file that went loses it."""
    text = (ROOT / "docs/architecture.md").read_text()
    tree = text[text.index("    src/transformer_vq/\n") :].split("\n\n")[0]
    named, folders = set(), []
    for line in tree.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip()) - 6) // 2
        first = line.split()[0]
        if first.endswith("/"):
            folders = [*folders[:depth], first]
        elif first.endswith(".py"):
            named.add("".join(folders[:depth]) + first)
    packages = {str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py") if p.name != "__init__.py"}
    assert named - {"__init__.py"} == packages


def test_tests_that_are_named_exist():
    text = (ROOT / "docs/testing.md").read_text()
    there = {path.stem for path in TESTS.rglob("test_*.py")}
    there |= {
        found
        for path in TESTS.rglob("test_*.py")
        for found in re.findall(r"def (test_\w+)", path.read_text())
    }
    missing = set(re.findall(r"\btest_\w+", text)) - there
    assert not missing
