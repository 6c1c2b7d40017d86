"""Runs every benchmark of speed that this machine can, and writes one table.

    python -m benchmarks.all --output=runs/performance

Writes OUTPUT.md and OUTPUT.json. Training and evaluation are measured on a GPU if there is one,
loading and start-up on the CPU. The most important benchmarks come first. Benchmarks that do not
start before `--minutes` are over, or lack a package, are listed with the reason. On two cores all
take about 25 minutes. Each runs in a separate process. Run `python -m benchmarks.make_peers` before
to include the Flax networks of transformers.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import make_peers
from benchmarks.figures import positive, summary
from vitcls.errors import UserError
from vitcls.files import expand
from vitcls.folders import ownership

Row = tuple[str, ...]  # the columns below
COLUMNS = ("what", "ours", "peer", "ours / peer", "limit", "share of the limit")


class Job(NamedTuple):
    """A benchmark of this folder, its arguments, and the packages that it needs."""

    name: str
    args: tuple[str, ...]
    packages: tuple[str, ...] = ()


def jobs(platform: str) -> list[Job]:
    """Returns the jobs for "cpu", "gpu" or "tpu", the most important first."""
    if platform == "cpu":
        sized, torch = ("--batch_size=8",), ("torch", "transformers")
        steps = [
            Job("train_step", ("--model=vit_b16", "--peer=torch", *sized), torch),
            Job("train_step", ("--model=vit_b16", "--peer=flax", *sized), (".venv-peers",)),
            Job("train_step", ("--model=resnet50", "--peer=torch", *sized), torch),
            Job("train_step", ("--model=resnet50", "--peer=flax", *sized), (".venv-peers",)),
            Job("forward", ("--model=vit_b16", "--peer=torch", *sized), torch),
        ]
    else:
        sized = ("--batch_size=256", "--dtype=bfloat16")
        names = ("vit_b16", "resnet50", "vit_s16", "vit_l16")
        steps = [Job("train_step", (f"--model={name}", *sized)) for name in names]
        steps.insert(1, Job("forward", ("--model=vit_b16", *sized)))
        if platform == "gpu":
            flash = ("--model=vit_b16", "--attention=cudnn", "--peer=none", *sized)
            steps.insert(2, Job("train_step", flash))
    data = ("PIL", "grain", "orbax.checkpoint")
    return [
        *steps[:2],
        Job("input_pipeline", (), (*data, "tensorflow", "torch")),
        Job("startup", (), data),
        *steps[2:],
        Job("real_data", (), data),
        Job("checkpoint", ("--model=vit_b16",), data),
        Job("probe", ("--dim=768", "--window_secs=1")),
    ]


def missing(job: Job) -> list[str]:
    """Returns the packages that the job lacks."""
    return [name for name in job.packages if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    if name == ".venv-peers":
        return make_peers.PYTHON.exists()
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around a module
        return False


def run(job: Job, *, secs: float, windows: int) -> dict[str, Any] | str:
    """Runs a job for at most `secs`; returns its figures, or the reason for none."""
    turns = "--turns" if job.name in ("startup", "checkpoint") else "--windows"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [
            sys.executable, "-m", f"benchmarks.{job.name}", *job.args,
            f"{turns}={windows}", f"--json={path}",
        ]  # fmt: skip
        # A new session: the children of a benchmark end with it.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=secs)
        except subprocess.TimeoutExpired:
            return "stopped: the time was over"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            return f"failed with exit code {process.returncode}, see its message"
        print(printed, flush=True)
        return json.loads(path.read_text())


def step_rows(job: Job, figures: dict[str, Any]) -> list[Row]:
    """Rows of `train_step` and `forward`: images per second."""
    ours, peer, limit = figures["ours"], figures["peer"], figures["limit"]
    what = "training" if job.name == "train_step" else "evaluation"
    label = (
        f"{what}, {figures['model']}, {figures['image_size']} px, batch {figures['batch_size']}, "
        f"{figures['dtype']}{'' if figures['attention'] == 'xla' else ', ' + figures['attention']}"
        ", images/s"
    )
    beside, ratio = "", ""
    if peer:
        beside = f"{_spread(peer['images_per_second'])} {peer['library']} {peer['variant']}"
        ratio = _spread(figures["ratio"])
    share = f"{ours['share_of_limit']:.0%}"
    speed = _spread(ours["images_per_second"])
    return [(label, speed, beside, ratio, _number(limit["images_per_second"]), share)]


def input_rows(job: Job, figures: dict[str, Any]) -> list[Row]:
    """Rows of `input_pipeline`: images per second."""
    speeds, ratios = figures["images_per_second"], figures["ratios"]
    both = "both, one after the other"
    limit, label = _number(speeds[both]["median"]), "JPEG files, 224 px, images/s"
    ours, share = _spread(speeds["ours"]), f"{ratios[both]['median']:.0%}"
    rows = []
    for name, peer in figures["peers"].items():
        beside = f"{_spread(speeds[name])} {peer['variant']}"
        rows.append((label, ours, beside, _spread(ratios[name]), limit, share))
    alone = speeds["crop and scale alone"]["median"]
    share = f"{speeds['cache']['median'] / alone:.0%}"
    cached = "decoded cache, 224 px, images/s", _spread(speeds["cache"])
    return [*rows, (*cached, "", "", _number(alone), share)]


def startup_rows(job: Job, figures: dict[str, Any]) -> list[Row]:
    """Rows of `startup`: seconds."""
    label = f"start-up, {figures['model']}, batch {figures['batch_size']}, seconds"
    return [
        (f"{label}, {name}", _spread(figures["seconds"][name]), "", "", "", "")
        for name in ("cold", "warm")
    ]


def real_data_rows(job: Job, figures: dict[str, Any]) -> list[Row]:
    """Rows of `real_data`: images per second; the limit is the step alone."""
    alone, fixed, real = figures["images_per_second"].values()
    label = f"{figures['arch']}, {figures['image_size']} px, batch {figures['batch_size']}"
    share = f"{figures['loop / step alone']['median']:.1%}"
    return [
        (f"training's loop, {label}, images/s", _spread(fixed), "", "", _number(alone["median"]),
         share),
        (f"... with real images, waiting {figures['waiting']['median']:.1%}", _spread(real),
         f"{_spread(fixed)} the loop on one batch", _spread(figures["real / one batch"]), "", ""),
    ]  # fmt: skip


def checkpoint_rows(job: Job, figures: dict[str, Any]) -> list[Row]:
    """Rows of `checkpoint`: seconds; the limit is the time for the same bytes without it."""
    secs = {name: summary(values) for name, values in figures["saving"]["secs"].items()}
    label = f"checkpoint, {figures['model']} with AdamW, seconds"
    return [
        (f"{label}, {what}", _spread(secs[name]), "", "", _number(secs[limit]["median"]),
         f"{secs[limit]['median'] / secs[name]['median']:.0%}")
        for what, name, limit in (("held up", "save", "copy"), ("behind", "behind", "write"))
    ]  # fmt: skip


def probe_rows(job: Job, figures: dict[str, Any]) -> list[Row]:
    """Rows of `probe`: seconds."""
    seconds = figures["seconds"]
    label = (
        f"linear probes, {figures['trials']} trials, {figures['dim']} features, "
        f"{figures['classes']} classes, seconds"
    )
    beside = f"{_spread(seconds['separate'])} one trial after the other"
    ratio = _spread(summary([1 / x for x in figures["ratio"]["windows"]]))
    limit, share = _number(figures["limit"]["seconds"]), f"{figures['share_of_limit']:.0%}"
    return [(label, _spread(seconds["ours"]), beside, ratio, limit, share)]


ROWS: dict[str, Callable[[Job, dict[str, Any]], list[Row]]] = {
    "train_step": step_rows,
    "forward": step_rows,
    "input_pipeline": input_rows,
    "startup": startup_rows,
    "real_data": real_data_rows,
    "checkpoint": checkpoint_rows,
    "probe": probe_rows,
}


def _spread(figures: dict[str, Any]) -> str:
    low, high = _number(figures["min"]), _number(figures["max"])
    return f"{_number(figures['median'])} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(results: list[tuple[Job, dict[str, Any] | str]]) -> str:
    """Returns the figures, and the jobs without figures, as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    devices, versions, reasons = [], {}, []
    for job, figures in results:
        if isinstance(figures, str):
            reasons.append(f"- `{' '.join((job.name, *job.args))}`: {figures}")
            continue
        rows += ROWS[job.name](job, figures)
        devices.append(f"{figures['device']} ({figures['num_cpus']} CPUs)")
        peer = figures.get("peer") or {}
        versions |= figures.get("versions", {}) | peer.get("versions", {})
    lines = [f"| {' | '.join(row)} |" for row in rows]
    about = [
        "Median (lowest to highest) of the turns.",
        f"Device: {', '.join(dict.fromkeys(devices)) or 'none'}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
    ]
    return "\n".join(
        [*lines, "", *about, *(["", "Not measured:", "", *reasons] if reasons else [])]
    )


