"""Measures how long saving delays training, and whether a late resume is as fast as an early one.

    python -m benchmarks.checkpoint --model=vit_b16 --directory=/path/on/the/disk/of/your/runs

Saving: a state with AdamW's moments is saved several times, as in training. The loop waits for the
time of the call. Its limit is the time to copy as many bytes in memory, because the loop continues
to change them. Then follows the time until the files are written, sealed and named. Its limit is
the time to write as many bytes to one file and wait for the disk. On a machine with other work,
look at this process' CPU time: alone, a save takes no longer.

Resuming: `python -m vitcls.main` continues a run by one step after step 10, and a copy of the run
whose checkpoint says step 1 000 000. Both take turns. Needs the digits data set (--data_dir).
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.figures import host, positive, run_command
from benchmarks.models import NAMES, arch_config, make_model
from vitcls.checkpoints import folders, manager, seal
from vitcls.checkpoints.state import state_items
from vitcls.errors import UserError
from vitcls.files import expand
from vitcls.step import train_step as steps

EARLY, LATE = 10, 1_000_000


def measure_saving(model_name: str, directory: Path, num_turns: int) -> dict[str, Any]:
    """Returns the size in bytes, and the seconds of each action in every turn."""
    config = arch_config(model_name, 224)
    model = make_model(config, "float32")
    variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, 224, 224, 3)), train=False))(
        jax.random.key(0)
    )
    state = jax.jit(lambda v: steps.init_state(v, optax.adamw(1e-3), use_ema=False))(variables)
    del variables
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    host = np.ones(num_bytes, np.uint8)
    copy = np.empty_like(host)
    secs: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[..., Any], *args, **kwargs) -> None:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        action(*args, **kwargs)
        secs.setdefault(name, []).append(time.perf_counter() - begin)
        secs.setdefault(f"{name}_cpu", []).append(time.process_time() - begin_cpu)

    def write() -> None:
        with (directory / "plain").open("wb") as file:
            file.write(host)
            file.flush()
            os.fsync(file.fileno())

    with manager.Checkpoints(directory / "checkpoints") as checkpoints:
        for step in range(1, num_turns + 1):
            items = state_items(state)
            timed("save", checkpoints.save, step, items, meta={}, score=None)
            timed("behind", checkpoints.wait)
            timed("copy", np.copyto, copy, host)
            timed("write", write)
            timed("check", seal.damage, directory / "checkpoints" / str(step))
    return {"num_bytes": num_bytes, "secs": secs}


def measure_resuming(data_dir: str, directory: Path, num_turns: int) -> dict[str, list[float]]:
    """Returns the command's seconds in every turn, by the step after which the run continues."""
    begun = directory / "begun"
    _train(begun, data_dir, EARLY)
    secs: dict[str, list[float]] = {}
    for turn in range(num_turns):
        for step in (EARLY, LATE):
            workdir = directory / f"resumed-{step}-{turn}"
            shutil.copytree(begun, workdir)
            folder = workdir / "checkpoints"
            (folder / str(EARLY)).rename(folder / str(step))  # the seal stays valid: it has no step
            wall, processor = _train(workdir, data_dir, step + 1)
            secs.setdefault(str(step), []).append(wall)
            secs.setdefault(f"{step}_cpu", []).append(processor)
            shutil.rmtree(workdir)
    return secs


def _train(workdir: Path, data_dir: str, total_steps: int) -> tuple[float, float]:
    """Runs the command; returns its seconds and its CPU seconds."""
    command = [
        sys.executable, "-m", "vitcls.main", "--config=configs/quickstart.py:init=scratch",
        f"--workdir={workdir}", f"--config.data.data_dir={data_dir}",
        "--config.train.total_epochs=0", f"--config.train.total_steps={total_steps}",
        "--config.optim.warmup_steps=0", "--config.eval.every_steps=0",
    ]  # fmt: skip
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after, secs = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begin
    assert folders.has_steps(workdir / "checkpoints")
    return secs, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report(result: dict[str, Any]) -> str:
    """Returns the figures as text."""

    def line(what: str, name: str, beside: str = "", limit: str = "") -> str:
        values, text = secs[name], f"{what:42}"
        middle = statistics.median(values)
        text += f"{middle:7.2f} s ({min(values):.2f} to {max(values):.2f})"
        if cpu := secs.get(f"{name}_cpu"):
            text += f", processor {statistics.median(cpu):.2f} s ({min(cpu):.2f} to {max(cpu):.2f})"
        if limit:
            text += f", {middle / statistics.median(secs[limit]):.1f} x {beside}"
        return text

    lines = [f"load {result['load_before']:.1f} before, {result['num_cpus']} CPUs"]
    if saving := result["saving"]:
        secs = saving["secs"]
        lines += [
            f"{result['model']} with AdamW: {saving['num_bytes'] / 1e9:.2f} GB",
            line("a save holds up training", "save", "copying the bytes in memory", "copy"),
            line("then until it is written and sealed", "behind", "writing one file", "write"),
            line("comparing it with its seal", "check"),
        ]  # fmt: skip
    if secs := result["resuming"]:
        lines += [
            line(f"one step more after step {EARLY}", str(EARLY)),
            line(f"one step more after step {LATE}", str(LATE), f"step {EARLY}", str(EARLY)),
        ]
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns all figures, as `--json` writes them."""
    if args.directory and not args.directory.is_dir():
        raise UserError(f"--directory={args.directory} is not a folder.")
    result = host() | {"model": args.model, "saving": None}
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        if args.model != "none":
            result["saving"] = measure_saving(args.model, Path(folder), args.turns)
        resumed = args.data_dir and measure_resuming(args.data_dir, Path(folder), args.turns)
        result["resuming"] = resumed or None
    return result


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=[*NAMES, "none"], default="vit_b16", help="none: no saving is measured")
    add("--data_dir", default="", help="folder with prepared digits; empty: no resume is measured")
    add("--directory", type=expand, help="where to write; default: a temporary folder")
    add("--turns", type=positive(int), default=5, help="turns of each (default: 5)")
    run_command(parser, measure, report)


if __name__ == "__main__":
    main()
