"""A second reading, what counts in it, and what it refuses."""

import numpy as np
import pytest

from transformer_vq import ModelConfig, init_model
from transformer_vq.errors import UserError
from transformer_vq.measure import reading
from transformer_vq.measure.reading import second_reading

CONFIG = ModelConfig(d_model=8, d_k=4, num_layers=1, codebook_size=4, block_len=8, window_len=3)


def test_counted_are_the_passages_and_nothing_else(monkeypatch):
    """Each passage counts once at its first reading and once at its second, and the same bytes."""
    seen = []

    def counted(model, source, rows):
        assert source.whole_documents and rows == 2 and len(source.starts) == 2
        seen.append(source.tokens[source.counted])
        return type("Evaluation", (), {"bpb": 3.0 - len(seen)})

    monkeypatch.setattr(reading, "evaluate", counted)
    text = np.arange(20, dtype=np.uint8)
    read = second_reading(init_model(CONFIG, 0), text, passage=5, between=4, passages=2)
    assert seen[0].tolist() == [*range(5), *range(11, 16)]
    assert seen[1].tolist() == seen[0].tolist()
    assert read == (2.0, 1.0) and read.gain == 1.0


def test_sizes_that_make_no_sense():
    model = init_model(CONFIG, 0)
    with pytest.raises(UserError, match=r"the text has 9 tokens, and a passage .* take 12"):
        second_reading(model, np.zeros(9, np.uint8), passage=6, between=6)
    with pytest.raises(UserError, match="passages is 0"):
        second_reading(model, np.zeros(9, np.uint8), passages=0)
