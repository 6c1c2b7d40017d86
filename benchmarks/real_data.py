"""Measures how much of the step's speed remains in the training loop and with real images.

    python -m benchmarks.real_data --arch=vit_ti4 --image_size=32 --batch_size=16

Three variants of the training step take turns: the step alone, on one batch on the device; the same
step in the training loop, which fetches the metrics of the previous step; and the loop with images
from JPEG files, decoded once and kept in memory (`data.cache=ram`), cropped and scaled again in
every epoch. For the last one the share of waiting is also measured, the time in which no batch was
ready. Some steps of the loop on one batch are traced, to find the time between two steps, if the
trace says which step an operation belongs to. One process uses all of its devices.
"""

import argparse
import functools
import importlib.metadata
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks import jpegs
from benchmarks.figures import host, line, positive, run_command, summary
from benchmarks.trace import gap_share
from vitcls.config.checks import check_config
from vitcls.config.fields import default_config
from vitcls.data import loader
from vitcls.run import resolve, splits
from vitcls.run.network import open_model, train_transform
from vitcls.run.program import make_program
from vitcls.step import sharding

NUM_IMAGES = 512
SCALE = 0.15  # factor of ImageNet's sides: 66 pixels on average
MAX_TRACED = 40  # steps: a trace has a line for every operation
PRIMED = 12  # steps before the first turn: compiles, and fills the cache


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns all figures, as `--json` writes them; the files go to `folder`."""
    before = host()
    jpegs.make_folder(folder / "jpegs", NUM_IMAGES, scale=SCALE)
    config = default_config()
    config.data.update(
        source=f"folder:{folder / 'jpegs'}", image_size=(args.image_size,) * 2, cache="ram",
        eval_splits=(), num_threads=args.threads,
    )  # fmt: skip
    config.model.update(arch=args.arch, dtype=args.dtype)
    config.train.update(total_steps=10**6, global_batch_size=args.batch_size)
    config.eval.select_split = ""
    check_config(config)
    split, _ = splits.open_splits(config)
    _, network, processor = open_model(config, split.class_names)
    mesh = sharding.make_mesh(-1, 1)
    config = resolve.resolve(
        config, num_train=len(split), image_size=processor.size, num_devices=mesh.size
    )
    program = make_program(
        config, network, processor, mesh,
        class_names=split.class_names, class_counts=split.class_counts(),
    )  # fmt: skip
    batches = sharding.prefetch(
        loader.train_batches(
            split, global_batch_size=args.batch_size, start_step=0, total_steps=10**6, seed=0,
            transform=train_transform(config, processor), num_threads=args.threads,
        ),
        mesh,
    )  # fmt: skip
    state, kept, waited = program.first_state(None), next(batches), 0.0

    def step_alone(num_steps: int) -> None:
        nonlocal state
        for _ in range(num_steps):
            state, _ = program.train_step(state, kept)
        jax.block_until_ready(state)

    def loop(num_steps: int, *, source: Iterator[Any]) -> None:
        nonlocal state, waited
        pending = None
        for _ in range(num_steps):
            begin = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - begin
            with jax.transfer_guard("disallow"):
                state, metrics = program.train_step(state, batch)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
        jax.block_until_ready(state)

    runs = {
        "step alone": step_alone,
        "loop, one batch": functools.partial(loop, source=iter(lambda: kept, None)),
        "loop, real images": functools.partial(loop, source=batches),
    }
    for run in runs.values():
        run(PRIMED)
    begin = time.perf_counter()
    step_alone(PRIMED)
    num_steps = math.ceil(args.window_secs * PRIMED / (time.perf_counter() - begin))
    rates, waiting = {name: [] for name in runs}, []
    for _ in range(args.windows):
        for name, run in runs.items():
            waited, begin = 0.0, time.perf_counter()
            run(num_steps)
            secs = time.perf_counter() - begin
            rates[name].append(num_steps * args.batch_size / secs)
        waiting.append(waited / secs)  # of the last variant, with real images
    with jax.profiler.trace(folder / "trace"):
        runs["loop, one batch"](min(num_steps, MAX_TRACED))
    alone, fixed, real = rates.values()
    packages = ("jax", "flax", "optax", "grain", "Pillow")
    return before | {
        "arch": args.arch,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "num_compilations": program.train_step._cache_size(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "images_per_second": {name: summary(values) for name, values in rates.items()},
        "loop / step alone": summary([a / b for a, b in zip(fixed, alone, strict=True)]),
        "real / one batch": summary([a / b for a, b in zip(real, fixed, strict=True)]),
        "waiting": summary(waiting),
        "between steps": gap_share(folder / "trace", "jit_train_step"),
    }


def report(result: dict[str, Any]) -> str:
    """Returns the figures as text."""
    gap = result["between steps"]
    return "\n".join(
        [
            f"{result['device']}, {result['num_cpus']} CPUs, load {result['load_before']:.1f} "
            f"before; {result['arch']}, {result['image_size']} px, batch {result['batch_size']}, "
            f"{result['dtype']}",
            ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
            "",
            f"{'':28}{'images/s':>10}{'min - max':>22}",
            *(line(name, x, width=28) for name, x in result["images_per_second"].items()),
            *(
                line(name, result[name], width=28, digits=3)
                for name in ("loop / step alone", "real / one batch", "waiting")
            ),
            *([f"{'between two steps':28}{gap:>10.2%}"] if gap is not None else []),
            f"The step was compiled {result['num_compilations']} time(s); no implicit transfers.",
        ]
    )


def measure_in_folder(args: argparse.Namespace) -> dict[str, Any]:
    """As `measure`, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, Path(folder))


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arch", default="vit_ti4", help="network, as model.arch (default: vit_ti4)")
    add("--image_size", type=positive(int), default=32, help="height and width (default: 32)")
    add("--batch_size", type=positive(int), default=16, help="images in a step (default: 16)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    add("--threads", type=positive(int), default=8, help="data.num_threads (default: 8, as there)")
    add("--windows", type=positive(int), default=5, help="turns of each (default: 5)")
    add("--window_secs", type=positive(float), default=3.0, help="seconds a turn (default: 3)")
    run_command(parser, measure_in_folder, report)


if __name__ == "__main__":
    main()
