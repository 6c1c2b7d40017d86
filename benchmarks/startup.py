"""Measures the start of training, from the process' start to the end of the first step.

    python -m benchmarks.startup --model=vit_b16 --batch_size=8

`python -m vitcls.main` fine-tunes random weights, saved in Hugging Face format before, on random
JPEG files. Its time is that of the first step's line in metrics.jsonl, less one steady step. It
consists of imports, the checkpoint, compilation and the first batch. Every turn runs it with an
empty folder of compiled programs (cold), then again with the programs of the first run (warm).
Files are in the system's cache, as after any download. The time of all imports is given for
comparison.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import jpegs
from benchmarks.figures import host, line, positive, run_command, summary

NUM_STEPS = 4  # the first, and steady ones
NUM_IMAGES = 64
GOALS = {"cold": 9.0, "warm": 6.0}  # seconds, of ViT-B/16 at batch 8 on a CPU


def save_checkpoint(folder: Path, model_name: str, image_size: int) -> None:
    """Writes a network with random weights, in a separate process, since jax keeps its memory."""
    from benchmarks.models import arch_config, make_model
    from benchmarks.train_step import random_variables
    from vitcls import pretrained

    config = arch_config(model_name, image_size)
    names = {number: str(number) for number in range(config.num_classes)}
    processor = pretrained.Processor(size=config.image_size, id2label=names)
    pretrained.save(folder, make_model(config, "float32"), random_variables(config), processor)


def start(folder: Path, name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Trains a few steps; returns the seconds to the end of the first, and of a steady step."""
    workdir = folder / name
    command = [
        sys.executable, "-m", "vitcls.main",
        f"--config=configs/vit_b16.py:data=folder:{folder / 'jpegs'}", f"--workdir={workdir}",
        f"--config.model.pretrained={folder / 'model'}", "--config.model.dtype=float32",
        f"--config.data.image_size=({args.image_size}, {args.image_size})",
        f"--config.train.global_batch_size={args.batch_size}", "--config.train.total_epochs=0",
        "--config.train.total_steps=100", "--config.log.every_steps=1",
        "--config.optim.warmup_steps=0", "--config.eval.select_split=",
        "--config.data.eval_splits=()",
    ]  # fmt: skip
    begin, output = time.time(), folder / f"{name}.txt"
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            while len(times := _step_times(workdir)) < NUM_STEPS:
                if process.poll() is not None:
                    raise RuntimeError(f"The run has ended:\n{output.read_text()}")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    steady = statistics.median(b - a for a, b in itertools.pairwise(times[1:]))
    return times[0] - begin, steady


def _step_times(workdir: Path) -> list[float]:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(text) for text in lines if text.endswith("\n")]
    return [row["time"] for row in rows if "train/loss" in row]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns all figures, as `--json` writes them; the files go to `folder`."""
    before = host()
    jpegs.make_folder(folder / "jpegs", NUM_IMAGES)
    program = "import pathlib, sys; from benchmarks import startup as s; "
    program += "s.save_checkpoint(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
    saving = [sys.executable, "-c", program, folder / "model", args.model, str(args.image_size)]
    subprocess.run(saving, check=True)
    secs = {"imports": [], "cold": [], "warm": []}
    steps = []
    for turn in range(args.turns):
        begin = time.time()
        subprocess.run([sys.executable, "-c", "import vitcls.main, vitcls.train"], check=True)
        secs["imports"].append(time.time() - begin)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / f"programs{turn}")
        for name in ("cold", "warm"):
            first, steady = start(folder, f"{name}{turn}", args)
            secs[name].append(first - steady)
            steps.append(steady)
    return before | {
        "model": args.model,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "seconds": {name: summary(values) for name, values in secs.items()},
        "step_seconds": summary(steps),
    }


def report(result: dict[str, Any]) -> str:
    """Returns the figures as text."""
    lines = [
        f"{result['device']}, {result['num_cpus']} CPUs, load {result['load_before']:.1f} before",
        f"{result['model']} at {result['image_size']} px, batch {result['batch_size']}: seconds to "
        "the end of the first step, less a steady step",
        f"{'':24}{'seconds':>10}{'min - max':>22}{'goal':>8}",
    ]
    for name, figures in result["seconds"].items():
        goal = f"{GOALS[name]:8.0f}" if name in GOALS else ""
        lines.append(line(name, figures, width=24) + goal)
    lines.append(line("a steady step", result["step_seconds"], width=24))
    return "\n".join(lines)


def measure_in_folder(args: argparse.Namespace) -> dict[str, Any]:
    """As `measure`, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, Path(folder))


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="vit_b16", help="see benchmarks.train_step (default: vit_b16)")
    add("--image_size", type=positive(int), default=224, help="height and width (default: 224)")
    add("--batch_size", type=positive(int), default=8, help="images in a step (default: 8)")
    add("--turns", type=positive(int), default=3, help="turns of each (default: 3)")
    run_command(parser, measure_in_folder, report)


if __name__ == "__main__":
    main()
