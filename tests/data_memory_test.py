"""Memory that is left: of the machine, and of a job that may use only some of it."""

import math
import os

from vitcls.data.memory import available_memory


def test_available_memory_is_at_most_what_the_machine_has():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory() <= total


def test_the_tightest_control_group_limits_memory(tmp_path):
    """The job's own group has no limit, but the one that it is in; read files can be dropped."""
    assert available_memory(tmp_path) == math.inf
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_memory(tmp_path) == 4000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/slurm/job_1/step\n")
    for group, limit in [("slurm", "max"), ("slurm/job_1", "3000"), ("slurm/job_1/step", "max")]:
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("2000\n")
        (folder / "memory.stat").write_text("anon 1300\ninactive_file 400\nactive_file 300\n")
    assert available_memory(tmp_path) == 3000 - 1300
