"""The compiled programs of sampling: `sample_op`, drawn again by hand, and `generate_tokens`."""

import functools
import itertools
import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests.helpers import ROOT, tune
from tests.ops.models import BATCH, EOS, LENGTH, VOCAB, make_model
from tests.programs import has_arrays, operations_on, reused_bytes, temporary_bytes
from transformer_vq import (
    Model,
    ModelConfig,
    SampleConfig,
    SamplingParams,
    extend,
    generate,
    init_state,
    load_state,
    sample_op,
    save_state,
)
from transformer_vq.engine.batch import Session
from transformer_vq.engine.prefill import FEW, PREFILL_SIZES
from transformer_vq.errors import UserError
from transformer_vq.nn import products
from transformer_vq.ops import decode, sample

KEY = 5
PROMPTS = [[1], [2, 3], [4] * 9]
REQUESTS = [SamplingParams(max_tokens=20 + 15 * i, seed=i, stop=[2]) for i in range(3)]
EXTEND = jax.jit(extend)


MODEL = make_model(reset_at_document=True, absolute_positions=True)


@functools.cache
def draw_sequences(p=1.0, key=KEY, model=MODEL, length=LENGTH):
    return np.asarray(sample_op(SampleConfig(BATCH, length, p), EOS, model, key))


def logits_of(model, tokens, document_ids):
    """Predictions of each next token, from scratch: one call for the whole sequences."""
    full = model.config.attention == "full"
    state = init_state(model.config, BATCH, capacity=LENGTH if full else None)
    logits, _ = EXTEND(model, state, tokens, document_ids=document_ids)
    return np.asarray(logits)


def consumed(drawn):
    """What every step of `sample_op` was given: tokens, and the documents they belong to."""
    given = np.concatenate([np.full((BATCH, 1), EOS), drawn[:, :-1]], axis=1)
    started = np.cumsum(given[:, 1:] == EOS, axis=1)
    return given, np.concatenate([np.zeros((BATCH, 1), int), started], axis=1)


def mass_before(logits):
    """Probability of all tokens that come before each in the nucleus, all pairs; float64."""
    mass = np.exp(np.float64(logits) - logits.max(-1, keepdims=True))
    mass /= mass.sum(-1, keepdims=True)
    return ((logits[..., None, :] > logits[..., None]) * mass[..., None, :]).sum(-1)


def noise(row, position):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), row), position)
    return np.asarray(jax.random.gumbel(key, (VOCAB,), jnp.float32))


# ---------------------------------------------------------------- sample_op


