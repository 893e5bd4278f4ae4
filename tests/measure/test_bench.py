"""`tvq bench` on a tiny model: every benchmark gives its figures; wrong options a sentence."""

import json

import pytest

from tests.measure.sizes import TINY
from transformer_vq.cli import main
from transformer_vq.measure import bench

DECODING = ["decode", "--batch", "2", "--position", "3"]
TRAINING = ["train", "--batch", "8", "--length", "16", "--attention", "full"]


def record(capsys, *arguments):
    assert main(["bench", *arguments, "--preset", "tiny", *TINY, "--repeats", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(DECODING, marks=pytest.mark.slow),
        ["prefill", "--length", "20"],
        ["sample", "--batch", "8", "--length", "4", "5"],
        pytest.param(TRAINING, marks=pytest.mark.slow),
        ["evaluate", "--length", "20"],
    ],
    ids=["decode", "prefill", "sample", "train", "evaluate"],
)
def test_figures(arguments, capsys, monkeypatch):
    monkeypatch.setenv("TVQ_CACHE", "")
    monkeypatch.setattr(bench, "PROBE_BYTES", 2**20)
    monkeypatch.setattr(bench, "PROBE_SIZE", 128)
    found = record(capsys, *arguments)
    assert found["what"] == arguments[0] and found["devices"] == 8 and found["jax"]
    assert len(found["results"]) == (2 if arguments[0] == "sample" else 1)
    for row in found["results"]:
        assert row["tokens_per_second"] > 0 and row["peak_bytes"] > 0
        if arguments[0] == "decode":
            assert row["bandwidth"] > 0 and row["ms_low"] <= row["ms_per_step"] <= row["ms_high"]

            fraction = row["bytes_per_step"] / (row["ms_per_step"] / 1e3) / row["bandwidth"]
            assert row["bandwidth_fraction"] == pytest.approx(fraction)
        if arguments[0] in ("train", "prefill", "evaluate"):
            rate = row["tokens_per_second"] * row["flops_per_token"] / row["product_rate"]
            assert row["mfu"] == pytest.approx(rate)
        if arguments[0] == "train":
            assert row["block_len"] == 8


@pytest.mark.slow
def test_few_tokens_in_steps(capsys, monkeypatch):
    monkeypatch.setattr(bench, "PROBE_BYTES", 2**20)
    monkeypatch.setattr(bench, "PROBE_SIZE", 128)
    (row,) = record(capsys, "few", "--length", "2", "16")["results"]
    assert [call["tokens"] for call in row["calls"]] == [2, 16]
    for call in row["calls"]:
        assert call["in_steps_low"] <= call["in_steps"] <= call["in_steps_high"]
        assert call["least"] > 0 and call["ms"] > 0
    assert main(["bench", "few", "--length", "1"]) == 2


@pytest.mark.slow
def test_drafts_beside_plain_decoding(capsys, monkeypatch):
    """What repeats itself is guessed, noise is not; both are what plain decoding writes."""
    monkeypatch.setenv("TVQ_CACHE", "")
    noise, repeats = record(capsys, "decode", "--batch", "1", "--draft")["results"]
    assert noise["same"] and repeats["same"]
    assert noise["right"] < 0.2 * noise["guessed"]
    assert repeats["right"] > 0.5 * repeats["guessed"] > 0
    for row in (noise, repeats):
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["decode", "--batch", "0"], "--batch is 0: it must be a whole number from 1"),
        (["train", "--repeats", "0"], "--repeats is 0: it must be a whole number from 1"),
        (["prefill", "--preset", "none"], "unknown preset 'none'"),
        (["flight"], "flight"),
        (["prefill", "--draft"], "--draft and --weights are for tvq bench decode, and this is pre"),
        (["decode", "--draft", "--profile"], "--profile is of plain decoding: leave out --draft"),
        (["train", "--batch", "3", *TINY], "batch_size is 3: it must be a multiple of the 8"),
    ],
)
def test_wrong_options(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setenv("TVQ_CACHE", "")
    assert main(["bench", *arguments]) in (1, 2)
    assert sentence in capsys.readouterr().err
