"""`tvq sample` and `tvq prefill`: prompts, stops, states, and text for terminals."""

import json
import os
import re
import signal
import sys

import pytest

import transformer_vq.cli.models as command
from tests.helpers import fails, sample, start
from transformer_vq.cli import main
from transformer_vq.cli.models import prompt_tokens
from transformer_vq.cli.text import printable
from transformer_vq.data import ByteTokenizer
from transformer_vq.errors import UserError


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


def test_a_terminal_shows_the_prompt_too(capsys, monkeypatch, run):
    arguments = ["sample", "--run", run, "--prompt", "It was", "--max-tokens", "9"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"It was{text}"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]


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


@pytest.mark.slow
def test_drafts_change_no_token(capsys, run):
    """Guesses from the text itself, prompt included, or of a run; how many were right is said."""
    for draft, temperature in (("text", "0"), (run, "0.2")):  # the likeliest tokens come again
        arguments = ["--prompt", "It was. " * 5, "--max-tokens", "150"]
        arguments += ["--temperature", temperature]
        plain = sample(capsys, run, *arguments)
        command = ["sample", "--run", run, "--json", *arguments, "--draft", draft]
        assert main(command) == 0
        printed = capsys.readouterr()
        record = json.loads(printed.out)
        assert record["samples"] == [plain]
        assert 0 < record["right"] <= record["guessed"]
        share = f"{record['right'] / record['guessed']:.0%} of them right"
        assert f"{record['guessed']:,} tokens were guessed ahead, {share}" in printed.err
    sentence = fails(capsys, 1, "sample", "--run", run, "--draft", "nowhere", "--prompt", "a")
    assert "nowhere" in sentence


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


@pytest.mark.slow
def test_a_state_keeps_the_bounds_it_was_made_under(capsys, tmp_path, run):
    state, prompt = str(tmp_path / "state"), tmp_path / "prompt"
    prompt.write_text("Call me Ishmael. " * 20)
    decay = ["--far-decay", "100"]
    made = ["prefill", "--run", run, "--prompt-file", str(prompt), "--save-state", state]
    assert main([*made, *decay]) == 0
    capsys.readouterr()
    go_on = ["sample", "--run", run, "--state", state, "--max-tokens", "2"]
    assert main([*go_on, *decay]) == 0
    for other in ([], ["--far-decay", "101"], [*decay, "--far-cap", "9"]):
        said = fails(capsys, 1, *go_on, *other)
        assert "it was made with --far-decay 100 and --far-cap 0, and here it is --far-" in said


def test_prefill_reads_a_prompt_once(capsys, tmp_path, run, data):
    state = str(tmp_path / "s.tvq")
    assert main(["prefill", "--run", run, "--prompt-file", str(data), "--save-state", state]) == 0
    printed = capsys.readouterr().out
    assert "60,000 tokens" in printed and "tokens/s" in printed and "kB" in printed
    after = sample(capsys, run, "--state", state, "--max-tokens", "10")
    assert after == sample(capsys, run, "--prompt-file", str(data), "--max-tokens", "10")


@pytest.mark.slow
def test_ctrl_c_in_sampling_ends_the_line(run, user_env):
    process = start(user_env, "sample", "--run", run, "--max-tokens", "100000000")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert printed.endswith(b"\n") and b"Traceback" not in errors


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(run, user_env):
    process = start(user_env, "sample", "--run", run, "--max-tokens", "100000000")
    assert process.stdout.read(10)
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(timeout=120) == 141


def test_a_prompt_that_the_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "free_memory", lambda: 32 * 10)
    (path := tmp_path / "a.txt").write_text("0123456789")
    assert len(prompt_tokens("", str(path), ByteTokenizer())) == 10
    path.write_text("0123456789+")
    with pytest.raises(UserError, match=r"a.txt holds more than 10 bytes, .*: give a smaller one"):
        prompt_tokens("", str(path), ByteTokenizer())
    with path.open("rb") as file:
        monkeypatch.setattr(command, "standard_input", lambda: file)
        with pytest.raises(UserError, match="the standard input has more than 10 bytes"):
            prompt_tokens("", "-", ByteTokenizer())