DRAWS = {
    "documents": (MODEL, 0.8),
    "all tokens": (MODEL, 1.0),
    "full": (make_model(attention="full"), 0.8),
    "mqa": (make_model(head_type="mqa"), 0.8),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw(name):
    """The nucleus of the prediction of `extend`, and the row's own noise: token by token."""
    model, p = DRAWS[name]
    drawn = draw_sequences(p, model=model)
    assert drawn.shape == (BATCH, LENGTH) and drawn.dtype == np.int32
    logits = logits_of(model, *consumed(drawn))
    before = mass_before(logits)
    outside = 0
    for row, i in np.ndindex(BATCH, LENGTH):
        scores = logits[row, i] + noise(row, i)
        assert before[row, i, drawn[row, i]] < p + 1e-5  # it lies in the nucleus
        expected = np.argmax(np.where(before[row, i] < p, scores, -np.inf))
        assert drawn[row, i] == expected
        outside += before[row, i, scores.argmax()] >= p
    assert outside > 10 or p == 1.0  # control: the nucleus mattered


def test_a_drawn_eos_starts_a_document():
    """What follows it is what follows a fresh start: it knows nothing of what was before."""
    drawn = draw_sequences()
    starts = [(row, i) for row, i in np.argwhere(drawn == EOS) if i < LENGTH - 5][:BATCH]
    assert len(starts) > 8 and len({row for row, _ in starts}) > 4
    tokens = np.zeros((BATCH, LENGTH), np.int32)
    for n, (row, i) in enumerate(starts):
        tokens[n, : LENGTH - i] = drawn[row, i:]
    fresh = logits_of(MODEL, tokens, np.cumsum(tokens == EOS, axis=1))
    whole = logits_of(MODEL, *consumed(drawn))
    forgetful = replace(MODEL, config=MODEL.config.replace(reset_at_document=False))
    unreset = logits_of(forgetful, *consumed(drawn))
    for n, (row, i) in enumerate(starts):
        length = LENGTH - i - 1
        np.testing.assert_allclose(fresh[n, :length], whole[row, i + 1 :], atol=1e-4)
        draws = [np.argmax(fresh[n, t] + noise(row, i + 1 + t)) for t in range(length)]
        assert draws == drawn[row, i + 1 :].tolist()
        assert np.abs(fresh[n, :length] - unreset[row, i + 1 :]).max() > 0.05  # control


def test_rows_and_keys():
    """The same key, the same tokens; other keys and other rows, others."""
    drawn = draw_sequences()
    assert len({row.tobytes() for row in drawn}) == BATCH
    kinds = (
        KEY,
        np.int64(KEY),
        jax.random.key(KEY),
        jax.random.PRNGKey(KEY),
        np.asarray(jax.random.PRNGKey(KEY)),
        [0, KEY],
    )
    programs = sample.sample_sequences._cache_size()
    for key in kinds:
        again = sample_op(SampleConfig(BATCH, LENGTH, 1.0), EOS, MODEL, key)
        np.testing.assert_array_equal(again, drawn)
    other = np.asarray(sample_op(SampleConfig(BATCH, LENGTH), np.int32(EOS), MODEL, KEY + 1))
    assert (other != drawn).mean() > 0.5
    # Another model of an equal configuration needs no other program.
    config = ModelConfig.from_json(MODEL.config.to_json())
    louder = Model({**MODEL.params, "w_out": 2 * MODEL.params["w_out"]}, MODEL.codebook, config)
    other = np.asarray(sample_op(SampleConfig(BATCH, LENGTH), EOS, louder, KEY))
    assert (other != drawn).any()
    assert sample.sample_sequences._cache_size() == programs


def test_the_tightest_nucleus_is_greedy():
    drawn = draw_sequences(1e-6)
    logits = logits_of(MODEL, *consumed(drawn))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))
    assert (drawn == drawn[0]).all()


