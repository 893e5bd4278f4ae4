"""What orbax and its libraries say of a save that fails is kept from the terminal; the rest not."""

import gc
import logging
import sys
import warnings
from types import SimpleNamespace

from orbax.checkpoint._src.serialization.serialization import async_serialize_from_host

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
    for name in ("orbax/checkpoint/writer.py", "somewhere/else.py"):
        try:  # an error that names no file, as that of a limit of files
            exec(compile("raise OSError(27, 'File too large')", f"/lib/{name}", "exec"))
        except OSError:
            log.exception("Future exception was never retrieved: %s", name[-7:])
    ends = [record.getMessage()[-7:] for record in caplog.records]
    assert ends == ["dy else", "else.py"]


def test_writes_that_never_began_do_not_warn():
    """Of a save that failed, they are dropped; the warning would come at any later moment."""

    async def write_fragment():
        pass

    def dropped():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            handler.keep_quiet()
            async_serialize_from_host(None, {})
            part = write_fragment()
            part.__qualname__ = "async_serialize_from_host.<locals>.write_fragment"
            write_fragment()  # control: of somebody else
            del part
            gc.collect()
        return [str(warning.message) for warning in told]

    (other,) = dropped()
    assert "test_writes_that_never_began" in other
