"""`tvq` as people use it: what it prints, what it leaves, and how it says no."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer_vq import costs
from transformer_vq.cli import COMMANDS, main
from transformer_vq.cli.sample import printable, unescape
from transformer_vq.config import PRESETS, ModelConfig, TrainConfig
from transformer_vq.data import ByteTokenizer, bundled_corpus
from transformer_vq.nn.model import init_model, init_state
from transformer_vq.ops.evaluate import Evaluation
from transformer_vq.run.folder import load_run
from transformer_vq.run.log import read_metrics

TVQ = str(Path(sys.executable).with_name("tvq"))
STEPS = 4
MODEL = {"d-model": 32, "d-k": 16, "num-layers": 1, "codebook-size": 16, "window-len": 16}
RUN = {"batch-size": 8, "sequence-len": 64, "evaluate-tokens": 500, "log-every": 1}
SIZES = [
    *(f"--config.{name}={value}" for name, value in MODEL.items()),
    "--config.block-len=256",
    *(f"--train.{name}={value}" for name, value in RUN.items()),
]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("TVQ_CACHE", "")


@pytest.fixture(scope="module")
def content() -> bytes:
    """Text, and bytes that are none."""
    return bundled_corpus().read_bytes()[:40_000] + np.random.default_rng(0).bytes(20_000)


@pytest.fixture(scope="module")
def data(tmp_path_factory, content) -> Path:
    path = tmp_path_factory.mktemp("data") / "book.bin"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> str:
    """A trained run. Look, don't touch."""
    out = str(tmp_path_factory.mktemp("runs") / "run")
    os.environ["TVQ_CACHE"] = ""
    assert main(["train", "--data", str(data), "--out", out, "--steps", str(STEPS), *SIZES]) == 0
    return out


def sample(capsys, run: str, *arguments: str) -> dict:
    """The first sample, as JSON."""
    assert main(["sample", "--run", run, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["samples"][0]


def fails(capsys, status: int, *arguments: str) -> str:
    """The one sentence with which a command refuses."""
    capsys.readouterr()
    assert main(arguments) == status
    printed = capsys.readouterr().err
    assert printed.startswith("tvq: ") and printed.count("\n") == 1
    assert "Traceback" not in printed
    return printed


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options_defaults_and_examples(capsys, command):
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: tvq {command}")
    assert "(default: " in printed or command == "info"
    assert f"  tvq {command} " in printed.partition("examples:\n")[2]


def test_help_reaches_every_field(capsys):
    assert main(["train", "--help"]) == 0
    words = set(capsys.readouterr().out.split())
    for prefix, kind in (("config", ModelConfig), ("train", TrainConfig)):
        for name in kind.__dataclass_fields__:
            assert f"--{prefix}.{name.replace('_', '-')}" in words


def test_dry_run_tells_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    """The model and recipe of a preset, changed; on the eight devices of the tests."""
    monkeypatch.chdir(tmp_path)
    changes = ["--train.batch-size=16", "--train.ema-decay=0.9", "--config.num-layers=1"]
    changes += ["--train.update-len=64", "--train.sequence-len=64"]
    assert main(["train", "--preset", "small", "--dry-run", *changes]) == 0
    printed = capsys.readouterr().out
    config = ModelConfig.preset("small", num_layers=1)
    size = 4 * costs.parameter_count(config) / 1e6
    for line in (
        "recipe: adamw, 5,000 updates of 16 rows by 64 tokens, in sequences of 64",
        "for 8 devices (cpu)",
        f"  parameters                {size:.2f} MB",
        f"  optimizer                 {2 * size:.2f} MB",
        " of 1,024 tokens",
        "in all: 5.12 M tokens",
    ):
        assert line in printed, printed
    assert list(tmp_path.iterdir()) == []


def test_overview_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert main(["--version"]) == 0


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "no command 'trian'"),
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
        (["sample", "--run", "x", "--stop", ""], "stop sequence is empty"),
        (["sample", "--run", "x", "--prompt", "a", "--prompt-file", "b"], "both given"),
        (["sample", "--run", "x", "--num-samples", "0"], "--num-samples is 0"),
        (["sample", "--run", "x", "--num-samples", "2", "--save-state", "s"], "one state"),
        (["sample", "--run", "x", "--save-state", "no/s"], "no such folder"),
        (["eval", "--run", "x", "--rows", "0"], "--rows is 0"),
        (["demo", "--minutes", "0"], "--minutes is 0"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, 2, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no file"), (b"", "is empty"), (b"x", "0 of the 65 tokens"), ("folder", "a directory")],
)
def test_data_that_cannot_be_trained_on(capsys, tmp_path, content, says):
    path = tmp_path / "data"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    out = str(tmp_path / "run")
    assert says in fails(capsys, 1, "train", "--data", str(path), "--out", out, *SIZES)
    assert not Path(out).exists()


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
    monkeypatch.setattr("transformer_vq.cli._is_ours", lambda error: False)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["sample", "--run", run])


