"""Measures the share of a traced time between two executions of a program."""

import itertools
from pathlib import Path

from jax.profiler import ProfileData


def gap_share(folder: Path, module: str) -> float | None:
    """Returns the share of the time between the end of one execution and the start of the next.

    None if the trace does not say which execution an operation belongs to.

    Args:
      folder: Folder of a trace by `jax.profiler`, for one device.
      module: Name of the compiled program, such as `jit_train_step`.
    """
    (path,) = folder.glob("**/*.xplane.pb")
    spans = {}  # of executions
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                facts = {name: value for name, value in event.stats if name}
                if facts.get("hlo_module") == module and "run_id" in facts:
                    begin, end = spans.get(facts["run_id"], (event.start_ns, event.end_ns))
                    spans[facts["run_id"]] = (
                        min(begin, event.start_ns),
                        max(end, event.end_ns),
                    )
    spans = sorted(spans.values())
    if len(spans) < 2:
        return None
    gaps = sum(max(b[0] - a[1], 0) for a, b in itertools.pairwise(spans))
    return gaps / (spans[-1][1] - spans[0][0])
