"""What a run learns from: looked at before anything is made of it."""

import numpy as np
import pytest

from tests.helpers import CONFIG, TOKENS
from transformer_vq.config import TrainConfig
from transformer_vq.data import DataError
from transformer_vq.run.inputs import Inputs
from transformer_vq.sharding import data_mesh

TRAIN = TrainConfig(batch_size=2, sequence_len=16, update_len=8)


def test_a_validation_split_too_short_is_left_out_and_said_so():
    inputs = Inputs.of(TOKENS, TOKENS[:1], CONFIG, TRAIN)
    assert inputs.validation is None
    assert inputs.notes == ("the validation split is too short to score: none is made",)
    whole = Inputs.of(TOKENS, TOKENS[:2], CONFIG, TRAIN)  # control
    assert whole.validation is not None and not whole.notes


def test_tokens_that_do_not_fit_the_model_are_refused():
    for tokens, validation in ((TOKENS + 1, None), (TOKENS, TOKENS + 1)):
        with pytest.raises(ValueError, match=r"token 32 at position .* it must be 0 to 31"):
            Inputs.of(tokens, validation, CONFIG, TRAIN)
    with pytest.raises(DataError, match="the data has 1 of the 17 tokens that a sequence of 16"):
        Inputs.of(TOKENS[:1], None, CONFIG, TRAIN)


def test_tokens_may_be_a_list_or_bytes():
    for tokens in (TOKENS.tolist(), TOKENS.tobytes()):
        np.testing.assert_array_equal(Inputs.of(tokens, None, CONFIG, TRAIN).source.tokens, TOKENS)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ("book.txt", "'book.txt'"),
        (None, "None"),
        ([[1, 2], [3]], r"\[\[1, 2\], \[3\]\]"),
        ([0.5, 1.0], r"\[0.5, 1.0\]"),
        (np.zeros(9), r"float64 of shape \(9,\)"),
        (np.zeros((3, 3), int), r"int64 of shape \(3, 3\)"),
        (np.zeros(9, bool), r"bool of shape \(9,\)"),
    ],
)
def test_what_is_no_text_of_tokens_is_refused(tokens, said):
    for pair in ((tokens, None), (TOKENS, tokens if tokens is not None else "book.txt")):
        with pytest.raises(DataError, match="they must be a flat array of whole numbers"):
            Inputs.of(*pair, CONFIG, TRAIN)
    with pytest.raises(DataError, match=f"^the tokens are {said}: .*open_source makes one of file"):
        Inputs.of(tokens, None, CONFIG, TRAIN)


def test_batches_go_on_where_a_run_is():
    inputs, mesh = Inputs.of(TOKENS, None, CONFIG, TRAIN), data_mesh()
    unbroken = inputs.batches(TRAIN, 0, mesh)
    first, second = next(unbroken), next(unbroken)
    resumed = next(inputs.batches(TRAIN, TRAIN.updates_per_sequence, mesh))
    np.testing.assert_array_equal(resumed.inputs, second.inputs)
    assert not np.array_equal(first.inputs, second.inputs)  # control
