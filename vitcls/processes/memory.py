"""How much memory is left."""

import contextlib
import math
import pathlib
from collections.abc import Iterator

# In a control group's folder: the files of limit and use, and the prefix of names in memory.stat.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("memory.max", "memory.current", "")


def available_memory(root: pathlib.Path = pathlib.Path("/")) -> float:
    """Bytes that this process can still take: of the system, and of its control groups.

    Files that the system keeps in memory count as available. Infinite where nothing is known, as
    on other systems than Linux.
    """
    available = [math.inf]
    with contextlib.suppress(OSError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        system = dict(line.split(":") for line in lines)
        available.append(1024 * int(system["MemAvailable"].split()[0]))
    for group, (limit_name, used_name, prefix) in _control_groups(root):
        # Without these files, or with "max" in them, the group has no limit.
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((group / name).read_text()) for name in (limit_name, used_name))
            lines = (group / "memory.stat").read_text().splitlines()
            stat = {name: int(number) for name, number in map(str.split, lines)}
            files = stat[f"{prefix}active_file"] + stat[f"{prefix}inactive_file"]
            available.append(limit - used + files)
    return min(available)


def _control_groups(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, tuple[str, str, str]]]:
    """The folders of this process' control group and of those that it is in, and their files."""
    mount = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = mount / controllers
                own = top / path.removeprefix("/")
                for folder in (own, *own.parents):
                    if folder.is_relative_to(top):
                        yield folder, _V1 if controllers else _V2
