"""What orbax and its libraries say of a save that fails is kept from the terminal; the rest not."""

import logging
import sys
from types import SimpleNamespace

from transformer_vq.io import handler


def test_late_complaints_are_not_printed(monkeypatch, caplog):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    for _ in range(2):  # at every save
        handler.keep_quiet()
    closed = SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(object=None, exc_value=RuntimeError("Something else"))
    ours = SimpleNamespace(object=printed, exc_value=RuntimeError("Event loop is closed"))
    for unraisable in (closed, other, ours):
        sys.unraisablehook(unraisable)
    assert printed == [other, ours]

    log = logging.getLogger("asyncio")
    log.error("Future exception was never retrieved: R/checkpoints/4.orbax-checkpoint-tmp/d")
    log.error("Future exception was never retrieved: of somebody else")
    assert [record.getMessage()[-7:] for record in caplog.records] == ["ody else"[-7:]]
