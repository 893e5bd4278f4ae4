"""Batches beyond shuffled windows: short texts, many documents, streams, whole documents."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pictures import pixels, write_pictures
from transformer_vq import Model, ModelConfig, TrainConfig
from transformer_vq.data import Batches, DataError, Source, open_source
from transformer_vq.data.loader import UNASKED
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.ops.train import init_train_state
from transformer_vq.run import loop
from transformer_vq.run.log import read_metrics


def make(size: int = 100, **fields) -> Batches:
    """Tokens that are their own positions."""
    return Batches(np.arange(size), **{"batch_size": 4, "sequence_len": 7, "seed": 3, **fields})


def same(a, b) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# Short texts


@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_a_text_shorter_than_a_sequence_is_padded(size):
    for streaming in (False, True):
        batch = make(size, batch_size=1, streaming=streaming).batch(5)
        assert batch.inputs.shape == batch.targets.shape == (1, 7)
        real = batch.loss_mask[0]
        assert real.tolist() == [True] * (size - 1) + [False] * (8 - size)
        np.testing.assert_array_equal(batch.inputs[0, real], np.arange(size - 1))
        np.testing.assert_array_equal(batch.targets[0, real], np.arange(1, size))
        assert not batch.targets[0, ~real].any() and not batch.inputs[0, size:].any()


@pytest.mark.slow
def test_padding_trains_nothing(tmp_path, one_device):
    """The loss of a run on a text shorter than its sequences is that of the text."""
    config = ModelConfig(vocab_size=32, d_model=8, d_k=4, num_layers=1, codebook_size=4,
                         block_len=8, window_len=4)  # fmt: skip
    text = np.arange(12).astype(np.uint8)
    train = TrainConfig(batch_size=3, sequence_len=16, steps=1, log_every=1)  # at rate 0
    loop.train(config, train, text, None, tmp_path)
    first = init_train_state(config, train)
    expected = evaluate(Model(first.params, first.codebook, config), text).loss
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["loss"] == pytest.approx(expected, rel=1e-5)


# Many documents


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda x: sum(x) > 9),
    streaming=st.booleans(),
    index=st.integers(0, 50),
)
def test_document_ids_say_which_document_a_token_is_of(lengths, streaming, index):
    starts = np.cumsum([0, *lengths[:-1]])
    batches = make(sum(lengths), starts=starts, streaming=streaming)
    batch = batches.batch(index)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    real = batch.loss_mask
    np.testing.assert_array_equal(batch.document_ids[real], owner[batch.inputs[real]])
    assert (np.diff(batch.document_ids, axis=1) >= 0).all()
    plain = make(sum(lengths), streaming=streaming).batch(index)
    assert same(batch[:3], plain[:3])  # documents change no row


# Streams


@given(
    size=st.integers(5, 400),
    batch_size=st.integers(1, 4),
    sequence_len=st.integers(1, 20),
    seed=st.integers(0, 2**40),
)
def test_a_row_goes_on_where_it_stopped(size, batch_size, sequence_len, seed):
    batches = make(
        size, batch_size=batch_size, sequence_len=sequence_len, seed=seed, streaming=True
    )
    laps, before = batches.num_windows, None
    stream = (size - 1) // batch_size
    seen = []
    for index in range(2 * laps + 1):
        batch = batches.batch(index)
        ends = batch.loss_mask.sum(1)
        assert (ends == ends[0]).all() and (ends[0] == sequence_len or laps == 1)
        seen += [batch.targets[batch.loss_mask]] if index < laps else []
        assert (batch.starts == (index % laps == 0)).all()
        if index % laps:
            np.testing.assert_array_equal(batch.inputs[:, 0], before.targets[:, -1])
            assert (batch.document_ids[:, 0] == before.document_ids[:, -1]).all()
        elif index:  # it begins anew
            assert (batch.inputs[:, 0] < stream * np.arange(1, batch_size + 1)).all()
        before = batch
    seen = np.concatenate(seen)
    assert len(np.unique(seen)) == len(seen) > size - 1 - batch_size * (sequence_len + 1)


def test_streams_are_a_function_of_the_index_and_shared_by_processes():
    batches = make(streaming=True)
    list(map(batches.batch, (5, 2)))
    for index in (0, 3, 1000):
        whole = batches.batch(index)
        assert same(whole, make(streaming=True).batch(index))
        shares = [
            make(streaming=True, process_index=i, process_count=2).batch(index) for i in (0, 1)
        ]
        assert same(map(np.concatenate, zip(*shares, strict=True)), whole)
        assert not same(map(np.concatenate, zip(*shares[::-1], strict=True)), whole)
        assert not same(whole, make().batch(index))


def test_too_little_for_streams():
    with pytest.raises(DataError, match="are 4 of the 5 tokens that 4 streams need"):
        make(4, streaming=True)
    with pytest.raises(ValueError, match="streaming is for text"):
        make(streaming=True, whole_documents=True)


# Passages that come again


def again(**fields) -> Batches:
    return make(**{"size": 4000, "sequence_len": 300, "batch_size": 8, **fields})


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8).filter(lambda x: sum(x) > 99),
    sequence_len=st.integers(1, 300),
    streaming=st.booleans(),
    index=st.integers(0, 50),
    seed=st.integers(0, 2**40),
)
def test_a_passage_comes_again_from_earlier_in_its_document(
    lengths, sequence_len, streaming, index, seed
):
    fields = dict(
        size=sum(lengths),
        starts=np.cumsum([0, *lengths[:-1]]),
        sequence_len=sequence_len,
        streaming=streaming,
        seed=seed,
    )
    plain, batch = make(**fields).batch(index), make(**fields, repeat_passages=1.0).batch(index)
    for name in ("loss_mask", "document_ids", "starts"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(plain, name))
    for row in range(4):
        size = batch.loss_mask[row].sum()
        last = batch.targets[row, size - 1 : size]
        text = np.append(batch.inputs[row, :size], last[last != UNASKED])
        true = np.append(plain.inputs[row, :size], plain.targets[row, size - 1])[: len(text)]
        owner = np.repeat(np.arange(len(lengths)), lengths)[true]
        # A target is the token that is read next, but where the text leaps: at the beginning of a
        # passage, and behind the first token after it.
        changed = text != true
        begins, ends = np.flatnonzero(np.diff(changed.astype(int), append=0)).reshape(-1, 2).T + 1
        leaps = {i + j for i in begins for j in range(4)} | {i + j for i in ends for j in (1, 2, 3)}
        asked = [i not in leaps or owner[i] != owner[0] for i in range(1, len(text))]
        expected = np.where(asked, text[1:], UNASKED)
        np.testing.assert_array_equal(batch.targets[row, : len(text) - 1], expected)
        changed = np.flatnonzero(changed)
        assert not changed.size or changed[0] >= 8  # it begins as it was
        for place in changed:  # tokens are their own places, so what comes again is known
            assert text[place] in text[:place] and text[place] == true[text[place] - true[0]]
            assert owner[place] == owner[0] == owner[text[place] - true[0]]


def test_how_many_rows_have_passages_that_come_again():
    def inputs(share):
        batches = again(repeat_passages=share)
        return np.concatenate([batches.batch(i).inputs for i in range(25)])

    plain, half, whole = map(inputs, (0.0, 0.5, 1.0))
    assert np.array_equal(plain[:8], again().batch(0).inputs)
    changed = (plain != half).any(axis=1, keepdims=True)
    assert 0.4 < changed.mean() < 0.6
    # those rows, and no others, are as if all had been chosen
    np.testing.assert_array_equal(half, np.where(changed, whole, plain))
    assert 0.35 < (plain != whole).mean() < 0.6  # about half of such a row


def test_a_run_ends_with_text_as_it_is():
    """The last quarter of the updates, of which a recipe tells the number."""
    source, recipe = Source.of(np.arange(3000)), TrainConfig(batch_size=4, sequence_len=50, steps=8)
    plain = Batches.of(source, recipe)
    batches = Batches.of(source, dataclasses.replace(recipe, repeat_passages=1.0))
    whole = [same(batches.batch(i), plain.batch(i)) for i in range(9)]
    assert whole == [False] * 6 + [True] * 3


def test_passages_are_a_function_of_the_index_and_shared_by_processes():
    fields = dict(repeat_passages=0.7)
    list(map(again(**fields).batch, (5, 2)))
    for index in (0, 3, 1000):
        whole = again(**fields).batch(index)
        assert same(whole, again(**fields).batch(index))
        shares = [again(**fields, process_index=i, process_count=2).batch(index) for i in (0, 1)]
        assert same(map(np.concatenate, zip(*shares, strict=True)), whole)
        assert not same(whole, again(**fields, seed=4).batch(index))


def test_whole_documents_stay_as_they_are():
    with pytest.raises(ValueError, match=r"repeat_passages is 0\.5, but a row is a whole document"):
        make(whole_documents=True, repeat_passages=0.5)


# Whole documents


def test_whole_documents_each_once_an_epoch():
    starts = np.array([0, 8, 16, 21, 29])
    batches = make(37, starts=starts, whole_documents=True, batch_size=2)
    for epoch in range(3):
        rows = [
            (int(batch.inputs[row, 0]), int(batch.loss_mask[row].sum()))
            for index in range(5)
            for batch in [batches.batch(5 * epoch + index)]
            for row in range(2)
        ]
        for half in (rows[:5], rows[5:]):
            assert sorted(half) == [(0, 7), (8, 7), (16, 4), (21, 7), (29, 7)]
    with pytest.raises(DataError, match="a document has 7 tokens to predict: sequence_len is 6"):
        make(37, starts=starts, whole_documents=True, sequence_len=6)


# Pictures


def test_a_row_is_a_picture(tmp_path):
    images = pixels(7)
    source = open_source([write_pictures(tmp_path / "a", images)]).split("all")
    batches = Batches(source.tokens, starts=source.starts, whole_documents=True, batch_size=7,
                      sequence_len=72, seed=0)  # fmt: skip
    for index in range(2):
        batch = batches.batch(index)
        assert not batch.inputs[:, 0].any() and batch.loss_mask.all()
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        order = batch.document_ids[:, 0]
        np.testing.assert_array_equal(batch.targets, images.reshape(7, -1)[order])
        assert sorted(order) == list(range(7)) and (np.diff(batch.document_ids) == 0).all()
