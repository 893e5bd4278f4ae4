"""Sums of scores: standard errors of what the far part brings."""

import numpy as np
import pytest

from transformer_vq.ops.scores import BLOCK, Evaluation, Gains

NONE = Evaluation(0.0, 0, [])


def gains(differences: np.ndarray, chunk: int) -> Evaluation:
    """Of rows `[rows, T]` of tokens, each a history of its own, a chunk at a time."""
    rows, length = differences.shape
    sums, places = Gains(), np.arange(rows)[:, None] * length
    for start in range(0, length, chunk):
        piece = differences[:, start : start + chunk]
        history = np.broadcast_to(np.arange(start, start + piece.shape[1]), piece.shape)
        sums.add(piece, history, np.ones(piece.shape, bool), places + history)
    return sums.added_to(NONE)


@pytest.mark.parametrize("chunk", [7, BLOCK, 1000])
def test_blocks_are_what_was_drawn(chunk):
    """The error is that of the mean of block means, wherever the chunks are cut."""
    drawn = np.random.default_rng(0).normal(1, 1, (2, 512))
    result = gains(drawn, chunk)
    blocks = drawn.reshape(-1, BLOCK).mean(1)
    assert result.far_gain.nats == pytest.approx(drawn.mean())
    assert result.far_gain.error == pytest.approx(blocks.std(ddof=1) / np.sqrt(len(blocks)))
    assert [gain.error is None for gain in result.far_gain_by_position] == [True, True, True, False]
    last = drawn[:, 256:].reshape(-1, BLOCK).mean(1)
    assert result.far_gain_by_position[-1].nats == pytest.approx(last.mean())
    assert result.far_gain_by_position[-1].error == pytest.approx(last.std(ddof=1) / np.sqrt(8))


def test_the_error_is_that_of_neighbours_that_are_alike():
    """Over many samples the mean is off by as much as the error says; counting tokens as drawn one
    by one would say far less."""
    rng = np.random.default_rng(1)
    samples = np.repeat(rng.normal(0, 1, (300, 1, 32)), BLOCK, axis=2)
    samples = samples + rng.normal(0, 1, samples.shape)
    found = [gains(sample, 2048).far_gain for sample in samples]
    off = np.sqrt(np.mean([gain.nats**2 for gain in found]))
    said = np.mean([gain.error for gain in found])
    assert said == pytest.approx(off, rel=0.15)
    assert samples[0].std() / np.sqrt(samples[0].size) < 0.3 * off  # control


def test_only_what_counts_and_uneven_blocks():
    sums = Gains()
    history = np.array([[0, 1, 2, 70, 71, 200]])
    counted = np.array([[True, False, True, True, False, True]])
    sums.add(np.array([[1.0, 9.0, 3.0, 6.0, 9.0, 2.0]]), history, counted, 1000 + history)
    result = sums.added_to(NONE)
    assert result.far_gain.nats == 3 and result.far_gain.error is None
    assert [gain.nats for gain in result.far_gain_by_position] == [2, 6, 2]
