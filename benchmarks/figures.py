"""Helpers for reports of benchmarks: the host, medians and spread, lines of a table."""

import argparse
import functools
import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitcls.errors import UserError
from vitcls.files import expand
from vitcls.folders import ownership


def host() -> dict[str, Any]:
    """Returns the CPU's name, the number of cores for this process, and the load."""
    return {
        "device": processor_name() or platform.machine(),
        "num_cpus": num_cpus(),
        "load_before": os.getloadavg()[0],
    }


def num_cpus() -> int | None:
    """Returns the number of cores that this process may use, if the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor_name() -> str | None:
    """Returns the product name of the CPU, on Linux."""
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


def run_command(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
) -> None:
    """Reads the command line, measures, prints, and writes the file of `--json`.

    Args:
      parser: Parser with all other arguments.
      measure: Arguments -> all figures.
      report: Figures -> text.
    """
    parser.add_argument("--json", type=expand, help="file to write all figures to")
    args = parser.parse_args()
    try:
        if args.json and not args.json.absolute().parent.is_dir():
            raise UserError(f"--json={args.json}: there is no folder {args.json.parent}.")
        if args.json:
            own = functools.partial(ownership.has_keys, args.json, "device")
            ownership.check_file("--json", args.json, is_own=own)
        result = measure(args)
    except UserError as error:
        parser.error(str(error))  # exits with 2
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def positive(kind: type) -> Callable[[str], Any]:
    """Returns a parser of numbers above 0, for argparse."""

    def parse(text: str):
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it if `kind` cannot read the text
    return parse
