"""From arguments to options: what tyro finds wrong, empty values, numbers at the edge."""

import pytest

from tests.helpers import fails
from transformer_vq.cli import parse
from transformer_vq.cli.parse import UsageError, as_usage, options, with_options
from transformer_vq.cli.sample import Sample
from transformer_vq.cli.train import Train
from transformer_vq.config import TrainConfig


@pytest.mark.parametrize(
    ("command", "option", "value", "says"),
    [
        ("train", "--out", "", "--out is empty"),
        ("train", "--data", "", "--data is empty"),
        ("eval", "--run", "", "--run is empty"),
        ("train", "--train.seed", "100000000000000000000", "whole number from 0 to 2^32 - 1"),
        ("train", "--train.seed", "4294967296", "--train.seed is 4294967296: it must be"),
        ("train", "--steps", "9223372036854775808", "a whole number from 1 to 2^31 - 1"),
        ("train", "--train.learning-rate", "1e39", "which is inf in float32"),
        ("train", "--train.learning-rate", "nan", "--train.learning-rate is nan"),
        ("train", "--train.beta1", "0.9999999999", "which is 1 in float32"),
        ("train", "--config.d-model", "1e3", "--config.d-model is '1e3': it must be a whole"),
        ("train", "--config.d-model", "-9223372036854775808", "from 2 to 2^30 - 1"),
        ("train", "--mesh.data", "0", "or -1 (as many as there are)"),
        ("eval", "--rows", "9223372036854775808", "--rows is 9223372036854775808: it must be"),
        ("eval", "--chunk-len", "0", "--chunk-len is 0: it must be"),
        ("bench", "--batch", "2147483648", "--batch is 2147483648: it must be"),
    ],
)
def test_numbers_at_the_edge_and_empty_values(capsys, tmp_path, command, option, value, says):
    others = {"train": ["--dry-run"], "eval": ["--run", str(tmp_path)], "bench": ["decode"]}
    assert says in fails(capsys, 2, command, *others[command], option, value)


def test_who_names_no_action_is_told_of_them(capsys):
    assert "say what to do: train (see tvq tokenizer --help)" in fails(capsys, 2, "tokenizer")
    assert "--run is missing: give it" in fails(capsys, 2, "eval")


def test_another_version_of_tyro_says_it_in_one_line(monkeypatch):
    """Its private part, which tells what is wrong, may be missing; and may tell something else."""
    for found in (lambda hear: parse.contextlib.nullcontext(), lambda hear: _telling(hear)):
        monkeypatch.setattr(parse, "_told_of_errors", found)
        with pytest.raises(UsageError) as error:
            options(Sample, "sample", ["--run", "x", "--top-k", "many"])
        said = str(error.value)
        assert "--top-k" in said and "'many'" in said and "\n" not in said and "│" not in said


def _telling(hear):
    hear(type("BadValue", (), {})())  # without what we look at
    return parse.contextlib.nullcontext()


def test_fields_in_a_sentence_become_options():
    with pytest.raises(ValueError) as error:
        TrainConfig(sequence_len=100, update_len=64)
    said = str(as_usage(error.value, "--train.", TrainConfig))
    assert said.startswith("--train.sequence-len is 100, not a multiple of --train.update-len, 64")


def test_sentences_name_the_options_of_the_command():
    notes = " ".join(TrainConfig(steps=10, warmup_steps=20).notes())
    assert with_options(notes, Train).endswith("lower --train.warmup-steps")
    assert with_options("use d_k below far_cap", Train) == "use --config.d-k below --config.far-cap"
    assert with_options("d_k and far_cap", Sample) == "d_k and --far-cap"  # its options alone
    paths = "runs/d_model/x, d_model.txt, 'far_cap' and ./seed"
    assert with_options(paths, Train) == paths
    word = "streaming is for text, streaming"
    assert with_options(word, Train) == word
    assert with_options(word, Train, "streaming") == "--train.streaming is for text, streaming"