# Training


def test_a_run_is_not_overwritten(capsys, run, data):
    says = fails(capsys, 1, "train", "--data", str(data), "--out", run, *SIZES)
    assert f"already holds a run, at step {STEPS}" in says


def test_the_same_command_gives_the_same_losses(capsys, tmp_path, run, content):
    """Digit for digit; and a compressed file is what it holds."""
    data, out = tmp_path / "book.gz", str(tmp_path / "run")
    data.write_bytes(gzip.compress(content))
    assert main(["train", "--data", str(data), "--out", out, "--steps", str(STEPS), *SIZES]) == 0
    printed = capsys.readouterr().out
    assert "60,000 bytes" in printed and f"done: {STEPS} steps" in printed

    def losses(folder: str) -> list:
        records = read_metrics(Path(folder) / "metrics.jsonl")
        return [(r["step"], r.get("loss"), r.get("validation_loss")) for r in records]

    assert losses(out) == losses(run)
    assert len(losses(out)) == STEPS + 1


def test_resuming_needs_nothing_but_the_folder(capsys, tmp_path, run):
    out = shutil.copytree(run, tmp_path / "run")
    arguments = ["train", "--out", str(out), "--resume"]
    assert "d_model 32, not 64" in fails(capsys, 1, *arguments, "--config.d-model", "64",
                                         "--config.d-v", "64")  # fmt: skip
    assert main([*arguments, "--steps", str(STEPS + 2)]) == 0
    assert f"resuming at step {STEPS}" in capsys.readouterr().out
    steps = [r["step"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, STEPS + 3))


# Evaluation


