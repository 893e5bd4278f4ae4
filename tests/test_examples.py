"""Every example runs, at a tiny size, and shows what it promises."""

import importlib.util
import re

import pytest

from tests.helpers import ROOT, make_run
from transformer_vq import ModelConfig, SamplingParams, generate, load

EXAMPLES = ROOT / "examples"
TINY = dict(d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=16, window_len=8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, one_device):
    """The presets that examples name are tiny here, and training compiles for one device."""
    monkeypatch.setattr(ModelConfig, "preset", lambda name, **changes: ModelConfig(**TINY))


@pytest.fixture
def run_example(capsys):
    """`run_example(name, *arguments)`: what `python examples/NAME.py ARGUMENTS` prints."""

    def run(name, *arguments) -> str:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def test_each_example_is_tested_and_listed():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert names == names & tested
    index = (EXAMPLES / "README.md").read_text()
    assert names == set(re.findall(r"\]\((\w+)\.py\)", index))


def test_extend_by_hand(run_example, tmp_path):
    run = make_run(tmp_path / "run")
    text = run_example("extend_by_hand", "--run", run, "--prompt", "Call me", "--tokens", 3)
    first, second = text.split("\n", 1)
    assert re.fullmatch(r"the prompt: \d+\.\d\d nats after its first token", first)
    assert second.startswith("Call me") and len(second) > len("Call me\n")


@pytest.mark.slow
def test_fork_a_state(run_example, tmp_path):
    run, state = make_run(tmp_path / "run"), tmp_path / "prompt.state"
    text = run_example("fork_a_state", "--run", run, "--state", state, "--tokens", 8)
    assert text.startswith(f"{state}: {state.stat().st_size:,} bytes")
    ways = re.findall(r"^temperature (.*), seed (\d+)\n(CHAPTER 136. .*)", text, re.M)
    assert len(ways) == 3
    model, tokenizer = load(run)
    prompt = tokenizer.encode("CHAPTER 136. ")
    for temperature, seed, shown in ways:  # as if the prompt had been read for each
        way = SamplingParams(max_tokens=8, temperature=float(temperature), seed=int(seed))
        (output,) = generate(model, [prompt], way)
        whole = "CHAPTER 136. " + tokenizer.decode_text(output)
        assert whole.splitlines()[0] == shown.splitlines()[0]


@pytest.mark.slow
def test_million_tokens(run_example):
    text = run_example("million_tokens", "--tokens", 6000)
    rows = [line.split() for line in text.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1,024", "4,096", "6,144"]
    assert len({row[1] for row in rows}) == 1


@pytest.mark.slow
def test_your_own_source(run_example, tmp_path):
    text = run_example("your_own_source", "--steps", 2, "--out", tmp_path / "run")
    bits = float(re.match(r"(\d\.\d\d) bits per token; a step of four has 2\.00", text)[1])
    assert 2 < bits < 6
    assert re.search(r"^a walk:( \d+){,20}$", text, re.M)


@pytest.mark.slow
def test_train_from_python(run_example, tmp_path):
    arguments = ("--steps", 2, "--tokens", 500, "--out", tmp_path / "run")
    text = run_example("train_from_python", *arguments)
    assert re.match(r"done at step 2\nvalidation loss \d\.\d{3}\n", text)
    assert re.search(r"bits per byte on 500 bytes of the test split\n\n.", text)


@pytest.mark.slow
def test_sample_over_devices(run_example):
    text = run_example("sample_over_devices", "--requests", 3, "--tokens", 4)
    assert text.startswith("3 requests on 8 devices\n")
    assert text.count(": equal: ") == 3 and "DIFFERENT" not in text