def main() -> None:
    """Runs all, prints each benchmark's figures as they come, writes the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=expand, required=True, help="path of the files, without .md and .json")
    add("--minutes", type=positive(float), default=9, help="time for all (default: 9)")
    add("--windows", type=positive(int), default=5, help="turns of each (default: 5)")
    args = parser.parse_args()
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output={args.output}: there is no folder {args.output.parent}.")
    text, figures = args.output.with_suffix(".md"), args.output.with_suffix(".json")
    try:
        ownership.check(
            "--output", args.output.parent, [text.name, figures.name],
            is_own=lambda: ownership.has_text(figures, '"benchmark": '),
        )  # fmt: skip
    except UserError as error:
        parser.error(str(error))
    end, results = time.monotonic() + 60 * args.minutes, []
    program = "import jax; print(jax.default_backend())"  # not here: it would take GPU memory
    platform = subprocess.check_output([sys.executable, "-c", program], text=True).split()[-1]
    for job in jobs(platform):
        secs = end - time.monotonic()
        if lacking := missing(job):
            found = f"not here: {', '.join(lacking)}"
        elif secs <= 0:
            found = "the time was over"
        else:
            print(f"benchmarks.{job.name} {' '.join(job.args)}", flush=True)
            found = run(job, secs=secs, windows=args.windows)
        results.append((job, found))
        # Written after each job, so that no figures are lost.
        text.write_text(table(results) + "\n")
        rows = [{"benchmark": job.name, "args": job.args, "figures": x} for job, x in results]
        figures.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
