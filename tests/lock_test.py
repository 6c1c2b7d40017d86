"""One process at a time: who holds the lock is named, and none outlives its process."""

import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys

import pytest

from vitcls import lock
from vitcls.errors import UserError


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of the folder."""
    program = f"""
from pathlib import Path
from vitcls import lock
lock.take(Path({str(tmp_path / "lock")!r}))
print("held", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_it_until_that_one_is_killed(other, tmp_path):
    message = f"{tmp_path} is being written to by process {other.pid} on {socket.gethostname()}, "
    with pytest.raises(UserError, match=f"{message}since 20.* or use another --workdir") as error:
        lock.take(tmp_path / "lock")
    assert error.value.exit_code == 2
    other.kill()
    other.wait()
    lock.take(tmp_path / "lock")
    assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()
    lock.release(tmp_path / "lock")


def test_a_process_may_take_its_own_lock_again_and_gives_it_back(tmp_path):
    lock.take(tmp_path / "lock")
    lock.take(tmp_path / "lock")
    program = "import pathlib, sys, vitcls.lock as l; l.take(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    assert b"UserError" in subprocess.run(command, capture_output=True, check=False).stderr
    lock.release(tmp_path / "lock")
    subprocess.run(command, check=True)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock.take(tmp_path / "lock")
    assert "without locks (No locks available): see to it that no other job" in caplog.text
    lock.release(tmp_path / "lock")
