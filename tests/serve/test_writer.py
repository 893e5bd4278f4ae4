"""The text of an answer: the same however its tokens come, no part of a stop, whole characters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.data import ByteTokenizer, StreamDecoder
from transformer_vq.engine.request import Token
from transformer_vq.engine.scheduler import Scores
from transformer_vq.serve.writer import Writer, logprobs_object, token_name

BYTES = ByteTokenizer()
TEXTS = st.text(st.sampled_from("ab é€\n🙂"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("ab é€"), min_size=1, max_size=4), max_size=3)


def written(tokens, cuts, **options):
    """Pieces of an answer whose tokens come in parts that end at `cuts`, and its writer."""
    writer = Writer(BYTES, (), alternatives=2, **options)
    pieces, start = [], 0
    for end in [*sorted(cuts), len(tokens)]:
        part = [Token(t, 0, -1.0, {t: -1.0, 7: -2.0}) for t in tokens[start : max(start, end)]]
        pieces.append(writer.push(part))
        start = max(start, end)
    return [*pieces, writer.flush()], writer


def first_end(text, stops):
    """Where the stop begins that is the first to be whole, character by character."""
    for n in range(len(text) + 1):
        starts = [text.index(stop) for stop in stops if stop in text[:n]]
        if starts:
            return min(starts)
    return None


@settings(max_examples=300)
@given(
    text=TEXTS,
    stops=STOPS,
    slices=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 4)), max_size=2),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    broken=st.booleans(),
)
def test_a_stream_is_the_answer(text, stops, slices, cuts, broken):
    """Stops are texts, some of which are in the answer."""
    stops = [*stops, *filter(None, (text[start : start + n] for start, n in slices))]
    tokens = list(text.encode())
    if broken:
        tokens = [*tokens[: len(tokens) * 2 // 3], 0xE2]
    pieces, writer = written(tokens, [min(cut, len(tokens)) for cut in cuts], stops=stops)
    joined = "".join(piece.text for piece in pieces)
    whole = bytes(tokens).decode(errors="replace")
    end = first_end(whole, stops)
    assert joined == whole[:end] and writer.ended == (end is not None)
    entries = [entry for piece in pieces for entry in piece.entries]
    assert [entry.token for entry in entries] == writer.tokens == tokens[: len(entries)]
    # Tokens and text say the same, as far as a character of the text has its last token.
    said = bytes(writer.tokens).decode(errors="replace")
    assert said == joined if end is None else joined.startswith(said)


@given(text=TEXTS, stop=st.sampled_from(["ab", "é", "a"]), least=st.integers(0, 20))
def test_include_stop_and_min_tokens(text, stop, least):
    tokens = list(text.encode())
    kept = "".join(p.text for p in written(tokens, [], stops=[stop], include_stop=True)[0])
    assert kept == (text[: text.index(stop) + len(stop)] if stop in text else text)
    pieces, writer = written(tokens, [], stops=[stop], min_tokens=least)
    assert len(writer.tokens) >= min(least, len(tokens)) - 3  # a character may be cut
    assert text.startswith("".join(p.text for p in pieces))


def test_names_of_tokens():
    decoder = StreamDecoder(BYTES)
    names = [token_name(token, decoder.adds(token)) for token in range(256)]
    assert len(set(names)) == 256
    assert (names[65], names[10], names[0xE2]) == ("A", "\n", "bytes:\\xe2")


class Twice(ByteTokenizer):
    """Bytes, of which every one is also a second token; and a token that is no text."""

    vocab_size = 513

    def decode(self, tokens):
        return bytes(token % 256 for token in tokens if token < 512)


def test_alternatives_that_are_written_alike():
    """Their ids are their names, as of tokens that add nothing; none gets lost."""
    writer = Writer(Twice(), (), alternatives=3)
    eos, token = 512, 65
    top = {eos: -0.1, token + 256: -0.4, token: -0.5, 0: -9.0}
    piece = writer.push([Token(token, 0, -0.5, top)])
    found = logprobs_object(piece.entries, 3, ids=True)
    assert found["top_logprobs"] == [{"token_id:512": -0.1, "token_id:321": -0.4, "A": -0.5}]
    assert found["top_token_ids"] == [[512, 321, 65]]


def test_what_was_drawn_is_among_the_alternatives():
    writer = Writer(BYTES, (), alternatives=1)
    piece = writer.push([Token(65, 0, -3.0, {66: -0.1, 67: -2.0, 65: -3.0})])
    assert piece.entries[0].top == {"B": -0.1, "A": -3.0}
    assert logprobs_object(piece.entries, 0)["top_logprobs"] is None


def test_echo():
    """The prompt's tokens come first; characters that it begins are ended by the answer."""
    scores = Scores(
        np.float32([0, -1, -np.inf]), np.int32([[1], [2], [3]]), np.float32([[0], [-1], [-2]])
    )
    writer = Writer(BYTES, (), alternatives=1)
    prompt = writer.echo([*list(b"a"), 195, 169], scores, first=True)
    assert prompt.text == "aé"
    found = logprobs_object(prompt.entries, 1)
    assert found["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert found["token_logprobs"] == [None, -1.0, -9999.0]
    assert found["top_logprobs"][0] is None and found["text_offset"] == [0, 1, 1]
    half = Writer(BYTES, ())
    assert half.echo([0xC3], None, first=True).text == ""
    assert half.push([Token(0xA9, 0)]).text == "é"
    with pytest.raises(ValueError, match="outside"):
        half.echo([300], None, first=True)
