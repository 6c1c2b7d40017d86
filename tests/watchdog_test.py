"""A process without progress ends, says where it was, and nothing else ends it."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitcls.watchdog import Watchdog

ROOT = Path(__file__).parent.parent


def test_a_stuck_process_ends_and_says_where_it_is():
    program = """
import time
from vitcls.watchdog import Watchdog

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


def test_time_in_which_a_process_is_stopped_does_not_count():
    program = """
import sys, time
from vitcls import watchdog

watchdog._TOLD_SECS = 1
with watchdog.Watchdog(step_secs=2.0) as dog:
    dog.expect("step")
    print("waits", flush=True)
    sys.stdin.readline()
    time.sleep(0.7)  # the thread looks
    print("lives", flush=True)
    time.sleep(60)  # and now it is stuck
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        output, errors = process.communicate("go on\n", timeout=60)
    assert output == "lives\n"
    assert process.returncode == 86 and "Stuck: no end of step in 2 s" in errors
    assert re.search(r"The process was stopped for [34] s; no limit counts them.", errors)


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
