"""Ctrl-C ends a command, also where Python loses the first `KeyboardInterrupt`."""

import gc
import hashlib
import signal
import sys
import threading
import time

import pytest

from transformer_vq.cli import interrupts
from transformer_vq.cli.interrupts import Interrupts, interruptible


def interrupted_in_a_callback(seconds: float) -> None:
    """Ctrl-C while a callback of the garbage collector runs, which swallows it; then work."""

    def callback(phase, _info):
        if phase == "start" and not sent:
            sent.append(True)
            signal.raise_signal(signal.SIGINT)

    sent = []
    gc.callbacks.append(callback)
    try:
        gc.collect()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
    finally:
        gc.callbacks.remove(callback)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_is_lost_comes_again(monkeypatch):
    monkeypatch.setattr(interrupts, "AGAIN", 0.05)
    interrupted_in_a_callback(0.2)  # control: Python loses it
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    with pytest.raises(KeyboardInterrupt), Interrupts():
        interrupted_in_a_callback(30)
    assert not lost  # nothing is printed of it
    assert sys.unraisablehook == lost.append
    time.sleep(0.1)  # and it does not come any more
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_long_call_of_a_library_in_c_is_interrupted():
    def work(rounds: int) -> None:
        threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        ended.append(hashlib.pbkdf2_hmac("sha256", b"", b"", rounds))

    ended = []
    with pytest.raises(KeyboardInterrupt), Interrupts():
        interruptible(lambda: work(20_000_000))
    assert not ended
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_handlers_of_others_stay():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_import_comes_to_its_end(monkeypatch, tmp_path):
    """A module in C that is interrupted as it starts raises `ImportError`, or crashes."""
    monkeypatch.setattr(interrupts, "SOON", 0.02)
    content = (
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.1)\nwhole = 1\n"
    )
    (tmp_path / "interrupted_module.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupts():
            import interrupted_module  # pyright: ignore

            time.sleep(30)
        assert interrupted_module.whole  # pyright: ignore
    finally:
        sys.modules.pop("interrupted_module", None)


def test_who_is_called_by_an_import_is_interrupted_all_the_same(monkeypatch, tmp_path):
    content = (
        "import signal, time\nfrom transformer_vq.cli.interrupts import Interrupts\n"
        "with Interrupts():\n    signal.raise_signal(signal.SIGINT)\n    time.sleep(1)\n"
        "    raise SystemExit('not interrupted')\n"
    )
    (tmp_path / "calling_module.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        import calling_module  # pyright: ignore  # noqa: F401


def test_a_process_that_ends_by_it_is_not_interrupted_again():
    try:
        with pytest.raises(KeyboardInterrupt), Interrupts(last=True):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)  # nothing
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # control
        signal.raise_signal(signal.SIGINT)