def test_eval_says_the_same_in_words_and_in_json(capsys, run):
    assert main(["eval", "--run", run, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["split"] == "test" and record["tokens"] == 2999
    assert record["bpb"] == pytest.approx(record["loss"] / np.log(2))
    assert [row["start"] for row in record["by_position"]][:3] == [0, 64, 128]
    assert main(["eval", "--run", run]) == 0
    printed = capsys.readouterr().out
    assert f"{record['bpb']:.4f} bpb" in printed and "2,999 tokens" in printed
    assert f"{record['by_position'][-1]['loss']:.4f}" in printed


def test_eval_forgets_when_it_is_told_to(capsys, run):
    assert main(["eval", "--run", run, "--context-len", "128", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 2999 and record["by_position"][-1]["end"] == 128
    assert main(["eval", "--run", run, "--json"]) == 0  # control
    whole = json.loads(capsys.readouterr().out)
    assert whole["bpb"] != record["bpb"] and whole["by_position"][-1]["end"] == 2999
    said = fails(capsys, 2, "eval", "--run", run, "--context-len", "2500")
    assert "--context-len is 2500: it must be a multiple of --chunk-len, 2048" in said


def test_eval_says_that_long_histories_confuse(capsys, monkeypatch, run):
    for late, warned in ((1.1, False), (1.3, True)):
        bins = [(0, 64, 2.0), (64, 128, 1.0), (128, 256, late)]
        result = Evaluation(1.5, 256, bins)
        monkeypatch.setattr("transformer_vq.cli.evaluate.score", lambda *_, r=result, **__: r)
        assert main(["eval", "--run", run]) == 0
        assert ("longer histories confuse it" in capsys.readouterr().out) == warned


def test_eval_knows_the_data_of_the_run(capsys, tmp_path, run):
    """A file that went or changed is not scored in silence."""
    moved = shutil.copytree(run, tmp_path / "run")
    path = next((moved / "checkpoints").glob("*/metadata.json"))
    saved = json.loads(path.read_text())

    def with_data(file: Path) -> None:
        saved["metadata"]["data"]["path"] = str(file)
        path.write_text(json.dumps(saved))
        (path.parent / "SHA256SUMS").write_text(_checksums(path.parent))

    with_data(tmp_path / "gone.txt")
    assert "not there any more" in fails(capsys, 1, "eval", "--run", str(moved))
    (tmp_path / "other.txt").write_text("other text " * 20)
    with_data(tmp_path / "other.txt")
    assert "has changed" in fails(capsys, 1, "eval", "--run", str(moved))
    other = ["--data", str(tmp_path / "other.txt"), "--split", "all"]
    assert main(["eval", "--run", run, *other, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 219


def _checksums(folder: Path) -> str:
    from transformer_vq.io import checkpoint

    return "".join(f"{checkpoint._sha256(folder / n)}  {n}\n" for n in checkpoint._files(folder))


# Sampling


def test_text_is_what_the_tokens_say(capsys, run):
    arguments = ["--prompt", "It was", "--max-tokens", "60"]
    record = sample(capsys, run, *arguments)
    assert len(record["tokens"]) == 60 and not record["stopped"]
    text = ByteTokenizer().decode_text(record["tokens"])
    assert record["text"] == text
    assert main(["sample", "--run", run, *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed == printable(text) + "\n"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)


def test_samples_have_seeds_of_their_own(capsys, run):
    shared = ["sample", "--run", run, "--prompt", "It", "--max-tokens", "20", "--json"]
    assert main([*shared, "--num-samples", "3", "--seed", "5"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [s["seed"] for s in samples] == [5, 6, 7]
    assert sample(capsys, run, *shared[3:-1], "--seed", "6") == samples[1]
    assert main([*shared[:-1], "--num-samples", "2"]) == 0
    assert "sample 2 of 2, seed 1" in capsys.readouterr().out


def test_prompts_of_any_kind(capsys, tmp_path, run):
    """Empty, long, not UTF-8, and of a file or of the standard input."""
    empty = sample(capsys, run, "--max-tokens", "5")
    assert empty == sample(capsys, run, "--max-tokens", "5", "--prompt", "\n")
    path = tmp_path / "prompt"
    path.write_bytes(bytes(range(128, 256)) * 782)
    arguments = ["sample", "--run", run, "--max-tokens", "5", "--json"]
    assert main([*arguments, "--prompt-file", str(path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_tokens"] == 100_096 and len(answer["samples"][0]["tokens"]) == 5


def test_penalties_count_the_prompt(capsys, run):
    """They forbid what is in it, also where the prompt is read apart."""
    prompt = bytes(set(range(32, 127)) - set(b"Q")).decode()
    arguments = ["--prompt", prompt, "--max-tokens", "1", "--temperature", "0"]
    plain = sample(capsys, run, *arguments)
    assert sample(capsys, run, *arguments, "--repetition-penalty", "1") == plain
    harsh = sample(capsys, run, *arguments, "--repetition-penalty", "1e9")
    assert chr(harsh["tokens"][0]) not in prompt


def test_a_saved_state_goes_on_as_if_nothing_had_been(capsys, tmp_path, run):
    state = str(tmp_path / "s.tvq")
    whole = sample(capsys, run, "--prompt", "It was", "--max-tokens", "30")
    first = sample(capsys, run, "--prompt", "It was", "--max-tokens", "10", "--save-state", state)
    rest = sample(capsys, run, "--state", state, "--max-tokens", "20")
    assert first["tokens"] + rest["tokens"] == whole["tokens"]


def test_stop_texts(capsys, tmp_path, run):
    """The output ends before them, and so does the state."""
    whole = sample(capsys, run, "--max-tokens", "40")["tokens"]
    path = tmp_path / "prompt"
    for length in (1, 3):
        stop = os.fsdecode(bytes(whole[20 : 20 + length]))
        if any(ord(c) > 127 for c in stop):
            end = next(
                i for i in range(41 - length) if whole[i : i + length] == whole[20 : 20 + length]
            )
        else:
            end = bytes(whole).index(stop.encode())
        arguments = ["--max-tokens", "40", "--stop", stop, "--save-state", str(tmp_path / "s")]
        got = sample(capsys, run, *arguments)
        assert got["stopped"] and got["tokens"] == whole[:end]
        path.write_bytes(b"\n" + bytes(whole[:end]))
        after = sample(capsys, run, "--state", str(tmp_path / "s"), "--max-tokens", "8")
        assert after == sample(capsys, run, "--prompt-file", str(path), "--max-tokens", "8")


def test_logprobs(capsys, run):
    record = sample(capsys, run, "--max-tokens", "5", "--logprobs")
    assert all(p < 0 for p in record["logprobs"])
    assert main(["sample", "--run", run, "--max-tokens", "5", "--logprobs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and f"{record['logprobs'][0]:.4f}" in lines[0]


def test_prefill_reads_a_prompt_once(capsys, tmp_path, run, data):
    state = str(tmp_path / "s.tvq")
    assert main(["prefill", "--run", run, "--prompt-file", str(data), "--save-state", state]) == 0
    printed = capsys.readouterr().out
    assert "60,000 tokens" in printed and "tokens/s" in printed and "kB" in printed
    after = sample(capsys, run, "--state", state, "--max-tokens", "10")
    assert after == sample(capsys, run, "--prompt-file", str(data), "--max-tokens", "10")


def test_escapes_and_control_characters():
    assert unescape(r"a\n\tb\\n\x") == "a\n\tb\\n\\x"
    assert printable("a\tb\n\x1b[2J\x7f\x9bé") == "a\tb\n^[[2J^?\ufffdé"


# Information and costs


def test_info(capsys, run, data):
    assert main(["info", "--run", run, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model, _ = load_run(run)
    assert record["model"]["parameters"] == sum(x.size for x in jax.tree.leaves(model.params))
    assert record["data"]["path"] == str(data) and record["data"]["size"] == 60_000
    assert record["training"]["step"] == STEPS
    assert record["training"]["tokens"] == STEPS * 8 * 64
    assert [c["step"] for c in record["checkpoints"]] == [STEPS]
    assert main(["info", "--run", run]) == 0
    printed = capsys.readouterr().out
    assert f"{record['model']['parameters']:,}" in printed
    assert f"{record['training']['validation_loss']:.4f}" in printed


VARIANTS = [
    *(ModelConfig.preset(name) for name in PRESETS),
    *(
        ModelConfig(head_type=kind, d_model=64, d_k=16, num_layers=3, **switches)
        for kind in ("shga", "mqa", "mha")
        for switches in (
            {},
            {"tie_embeddings": True, "absolute_positions": True, "final_norm": False},
            {"attention": "full", "state_dtype": "bfloat16"},
        )
    ),
    ModelConfig(d_model=64, num_heads=2, d_v=48),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_counts_are_those_of_the_arrays(config):
    model = jax.eval_shape(lambda: init_model(config, 0))
    leaves = jax.eval_shape(lambda: jax.tree.leaves(init_state(config, 1)))
    assert costs.parameter_count(config) == sum(x.size for x in jax.tree.leaves(model.params))
    assert costs.codebook_count(config) == sum(x.size for x in jax.tree.leaves(model.codebook))
    assert costs.state_bytes(config) == sum(x.size * x.dtype.itemsize for x in leaves)


def test_costs_of_attention():
    """Full attention costs more with the length; at the length of our columns, about as much. With
    one block it computes the whole matrix, with n of them n (n + 1) / 2 of n n parts."""
    config = ModelConfig.preset("small")
    columns = config.window_len + config.block_len + config.codebook_size
    full = costs.full_attention_train_flops
    whole = config.replace(block_len=10**6)
    ours = costs.train_flops(config)
    assert 0.8 < ours / full(whole, columns) < 1.2
    assert full(config, 32 * columns) > 5 * ours
    length = 4 * config.block_len
    rest = 2 * full(whole, length) - full(whole, 2 * length)  # what does not depend on the length
    assert (full(config, length) - rest) / (full(whole, length) - rest) == pytest.approx(10 / 16)
    # An odd length: 3 blocks of 4 for 9 tokens, so 6 pairs of 16.
    odd = (full(config.replace(block_len=4), 9) - rest) / (full(whole, 9) - rest)
    assert odd == pytest.approx(6 * 16 / 81, rel=1e-3)  # operations are whole
    # In parts of a sequence, full attention looks back over all of it; VQ's cost is the part's.
    parts = TrainConfig(sequence_len=32 * columns, update_len=columns)
    of_all = full(config, 32 * columns)
    assert costs.run_flops(config.replace(attention="full"), parts) == of_all
    assert costs.run_flops(config, parts) == ours < of_all
    one, two = costs.decode_bytes(config, 1), costs.decode_bytes(config, 2)
    assert two - one == costs.state_bytes(config) + 4 * config.d_model
    assert costs.decode_flops(config) > 2 * costs.parameter_count(config) * 0.8


# Processes: what only a real one shows


def start(user_env: dict, *arguments: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen([TVQ, *arguments], env=user_env, stdout=pipe, stderr=pipe)


def test_help_and_wrong_options_do_not_wait_for_jax(user_env):
    code = (
        "import sys; from transformer_vq.cli import main\n"
        "assert main(['train', '--help']) == 0\n"
        "assert main(['train', '--out', 'x', '--data', 'x', '--config.d-k', '-1']) == 2\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=user_env, check=True, capture_output=True)


def test_ctrl_c_in_training_saves(tmp_path, data, user_env):
    out = str(tmp_path / "run")
    process = start(user_env, "train", "--data", str(data), "--out", out, "--steps", "1000000",
                    "--train.checkpoint-every", "1000000", *SIZES)  # fmt: skip
    while not (line := process.stdout.readline()).startswith(b"step "):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    step = int(re.search(rb"interrupted and saved at step (\d+)", printed)[1])
    assert f"train --resume --out {out}".encode() in printed
    assert load_run(out)[1].step == step > 0


def test_ctrl_c_in_sampling_ends_the_line(run, user_env):
    process = start(user_env, "sample", "--run", run, "--max-tokens", "100000000")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert printed.endswith(b"\n") and b"Traceback" not in errors


def test_a_reader_that_leaves_is_no_error(run, user_env):
    process = start(user_env, "sample", "--run", run, "--max-tokens", "100000000")
    assert process.stdout.read(10)
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(timeout=120) == 141


@pytest.mark.slow
def test_kill_during_a_checkpoint(tmp_path, data, user_env):
    """Whatever was being written when it was killed, `--resume` goes on from a whole checkpoint."""
    arguments = ["train", "--data", str(data), "--steps", "80", "--train.checkpoint-every", "2",
                 "--train.evaluate-every", "0", *SIZES]  # fmt: skip
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    for kill in range(3):
        resume = ["--resume"] if kill else []
        process = start(user_env, *arguments, "--out", str(out), *resume)
        before = max(
            (int(p.name) for p in checkpoints.glob("[0-9]*") if p.name.isdecimal()), default=0
        )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            names = [p.name for p in checkpoints.glob("*")] if checkpoints.is_dir() else []
            newest = max((int(n) for n in names if n.isdecimal()), default=0)
            if newest > before + 4 and any("tmp" in name for name in names):
                break
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    process = start(user_env, *arguments, "--out", str(out), "--resume")
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert b"done: 80 steps" in printed

    unbroken = tmp_path / "unbroken"
    process = start(user_env, *arguments, "--out", str(unbroken))
    process.communicate(timeout=500)

    def losses(folder: Path) -> list:
        return [(r["step"], r.get("loss")) for r in read_metrics(folder / "metrics.jsonl")]

    assert losses(out) == losses(unbroken)
