"""The progress of a job of requests."""

import io

import pytest

from transformer_vq.show import answered
from transformer_vq.show.answered import Answered
from transformer_vq.show.console import Console


@pytest.mark.parametrize("terminal", [True, False])
def test_answered(terminal, monkeypatch):
    clock = iter([50.0, 52.0, 61.0])  # what was before, compiling, is not counted
    monkeypatch.setattr(answered, "now", lambda: next(clock))
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, legacy_windows=False)
    with Answered(1000, 400, 1, console=console) as progress:
        progress.one_more(70)
        progress.one_more(0)
        progress.one_more(330)
    text = out.getvalue()
    assert (
        "403 of 1,000 answered  0.182 answers/s  30 tokens/s  2 failed  54:44 left" in text
    ) != (terminal)
    assert ("403/1000" in text and "2 failed" in text) or not terminal
