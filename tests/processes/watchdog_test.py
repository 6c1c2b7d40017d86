"""A process without progress ends, says where it was, and nothing else ends it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vitcls.processes.watchdog import RunningClock, Watchdog


def test_a_stuck_process_ends_and_says_where_it_is():
    program = """
import time
from vitcls.processes.watchdog import Watchdog

def stuck_here():
    while True:
        time.sleep(1)

with Watchdog(step_secs=60.0, save_secs=0.5) as watchdog:
    watchdog.expect("step")
    watchdog.expect("save")
    stuck_here()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 86
    assert "in stuck_here" in result.stderr
    last_line = result.stderr.splitlines()[-1]
    assert last_line.startswith("ERROR: Stuck: no end of save in 0.5 s (stall.save_secs).")


def test_progress_and_0_keep_a_process_alive():
    with Watchdog(step_secs=1.0, save_secs=0.0) as watchdog:  # its end would be that of all tests
        for _ in range(8):
            watchdog.expect("step")
            time.sleep(0.2)
        watchdog.expect("save")
        time.sleep(1.2)


def test_nothing_is_expected_before_it_is_said_and_only_what_is_known():
    with Watchdog(step_secs=0.01) as watchdog:
        time.sleep(0.7)
        with pytest.raises(KeyError):
            watchdog.expect("stop")


def test_a_pause_counts_as_one_second_at_most_and_work_as_what_it_takes():
    now = 100.0
    clock = RunningClock(lambda: now)
    for seconds, counted in [(0.5, 0.5), (0.75, 1.25), (8 * 3600, 2.25), (0.0, 2.25), (0.5, 2.75)]:
        now += seconds
        assert clock.read() == counted


def test_a_process_that_was_stopped_and_continued_is_not_stuck():
    program = """
import time
from vitcls.processes.watchdog import Watchdog

with Watchdog(step_secs=2.0) as watchdog:
    watchdog.expect("step")
    print("begun", flush=True)
    time.sleep(0.4)
    watchdog.expect("step")
    time.sleep(0.8)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        os.kill(process.pid, signal.SIGSTOP)
        # Longer than the whole budget.
        time.sleep(2.5)
        os.kill(process.pid, signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
