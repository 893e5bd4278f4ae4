"""A second reading, what counts in it, and what it refuses."""

import math

import numpy as np
import pytest

from transformer_vq import Model, ModelConfig, init_model
from transformer_vq.errors import UserError
from transformer_vq.measure import reading
from transformer_vq.measure.reading import second_reading
from transformer_vq.ops.scores import Evaluation, Gain

CONFIG = ModelConfig(d_model=8, d_k=4, num_layers=1, codebook_size=4, block_len=8, window_len=3)


def test_counted_are_the_passages_and_nothing_else(monkeypatch):
    """Each passage counts once at its first reading and once at its second, and the same bytes."""
    seen, given = [], []

    def counted(model, source, rows, far_gain):
        assert source.whole_documents and rows == 2 and len(source.starts) == 2
        given.append(source.tokens[source.starts].tolist())
        seen.append(source.tokens[source.counted])
        gain = Gain(math.log(8), math.log(4)) if far_gain else None
        return Evaluation((3 - len(seen)) * math.log(2), 5, [], far_gain=gain)

    monkeypatch.setattr(reading, "evaluate", counted)
    text = np.arange(20, dtype=np.uint8)
    model = init_model(CONFIG, 0)
    read = second_reading(model, text, passage=5, between=4, passages=2)
    assert seen[0].tolist() == [*range(1, 6), *range(11, 16)]
    assert seen[1].tolist() == seen[0].tolist()
    assert read == pytest.approx((2, 1, None, None)) and read.gain == pytest.approx(1)
    # Given is the token before the passage, or one that is asked for.
    second_reading(model, text, passage=5, between=4, passages=2, start=19)
    assert given == [[0, 10]] * 2 + [[19, 19]] * 2 and (text == np.arange(20)).all()
    # What the far part brings is of the second reading, in bits; no far part brings nothing.
    for use_cache, far in ((True, (3, 2)), (False, (None, None))):
        seen.clear()
        model = Model(model.params, model.codebook, CONFIG.replace(use_cache=use_cache))
        read = second_reading(model, text, passage=5, between=4, passages=2, far_gain=True)
        assert read[2:] == pytest.approx(far)


def test_sizes_that_make_no_sense():
    model = init_model(CONFIG, 0)
    with pytest.raises(UserError, match=r"the text has 9 tokens, and a passage, .* take 13"):
        second_reading(model, np.zeros(9, np.uint8), passage=6, between=6)
    with pytest.raises(UserError, match="passages is 0"):
        second_reading(model, np.zeros(9, np.uint8), passages=0)
