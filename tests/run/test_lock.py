"""A run folder has one writer, by a lock that a dead process leaves free."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.helpers import ROOT
from transformer_vq.run.folder import RunError
from transformer_vq.run.lock import LOCK_FILE, one_writer

HOLDER = """
import sys, time
from pathlib import Path
from transformer_vq.run.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes in the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named_until_it_dies(tmp_path, holder):
    with pytest.raises(RunError, match=f"being written by process {holder.pid} on .*: wait"):
        one_writer(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with one_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    assert os.listdir(tmp_path) == []


def test_another_thread_is_refused_and_the_same_one_is_not(tmp_path):
    refused = []

    def other():
        try:
            with one_writer(tmp_path):
                pass
        except RunError as error:
            refused.append(str(error))

    with one_writer(tmp_path):
        with one_writer(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()}" in refused[0]
    other()
    assert len(refused) == 1


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = []
    with one_writer(tmp_path, said.append):
        pass
    assert said == [f"the file system of {tmp_path} has no locks: take care that nothing else "
                    f"trains there"]  # fmt: skip