def test_rows_are_spread_over_the_devices():
    tokens = sample_op(SampleConfig(BATCH, LENGTH), EOS, MODEL, KEY)
    assert len(jax.devices()) == 8
    shards = {s.device: s.data.shape for s in tokens.addressable_shards}
    assert shards == dict.fromkeys(jax.devices(), (BATCH // 8, LENGTH))


@pytest.mark.slow
def test_one_device_draws_the_same(user_env):
    program = """
        import json, sys
        sys.path.insert(0, sys.argv[1])
        import jax
        import tests.ops.test_sample as t
        assert len(jax.devices()) == 1
        print(json.dumps([t.draw_sequences(p).tolist() for p in (1.0, 0.8)]))
    """
    folder = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), folder],
        env=user_env,
        stdout=subprocess.PIPE,
        check=True,
    )
    for p, tokens in zip((1.0, 0.8), json.loads(done.stdout), strict=True):
        np.testing.assert_array_equal(draw_sequences(p), tokens)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((SampleConfig(12, 4), EOS), "global_batch_size is 12: .* multiple of the 8 devices"),
        ((SampleConfig(1, 4), EOS), "global_batch_size is 1: .* multiple of the 8 devices"),
        ((SampleConfig(16, 4), -1), "eos_id is -1: tokens go from 0 to 16"),
        ((SampleConfig(16, 4), VOCAB), "eos_id is 17: tokens go from 0 to 16"),
        ((SampleConfig(16, 4), 3.7), "eos_id is 3.7: tokens go from 0 to 16"),
        ((SampleConfig(16, 4), True), "eos_id is True: tokens go from 0 to 16"),
    ],
)
def test_arguments_that_do_not_fit(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        sample_op(*arguments, MODEL, KEY)


@pytest.mark.parametrize(
    "key",
    [-1, 2**32, 2**63, True, "5", 0.5, None, [0, 2**32], [0, -1], [1, 2, 3], np.zeros(2)],
    ids=repr,
)
def test_keys_that_are_none(key):
    """JAX would keep 32 bits of a number, and say nothing."""
    with pytest.raises(UserError, match=r"key is .*: it must be a JAX key, or a whole"):
        sample_op(SampleConfig(16, 4), EOS, MODEL, key)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ((0, 4), "global_batch_size is 0: it must be a whole number from 1 to"),
        ((8, 0), "sequence_len is 0: it must be a whole number from 1 to"),
        ((8, 2.5), "sequence_len is 2.5: it must be a whole number from 1 to"),
        (("8", 4), "global_batch_size is '8': it must be a whole number from 1 to"),
        ((8, 4, 0.0), "p_nucleus is 0.0: it must be above 0 and at most 1"),
        ((8, 4, 1.5), "p_nucleus is 1.5: it must be above 0 and at most 1"),
        ((8, 4, float("nan")), "p_nucleus is nan: it must be above 0 and at most 1"),
        ((8, 4, 1e-50), "p_nucleus is 1e-50, which is 0 in float32"),
    ],
)
def test_configurations_that_make_no_sense(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampleConfig(*fields)
    assert hash(SampleConfig(8, 4)) == hash(SampleConfig(8, 4))


# ---------------------------------------------------------------- the compiled decoding loop


@pytest.fixture
def unchecked():
    """`jax.stages.Lowered` puts descriptions in the place of arrays: not what is annotated."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


STATIC = dict(steps=32, with_logprobs=False)
SMALLER = dict(head_type="mqa", num_layers=1, d_v=128)  # one unit: quicker to compile
ONE_HEAD = {**SMALLER, "head_type": "shga"}  # one row for each table


def decoding_loop(function, **fields):
    """`generate_tokens`, or a variant of it, compiled for 4 rows; and the shape of a table."""
    sizes = dict(vocab_size=64, d_model=64, d_k=16, codebook_size=64, window_len=64)
    model = make_model(**sizes, **fields)
    session = Session(model, [[1]] * 4, SamplingParams())
    slots, pause = session._slots, decode.Pause(np.int32(32), np.bool_(False))
    lowered = function.lower(
        slots.decoder, slots.controls, slots.rows, np.ones(4, bool), pause, **STATIC
    )
    return lowered.compile(), slots.rows.state


def uses(compiled, table):
    """Name of every operation that makes an array like the table."""
    names = operations_on(compiled, table.shape)
    assert "parameter" in names  # control: there is one
    return names


IN_PLACE = {"parameter", "get-tuple-element", "scatter", "dynamic-update-slice", "bitcast"}


def test_a_step_copies_no_table(unchecked):
    """The values of every unit are read and written in place, in the caller's own buffers."""
    compiled, state = decoding_loop(decode.generate_tokens, num_layers=2)
    table = state.units[0].values
    assert table.shape == (4, 1, 65 + 64 + 7, 128)
    assert set(uses(compiled, table)) <= IN_PLACE
    assert temporary_bytes(compiled) < table.nbytes
    assert reused_bytes(compiled) >= sum(x.nbytes for x in jax.tree.leaves(state))


def test_a_step_that_may_reset_copies_no_table(unchecked):
    """The means are cleared where a document starts: in place too, and only then."""
    compiled, state = decoding_loop(decode.generate_tokens, **SMALLER, reset_at_document=True)
    table = state.units[0].values
    assert "copy" not in uses(compiled, table)
    assert temporary_bytes(compiled) < table.nbytes


def test_reading_a_few_tokens_copies_no_table(unchecked):
    """What is written is known before, and still XLA sees that all was read by then."""
    # Of many codes: the table is larger by far than what 4 x 4 tokens need beside it.
    sizes = dict(vocab_size=64, d_model=64, d_k=16, codebook_size=256, window_len=64)
    session = Session(make_model(**sizes, **SMALLER), [[1]] * 4, SamplingParams())
    tokens, lengths = np.zeros((4, 4), np.int32), np.full(4, 4, np.int32)
    slots = session._slots
    lowered = decode.prefill_few.lower(slots.decoder, slots.rows.state, tokens, lengths)
    compiled, table = lowered.compile(), slots.rows.state.units[0].values
    assert "copy" not in uses(compiled, table)
    assert temporary_bytes(compiled) < table.nbytes


def test_a_step_in_parts_copies_no_table(unchecked, monkeypatch):
    """Cut in parts, as large tables of large batches are, the table is still read where it lies."""
    jax.clear_caches()  # units that were traced with loops
    tune(monkeypatch, large=1, loop_size=1)
    compiled, state = decoding_loop(variant(donate_argnames="rows"), **ONE_HEAD)
    jax.clear_caches()
    table = state.units[0].values
    *_, rows, width = table.shape
    assert has_arrays(compiled, rows // products.CPU.parts, width)  # control
    assert "copy" not in uses(compiled, table)
    assert temporary_bytes(compiled) < table.nbytes


def variant(**options):
    """`generate_tokens` as a new function: nothing compiled before is found in its place."""
    function = functools.partial(decode.generate_tokens.__wrapped__)
    return jax.jit(function, static_argnames=("steps", "with_logprobs"), **options)


def test_a_step_that_copies_is_seen(unchecked, monkeypatch):
    """Controls of the test above: without donation; and a step that needs old and new state."""
    compiled, state = decoding_loop(variant(), **SMALLER)
    assert "copy" in uses(compiled, state.units[0].values)
    assert reused_bytes(compiled) == 0

    step = decode.decode_step

    def step_with_both(decoder, old, *args):
        new = step(decoder, old, *args)
        both = jnp.vdot(old.units[0].values, new.units[0].values[:, :, ::-1])
        return replace(new, logits=new.logits + 1e-9 * both)

    monkeypatch.setattr(decode, "decode_step", step_with_both)
    compiled, state = decoding_loop(variant(donate_argnames="rows"), **SMALLER)
    table = state.units[0].values
    assert "copy" in uses(compiled, table)
    assert temporary_bytes(compiled) >= table.nbytes


def test_nothing_is_compiled_again(tmp_path):
    """Not for other prompts, numbers of tokens, parameters, numbers of rows up to the batch,
    nor for a state that was continued, forked or read from a file."""
    model = make_model(head_type="mqa")
    decode.generate_tokens.clear_cache()
    decode.prefill.clear_cache()
    rng = np.random.default_rng(0)
    values = dict(
        temperature=(0, 0.7, 1, 2.5),
        top_k=(0, 1, 5, 99),
        top_p=(0.5, 1),
        min_p=(0, 0.1),
        typical_p=(1, 0.9),
        repetition_penalty=(1, 1.2),
        presence_penalty=(0, 1),
        frequency_penalty=(0, 0.5),
        logit_bias=({}, {1: 2.0}),
        banned_tokens=((), (1, 2)),
        allowed_tokens=(None, range(10)),
        min_tokens=(0, 3),
        stop=((), (1, 2, [3, 4], "\t"), "\n"),
        max_tokens=(1, 5, 70),
        seed=(0, 2**40),
    )
    session = None
    for rows, longest in itertools.product((5, 8, 7), (1, 16, 17, 128, 129, 1024, 1025, 2100)):
        prompts = [rng.integers(0, VOCAB, n) for n in rng.integers(1, longest + 1, rows)]
        params = [
            SamplingParams(**{k: v[rng.integers(len(v))] for k, v in values.items()})
            for _ in range(rows)
        ]
        session = Session(model, prompts, params)
        list(session)
    save_state(tmp_path / "state", session.state, model)
    params = SamplingParams(max_tokens=3)
    one = jax.tree.map(lambda x: x[:1], session.state)
    for state in (session.state, load_state(tmp_path / "state", model), one):
        generate(model, [[]] * 7, params, state)
    assert decode.generate_tokens._cache_size() == 1
    assert decode.prefill_few._cache_size() == sum(size <= FEW for size in PREFILL_SIZES)
    assert decode.prefill._cache_size() == sum(size > FEW for size in PREFILL_SIZES)
    list(Session(model, [[1]] * 7, params, steps=5))
    assert decode.generate_tokens._cache_size() == 1
    list(Session(model, [[1]] * 7, params, steps=129))  # control: this is another program
    assert decode.generate_tokens._cache_size() == 2
