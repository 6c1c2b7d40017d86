"""Memory that is left: of the machine, and of a job that may use only some of it."""

import math
import os

import pytest

from vitcls.processes.memory import available_memory


def test_available_memory_is_at_most_what_the_machine_has():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory() <= total


@pytest.mark.parametrize(
    ("line", "mount", "names", "no_limit"),
    [
        ("0::", "", ("memory.max", "memory.current", ""), "max"),
        (
            "4:memory:", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            str(2**63 - 4096),
        ),
    ],
    ids=["v2", "v1"],
)  # fmt: skip
def test_the_tightest_control_group_limits_memory(tmp_path, line, mount, names, no_limit):
    """The job's own group has no limit, but the one that it is in; read files can be dropped."""
    assert available_memory(tmp_path) == math.inf
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_memory(tmp_path) == 4000 * 1024
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpu:/other\n{line}/slurm/job_1/step\n")
    limit_name, used_name, prefix = names
    limits = {"slurm": no_limit, "slurm/job_1": "3000", "slurm/job_1/step": no_limit}
    for group, limit in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / mount / group
        folder.mkdir(parents=True)
        (folder / limit_name).write_text(f"{limit}\n")
        (folder / used_name).write_text("2000\n")
        stat = f"rss 1300\n{prefix}inactive_file 400\n{prefix}active_file 300\n"
        (folder / "memory.stat").write_text(stat)
    assert available_memory(tmp_path) == 3000 - 1300
