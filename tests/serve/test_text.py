"""Stop texts: found wherever the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_vq.serve.text import TextStops


def run(pieces: list[str], *stops: str) -> tuple[str, bool]:
    found = TextStops(stops)
    out = ""
    for piece in pieces:
        out += found.push(piece)
        if found.found:
            break
    return out + found.flush(""), found.found


def test_stop_texts():
    assert run(["one t", "wo th", "ree?"], "two") == ("one ", True)
    assert run(["one t", "wo th", "ree?"], "tree", "o tt") == ("one two three?", False)
    assert run(["aab", "aaba", "ac"], "aabaac", "x") == ("aab", True)
    assert run(["a", "b"]) == ("ab", False)


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
)
def test_the_first_stop_ends_the_text_wherever_it_is_cut(pieces, stops):
    """That which is whole first."""
    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    text, found = run(list(whole), *stops)  # a letter at a time
    assert found == bool(ends)
    if ends:
        first = min(end for end, _ in ends)
        assert text in {whole[:start] for end, start in ends if end == first}
    else:
        assert text == whole
    assert run(pieces, *stops)[1] == found


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="a stop text is empty"):
        TextStops(["a", ""])
