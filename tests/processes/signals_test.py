"""A signal is noted, not raised, but where nothing is lost; a second Ctrl-C ends the process."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import stopping
from vitcls.processes.signals import StopRequest

ROOT = Path(__file__).parents[2]

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


def run_program(body: str) -> subprocess.CompletedProcess:
    """A process of its own, as what is tested may end it."""
    head = "import hashlib, os, signal, sys, time\nfrom vitcls.processes import signals\n"
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR2"])
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


@pytest.mark.parametrize("start", ["signals.exit_on_signal()", "signals.StopRequest().__enter__()"])
@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_what_is_ignored_from_the_start_stays_so(name, start):
    """As `nohup` and shells do, for what is to live on; other signals are heeded all the same."""
    result = run_program(
        f"signal.signal(signal.{name}, signal.SIG_IGN)\n"
        f"request = {start}\n"
        f"kill('{name}')\n"
        "time.sleep(0.3)\n"
        "print('lives', flush=True)\n"
        "signals.ignore()\n"
        f"print(signal.getsignal(signal.{name}) == signal.SIG_IGN)\n"
    )
    assert (result.returncode, result.stdout) == (0, "lives\nTrue\n"), result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="terminals end otherwise elsewhere")
def test_a_closed_terminal_lets_a_run_save_and_end(tmp_path):
    """Its output is that terminal; closing tells it twice, by the system and by the shell."""
    program = (
        "import os, pathlib, signal, sys, time\n"
        "from vitcls.processes import signals\n"
        "from vitcls.cli import run\n"
        "from vitcls.errors import Interrupted\n"
        "def main():\n"
        "    with signals.StopRequest() as stop:\n"
        "        print('begun', flush=True)\n"
        "        while not stop.poll():\n"
        "            time.sleep(0.05)\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        time.sleep(0.2)\n"
        "        print('saved', flush=True)\n"
        "        pathlib.Path(os.environ['SAVED']).write_text(stop.name)\n"
        "        raise Interrupted('saved')\n"
        "run(main)\n"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, start_new_session=True,
        stdin=slave, stdout=slave, stderr=slave,
        env=os.environ | {"SAVED": str(tmp_path / "saved")},
    )  # fmt: skip
    os.close(slave)
    while b"begun" not in os.read(master, 1000):
        pass
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "saved").read_text() == "SIGHUP"


def test_launchers_heed_a_closed_terminal_once():
    with stopping.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.name == "SIGHUP"
