"""The console: a reader that goes away."""

import contextlib
import os

import pytest

from transformer_vq.show.console import Console


def test_a_reader_that_goes_away_is_a_broken_pipe():
    """It is an error of its own once, and what is printed afterwards goes nowhere."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as file:  # closing fails as well
        console = Console(file=file)
        with pytest.raises(BrokenPipeError):
            console.print("lost")
        console.print("nothing to say, and nobody to say it to")
