"""Requests to stop by signals."""

import os
import signal

import pytest

from transformer_vq.run.stop import StopSignals


def send(number):
    os.kill(os.getpid(), number)


def test_the_first_one_is_noted_and_the_second_acts():
    with StopSignals() as stop:
        assert not stop.requested
        send(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_terminal_that_closes_may_say_so_twice():
    """And a service manager sends SIGTERM with it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # this may run under nohup
    try:
        with StopSignals() as stop:
            send(signal.SIGHUP)
            send(signal.SIGHUP)
            send(signal.SIGTERM)
            send(signal.SIGHUP)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nohup_stays_what_it_is():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            send(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
