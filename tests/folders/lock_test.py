"""One process at a time: who holds the lock is named, and none outlives its process."""

import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from vitcls.errors import UserError
from vitcls.folders import lock
from vitcls.logs import progress


@pytest.fixture
def no_locks(monkeypatch):
    """Lets the system refuse every lock, with the error of a given number."""
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    monkeypatch.setattr(lock, "_WARNED", set())

    def let_fail(number: int) -> None:
        def refuse(file, how):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "lockf", refuse)
        monkeypatch.setattr(fcntl, "flock", refuse)

    return let_fail


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of the folder."""
    program = f"""
from pathlib import Path
from vitcls.folders import lock
from vitcls.logs import progress
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
    program = "import pathlib, sys, vitcls.folders.lock as l; l.take(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    assert b"UserError" in subprocess.run(command, capture_output=True, check=False).stderr
    lock.release(tmp_path / "lock")
    subprocess.run(command, check=True)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    monkeypatch.setattr(lock, "_WARNED", set())

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock.take(tmp_path / "lock")
    assert "without locks (No locks available): make sure that no other job" in caplog.text
    assert "has the same workdir." in caplog.text  # vitcls.evaluate also warns, without --workdir
    lock.release(tmp_path / "lock")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_all_kinds_of_locks_warn_once_and_go_on_without(tmp_path, no_locks, caplog, number):
    no_locks(number)
    for _ in range(2):
        with lock.waiting(tmp_path / "new" / "lock") as (file, is_alone):
            assert not is_alone and file.writable()
        with (tmp_path / "list").open("a+b") as file:
            assert lock.wait_for(file) is False
        lock.take(tmp_path / "lock")
        lock.release(tmp_path / "lock")
    assert caplog.text.count("is on a file system without locks") == 1


def test_another_error_of_a_lock_is_an_error(tmp_path, no_locks):
    no_locks(errno.EIO)
    with pytest.raises(OSError, match="Input/output"), lock.waiting(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match="Input/output"):
        lock.take(tmp_path / "lock")


def test_one_who_waits_is_told_for_whom(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "vitcls")
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    monkeypatch.setattr(progress, "LINE_SECS", 0.05)
    program = f"""
from pathlib import Path
from vitcls.folders import lock
from vitcls.logs import progress
with lock.waiting(Path({str(tmp_path / "lock")!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        message = f"Waiting for process {process.pid} on {socket.gethostname()}, since 20"

        def let_go():
            while caplog.text.count(message) < 3:  # at first, and while it lasts
                time.sleep(0.01)
            process.communicate(b"\n")

        thread = threading.Thread(target=let_go)
        thread.start()
        with lock.waiting(tmp_path / "lock") as (_, is_alone):
            assert is_alone
            assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()
        thread.join()
    assert f", which prepares {tmp_path}." in caplog.text
