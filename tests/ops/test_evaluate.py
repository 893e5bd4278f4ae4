"""Evaluation: stateful over the whole text, and the same number however it is cut."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.pictures import pixels, write_pictures
from transformer_vq import Model, ModelConfig, extend, init_model, init_state
from transformer_vq.data import DataError, Source, open_source
from transformer_vq.ops.evaluate import Streams, evaluate
from transformer_vq.sharding import data_mesh, replicated

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=8, window_len=5
)
TOKENS = np.random.default_rng(0).integers(0, 32, 301).astype(np.uint8)


def init(config: ModelConfig) -> Model:
    """A model with position biases and queries strong enough for every key to matter."""
    model = init_model(config, 0)
    units = model.params["units"]
    louder = {name: 3.0 * units[name] for name in ("w_q", "w_v", "w_o", "w_r")}
    return Model({**model.params, "units": {**units, **louder}}, model.codebook, config)


MODEL = init(CONFIG)


@jax.jit
def log_probabilities(model: Model, tokens: jax.Array) -> jax.Array:
    """`[rows, T, vocab]`, by one call of `extend`."""
    full = model.config.attention == "full"
    state = init_state(model.config, len(tokens), capacity=tokens.shape[1] if full else None)
    return jax.nn.log_softmax(extend(model, state, tokens)[0])


def losses(model: Model, *streams: np.ndarray) -> np.ndarray:
    """Of each predicted token of streams of one length, `[rows * (T - 1)]`."""
    tokens = np.stack(streams).astype(np.int32)
    predicted = np.asarray(log_probabilities(model, tokens[:, :-1]), np.float64)
    return -np.take_along_axis(predicted, tokens[:, 1:, None], axis=2).ravel()


def test_equals_one_call_of_extend():
    expected = losses(MODEL, TOKENS)
    result = evaluate(MODEL, TOKENS, chunk_len=64)
    assert result.tokens == 300
    assert result.loss == pytest.approx(expected.mean(), abs=1e-5)
    assert result.bpb == pytest.approx(expected.mean() / np.log(2), abs=2e-5)
    assert [bin[:2] for bin in result.by_position] == [(0, 64), (64, 128), (128, 256), (256, 300)]
    for start, end, loss in result.by_position:
        assert loss == pytest.approx(expected[start:end].mean(), abs=1e-5)


@pytest.mark.parametrize(("chunk_len", "block_len"), [(1, 8), (7, 8), (100, 64), (1000, 3)])
def test_does_not_depend_on_chunks_or_blocks(chunk_len, block_len):
    expected = evaluate(MODEL, TOKENS, chunk_len=64)
    model = Model(MODEL.params, MODEL.codebook, CONFIG.replace(block_len=block_len))
    result = evaluate(model, TOKENS, chunk_len=chunk_len)
    assert result.tokens == expected.tokens
    np.testing.assert_allclose(result.by_position, expected.by_position, atol=1e-5)


LARGE = CONFIG.replace(d_model=2048, d_v=4096)


@pytest.mark.parametrize(
    ("config", "longest", "options", "chunk_len"),
    [
        (CONFIG, 300, {}, 2048),
        (CONFIG, 131_071, {}, 2048),
        (CONFIG, 131_072, {}, 8192),
        (CONFIG, 131_072, {"context_len": 16_384}, 8192),
        (CONFIG, 131_072, {"context_len": 10_240}, 2048),  # not a multiple of 8,192
        (CONFIG, 131_072, {"context_len": 300}, 300),
        (CONFIG, 1000, {"context_len": 16_384}, 2048),
        (LARGE, 131_072, {}, 2048),  # Ctrl-C would wait too long
        (LARGE.replace(d_model=256, d_v=512), 131_072, {}, 8192),
        (LARGE.replace(d_model=256, d_v=512), 131_072, {"rows": 100}, 2048),
    ],
)
def test_long_rows_of_small_models_are_scored_in_long_chunks(
    monkeypatch, config, longest, options, chunk_len
):
    class Asked(Exception):
        pass

    def chunks(streams, width):
        raise Asked(width)

    monkeypatch.setattr(Streams, "chunks", chunks)
    monkeypatch.setattr(Streams, "longest_row", property(lambda streams: longest))
    with pytest.raises(Asked, match=f"^{chunk_len}$"):
        evaluate(Model(MODEL.params, MODEL.codebook, config), TOKENS, **options)


def test_history_counts():
    """Control: a state that is dropped now and then gives other numbers."""
    whole = evaluate(MODEL, TOKENS, chunk_len=20).loss
    forgetful = evaluate(MODEL, TOKENS, chunk_len=20, context_len=20)
    assert abs(forgetful.loss - whole) > 1e-3
    pieces = losses(MODEL, *(TOKENS[i : i + 21] for i in range(0, 300, 20)))
    assert forgetful.loss == pytest.approx(pieces.mean(), abs=1e-5)
    assert [bin[:2] for bin in forgetful.by_position] == [(0, 20)]


def test_rows_are_streams_of_their_own():
    result = evaluate(MODEL, TOKENS[:300], chunk_len=64, rows=2)
    assert result.tokens == 298
    expected = losses(MODEL, TOKENS[:150], TOKENS[150:300])
    assert result.loss == pytest.approx(expected.mean(), abs=1e-5)
    assert result.by_position[-1][:2] == (128, 149)
    uneven = evaluate(MODEL, TOKENS[:299], chunk_len=64, rows=2)
    assert uneven.tokens == 297
    assert uneven.loss == pytest.approx(expected[:-1].mean(), abs=1e-5)


def test_takes_no_more_than_asked():
    seen = []
    result = evaluate(
        MODEL, TOKENS, chunk_len=64, max_tokens=100, on_progress=lambda *n: seen.append(n)
    )
    assert (result.tokens, seen) == (100, [(64, 100), (100, 100)])
    assert result.loss == pytest.approx(losses(MODEL, TOKENS[:101]).mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(1, {}), (3, {"context_len": 100}), (2, {"max_tokens": 150})],
)
def test_what_the_far_part_brings_is_what_two_evaluations_differ_by(rows, options):
    """In all, and in each bin of history; the loss itself stays what it is."""
    options = {"chunk_len": 20, "rows": rows, **options}
    masked = Model(MODEL.params, MODEL.codebook, CONFIG.replace(use_cache=False))
    both = evaluate(MODEL, TOKENS, far_gain=True, **options)
    plain, without = evaluate(MODEL, TOKENS, **options), evaluate(masked, TOKENS, **options)
    assert dataclasses.replace(both, far_gain=None, far_gain_by_position=None) == plain
    assert both.far_gain.nats == pytest.approx(without.loss - plain.loss, abs=1e-9)
    assert abs(both.far_gain.nats) > 1e-3  # control: the far part matters
    for gain, with_it, less in zip(
        both.far_gain_by_position, plain.by_position, without.by_position, strict=True
    ):
        assert gain.nats == pytest.approx(less[2] - with_it[2], abs=1e-9)


def test_keys_within_the_window_bring_nothing():
    """Control: there is no far part where histories end with the window."""
    result = evaluate(MODEL, TOKENS, far_gain=True, chunk_len=5, context_len=5)
    assert result.far_gain.nats == 0 and result.far_gain.error == 0
    with pytest.raises(ValueError, match="far_gain is true, and the model has no far part"):
        evaluate(init(CONFIG.replace(attention="full")), TOKENS, far_gain=True)


def answers(*lengths: int) -> Source:
    """Documents of so many tokens; some tokens count, the last one among them."""
    total, starts = sum(lengths), np.cumsum([0, *lengths[:-1]])
    counted = np.zeros(total, bool)
    counted[[5, 19, 26, 40, 45, total - 1]] = True
    num_bytes = total - len(lengths)
    return Source(TOKENS[:total], starts, num_bytes, whole_documents=True, counted=counted)


UNEVEN = answers(20, 7, 20, 9)


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((20, 7, 20, 9), {"chunk_len": 8}),
        ((20, 7, 20, 9), {"rows": 2}),
        ((16, 16, 16, 16), {"attention": "full"}),
        ((16, 16, 16, 16), {"attention": "full", "rows": 2}),
    ],
)
def test_only_what_counts_is_scored(lengths, options):
    source, hits, expected = answers(*lengths), [], []
    full = options.pop("attention", None) == "full"
    model = init(CONFIG.replace(attention="full")) if full else MODEL
    for start, length in zip(source.starts, lengths, strict=True):
        end = start + length
        text = np.zeros(20, np.uint8)  # one shape; what comes later changes nothing
        text[: end - start] = TOKENS[start:end]
        predicted = np.asarray(log_probabilities(model, text[None].astype(np.int32)))[0]
        for place in np.flatnonzero(source.counted[start:end]):
            expected.append(-predicted[place - 1, text[place]])
            hits.append(predicted[place - 1].argmax() == text[place])
    seen = []
    result = evaluate(model, source, on_progress=lambda *n: seen.append(n), **options)
    assert (result.tokens, seen[-1]) == (6, (6, 6))
    assert result.loss == pytest.approx(np.mean(expected), abs=1e-5)
    assert result.accuracy == np.mean(hits)
    assert evaluate(MODEL, TOKENS[:56]).accuracy is None


def test_the_likeliest_tokens_are_all_right():
    """Control for the accuracy: a source of what the model itself would write."""
    source, tokens = UNEVEN, TOKENS[:56].copy()
    for start, end in ((0, 20), (20, 27), (27, 47), (47, 56)):
        for place in np.flatnonzero(source.counted[start:end]):
            text = np.zeros(20, np.int32)
            text[: end - start] = tokens[start:end]
            predicted = np.asarray(log_probabilities(MODEL, text[None]))[0]
            tokens[start + place] = predicted[place - 1].argmax()
    right = dataclasses.replace(source, tokens=tokens)
    assert evaluate(MODEL, right).accuracy == 1
    tokens[40] = (tokens[40] + 1) % 32
    assert evaluate(MODEL, right).accuracy < 1


def test_what_counts_is_scored_to_the_end_of_a_document():
    assert [evaluate(MODEL, UNEVEN, max_tokens=n).tokens for n in (1, 19, 20, 99)] == [2, 2, 3, 6]
    nothing = dataclasses.replace(UNEVEN, counted=np.arange(56) == 20)  # it is given
    with pytest.raises(DataError, match="no token of the data counts that is predicted"):
        evaluate(MODEL, nothing)
    with pytest.raises(ValueError, match="documents have 7 to 20 tokens: full attention scores"):
        evaluate(init(CONFIG.replace(attention="full")), UNEVEN)


def test_full_attention_says_how_much_it_holds():
    model = init(CONFIG.replace(attention="full"))
    result = evaluate(model, TOKENS, chunk_len=50)
    assert result.loss == pytest.approx(losses(model, TOKENS).mean(), abs=1e-5)
    with pytest.raises(ValueError, match="4,999 tokens, too many for full attention: give a cont"):
        evaluate(model, np.zeros(5000, np.uint8))


def test_on_many_devices_and_without_touching_the_model():
    spread = jax.device_put(MODEL, replicated(data_mesh()))
    for _ in range(2):  # a donated model would fail the second time
        result = evaluate(spread, TOKENS, chunk_len=64)
    assert result.loss == pytest.approx(evaluate(MODEL, TOKENS, chunk_len=64).loss, abs=1e-6)


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        (TOKENS[:1], {}, DataError, "2 tokens that evaluation needs"),
        (np.array([1, 40, 2]), {}, ValueError, "token 40 at position 1"),
        (TOKENS, {"max_tokens": 0}, ValueError, "max_tokens is 0"),
        (TOKENS, {"chunk_len": 0}, ValueError, "chunk_len is 0"),
        (TOKENS, {"chunk_len": 8, "context_len": 12}, ValueError, "multiple of chunk_len, 8"),
    ],
)
def test_senseless_requests_are_refused(tokens, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(MODEL, tokens, **options)


# Pictures and documents

BYTES = CONFIG.replace(vocab_size=256, block_len=16, window_len=8, absolute_positions=True)


@pytest.mark.parametrize("attention", ["vq", "full"])
def test_pictures_are_scored_one_by_one(tmp_path, attention):
    source = open_source([write_pictures(tmp_path / "a", pixels(6))])
    model = init(BYTES.replace(attention=attention))
    expected = losses(model, *source.tokens.reshape(6, 73)).reshape(6, 72)
    for rows in (4,) if attention == "vq" else (1,):
        result = evaluate(model, source, chunk_len=50, rows=rows)
        assert result.tokens == 6 * 72
        assert result.loss == pytest.approx(expected.mean(), rel=1e-5)
        assert result.bpb == result.loss / np.log(2)
        assert [bin[:2] for bin in result.by_position] == [(0, 64), (64, 72)]
        assert result.by_position[1][2] == pytest.approx(expected[:, 64:].mean(), rel=1e-5)
    if attention == "vq":  # control: as one text, it would be another number
        assert abs(evaluate(model, source.tokens).loss - result.loss) > 1e-4
        some = evaluate(model, source, max_tokens=100, chunk_len=50)
        assert some.tokens == 99  # the start token of the second picture is given
        with pytest.raises(DataError, match="6 documents for 7 rows"):
            evaluate(model, source, rows=7)


@pytest.mark.slow
def test_documents_are_scored_as_the_model_reads_them():
    """A model that resets at documents is scored so; each start is predicted, as an end."""
    starts = np.array([0, 30, 75])
    tokens = np.random.default_rng(1).integers(1, 256, 110).astype(np.uint8)
    source = Source(tokens, starts, 107)
    model = init(BYTES.replace(reset_at_document=True))
    result = evaluate(model, source, chunk_len=40)
    pieces = [tokens[a : b + 1] for a, b in ((0, 30), (30, 75), (75, 110))]
    alone = np.concatenate([losses(model, piece) for piece in pieces])
    assert result.tokens == 109 == len(alone)
    assert result.loss == pytest.approx(alone.mean(), rel=1e-5)
    assert result.bpb == pytest.approx(alone.mean() / np.log(2) * 110 / 107, rel=1e-5)
    assert abs(evaluate(model, tokens, chunk_len=40).loss - result.loss) > 1e-4
