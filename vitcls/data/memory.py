"""How much memory is left."""

import contextlib
import math
import pathlib


def available_memory(root: pathlib.Path = pathlib.Path("/")) -> float:
    """Bytes that this process can still take: of the system, and of its control groups (v2).

    Files that the system keeps in memory count as available. Infinite where nothing is known, as
    on other systems than Linux.
    """
    available = [math.inf]
    with contextlib.suppress(OSError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        system = dict(line.split(":") for line in lines)
        available.append(1024 * int(system["MemAvailable"].split()[0]))
    for group in _control_groups(root):
        with contextlib.suppress(OSError, ValueError):  # no files or "max": no limit here
            limit = int((group / "memory.max").read_text())
            lines = (group / "memory.stat").read_text().splitlines()
            used = {name: int(number) for name, number in map(str.split, lines)}
            files = used["active_file"] + used["inactive_file"]
            available.append(limit - int((group / "memory.current").read_text()) + files)
    return min(available)


def _control_groups(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of this process' control group and of those that it is in."""
    mount = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                own = mount / line.removeprefix("0::/")
                return [own, *(folder for folder in own.parents if folder.is_relative_to(mount))]
    return []
