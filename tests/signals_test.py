"""A signal is noted, not raised, but where nothing is lost; a second Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys

import pytest

from vitcls.signals import StopRequest

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


def run_program(body: str) -> subprocess.CompletedProcess:
    """A process of its own, as what is tested may end it."""
    head = "import hashlib, os, signal, sys, time\nfrom vitcls import signals\n"
    head += "def kill(name): os.kill(os.getpid(), signal.Signals[name])\n"
    return subprocess.run(
        [sys.executable, "-c", head + body], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_so_are_others(number):
    with StopRequest() as stop:
        assert stop.poll() is None
        os.kill(os.getpid(), number)
        assert stop.poll() == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll() == signal.Signals(number).name  # the first


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_all_processes_get_the_vote():
    votes = []
    with StopRequest(vote=lambda number: votes.append(number) or signal.SIGUSR2) as stop:
        assert stop.poll() == "SIGUSR2"  # of another process
    assert votes == [0]


def test_a_second_interrupt_ends_the_process_even_in_a_compiler():
    result = run_program(
        "import threading\n"
        "threading.Timer(0.3, kill, ['SIGINT']).start()\n"
        "threading.Timer(0.6, kill, ['SIGINT']).start()\n"
        "with signals.StopRequest():\n"  # for minutes not in Python, where handlers run
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    assert result.returncode == 130
    assert result.stderr == "SIGINT: saving, then stopping; a second Ctrl-C stops at once.\n"


def test_where_all_is_saved_a_signal_ends_the_process_at_once():
    result = run_program(
        "with signals.StopRequest() as stop:\n"
        "    stop.is_all_saved = True\n"
        "    kill('SIGUSR1')\n"
        "    time.sleep(30)\n"
    )
    assert result.returncode == 75
    assert result.stderr == "SIGUSR1: nothing to save; run the same command again.\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_outside_of_training_a_signal_ends_the_command_and_cleans_up(name):
    result = run_program(
        "signals.exit_on_signal()\n"
        "try:\n"
        f"    kill('{name}')\n"
        "    time.sleep(30)\n"
        "finally:\n"
        f"    kill('{name}')\n"  # a second one does not come between
        "    print('cleaned up')\n"
    )
    assert result.returncode == 75
    assert result.stdout == "cleaned up\n"
    assert result.stderr == f"{name}: stopped outside of training; run the same command again.\n"
