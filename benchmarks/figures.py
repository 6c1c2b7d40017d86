"""What benchmarks do with what they measured: the host, medians and spread, lines of a table."""

import argparse
import math
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


def host() -> dict[str, Any]:
    """Returns the processor's name, how many there are for this process, and the load."""
    return {
        "device": processor_name() or platform.machine(),
        "num_cpus": num_cpus(),
        "load_before": os.getloadavg()[0],
    }


def num_cpus() -> int | None:
    """Returns how many processors this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor_name() -> str | None:
    """Returns the name of the product, on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    lines = dict(line.split("\t: ") for line in cpuinfo.read_text().splitlines() if "\t: " in line)
    return lines.get("model name")


def summary(values: list[float], scale: float = 1.0) -> dict[str, Any]:
    """Returns the values, times `scale`, with their median and spread."""
    values = [value * scale for value in values]
    middle = statistics.median(values)
    return {"median": middle, "min": min(values), "max": max(values), "windows": values}


def line(label: str, figures: dict[str, Any], *, width: int, digits: int = 2) -> str:
    """Returns a line of a table from a `summary`: label, median, lowest and highest."""
    spread = f"{figures['min']:.{digits}f} - {figures['max']:.{digits}f}"
    return f"{label:{width}}{figures['median']:10.{digits}f}{spread:>22}"


def positive(kind: type) -> Callable[[str], Any]:
    """Returns a parser of numbers above 0, for argparse."""

    def parse(text: str):
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it where `kind` cannot read the text
    return parse
