"""Measures the loader of training images, compared with tf.data, torch's DataLoader and limits.

    python -m benchmarks.input_pipeline --resample=bilinear

Random JPEG files like ImageNet's (203 000 pixels, 109 kB on average) are written to a temporary
folder. Ours reads them as training does, from `folder:` through the loader: decode, random crop,
scale, uint8. It reads again from decoded images, in the folder of `data.cache`. The limits are
decoding alone, and crop and scaling alone of decoded images, in one thread per core. All take
turns; batches that are ready at the start of a turn do not count.

By default tf scales from the four nearest pixels only. Ours, torchvision and `tf.data_smoothed`
smooth before, so that a scaled image has no aliases. That is more work.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import math
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import jpegs
from benchmarks.figures import host, line, num_cpus, positive, run_command, summary
from benchmarks.input_peer import pull
from benchmarks.peer_process import start_process
from vitcls.data import cache, images, loader, sources

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
BATCH_SIZE = 32
NUM_AHEAD = 12  # batches that a loader prepares at most
PEERS = {  # name -> function of `benchmarks.input_peer`, and its other arguments
    "tf.data": ("start_tf", {"antialias": False}),
    "tf.data_smoothed": ("start_tf", {"antialias": True}),
    "DataLoader": ("start_torch", {"num_workers": num_cpus()}),
}

Run = Callable[[int], float]  # number of images, about -> images per second


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns all figures, as `--json` writes them; the files go to `folder`."""
    before = host()
    jpegs.make_folder(folder / "jpegs", args.images, scale=args.scale)
    paths = sorted(map(str, (folder / "jpegs").rglob("*.jpg")))
    split = sources.open_split(f"folder:{folder / 'jpegs'}", "train")
    decoded = cache.cached(split, str(folder))
    decoded.fill_cache(num_threads=num_cpus())
    load = functools.partial(ours, resample=args.resample, num_threads=args.threads)
    runs, peers = {"ours": load(split)}, {}
    for name in args.peers:
        call, (function, more) = start_process("benchmarks.input_peer"), PEERS[name]
        peers[name] = call(
            function, paths, batch_size=BATCH_SIZE, size=SIZE, scale=SCALE, ratio=RATIO, **more
        )
        runs[name] = _batched(functools.partial(call, "run"))
    runs["cache"] = load(decoded)
    pool = concurrent.futures.ThreadPoolExecutor(num_cpus())
    files = [Path(path).read_bytes() for path in paths]
    runs["decode alone"] = alone(pool, lambda number: images.decode(files[number]), len(files))
    upright = [images.decode(data) for data in files]
    crop = transform(args.resample)
    runs["crop and scale alone"] = alone(
        pool, lambda number: crop(upright[number], np.random.default_rng(number)), len(files)
    )

    speeds = {name: run(BATCH_SIZE * 2) for name, run in runs.items()}
    rates = {name: [] for name in runs}
    for _ in range(args.windows):
        for name, run in runs.items():
            rates[name].append(run(math.ceil(speeds[name] * args.window_secs)))
    limits = [np.array(rates[name]) for name in ("decode alone", "crop and scale alone")]
    rates["both, one after the other"] = (1 / sum(1 / limit for limit in limits)).tolist()
    return before | {
        "resample": args.resample,
        "num_threads": args.threads,
        "mean_pixels": float(np.mean([np.prod(image.size) for image in upright])),
        "mean_bytes": float(np.mean([len(data) for data in files])),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("Pillow", "grain", "numpy")}
        | {k: version for peer in peers.values() for k, version in peer["versions"].items()},
        "peers": peers,
        "images_per_second": {name: summary(values) for name, values in rates.items()},
        "ratios": {
            name: summary([a / b for a, b in zip(rates["ours"], rates[name], strict=True)])
            for name in (*peers, "both, one after the other")
        },
    }


def ours(split: sources.Split, *, resample: str, num_threads: int) -> Run:
    """Returns a function that measures the loader on a split, as in an endless run."""
    batches = loader.train_batches(
        split, global_batch_size=BATCH_SIZE, start_step=0, total_steps=10**9, seed=0,
        transform=transform(resample), num_threads=num_threads,
    )  # fmt: skip
    return _batched(functools.partial(pull, batches))


def transform(resample: str) -> Callable:
    """Returns the default training transform of the host."""
    return functools.partial(
        images.random_resized_crop,
        size=(SIZE, SIZE), scale=SCALE, ratio=RATIO, resample=resample,
    )  # fmt: skip


def _batched(pull_batches: Callable[[int, int], float]) -> Run:
    def run(num_images: int) -> float:
        num_batches = math.ceil(num_images / BATCH_SIZE)
        return num_batches * BATCH_SIZE / pull_batches(num_batches, NUM_AHEAD)

    return run


def alone(pool: concurrent.futures.Executor, work: Callable[[int], Any], num_items: int) -> Run:
    """Returns a function that measures `work(number)` for all numbers, in all threads."""

    def run(num_images: int) -> float:
        begin = time.perf_counter()
        num_chunks = math.ceil(num_images / BATCH_SIZE)
        list(pool.map(chunk, range(num_chunks)))
        return num_chunks * BATCH_SIZE / (time.perf_counter() - begin)

    def chunk(number: int) -> None:
        for row in range(BATCH_SIZE):
            work((number * BATCH_SIZE + row) % num_items)

    return run


def report(result: dict[str, Any]) -> str:
    """Returns the figures as text."""
    lines = [
        f"{result['device']}, {result['num_cpus']} CPUs, load {result['load_before']:.1f} before",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"JPEG files of {result['mean_pixels']:.0f} pixels, {result['mean_bytes'] / 1e3:.0f} kB; "
        f"{SIZE} px, {result['resample']}, {result['num_threads']} threads of ours",
        "",
        f"{'':44}{'images/s':>10}{'min - max':>22}{'ours / it':>12}",
    ]
    for name, figures in result["images_per_second"].items():
        label = result["peers"].get(name, {}).get("variant", name)
        ratio = result["ratios"].get(name)
        beside = f"{ratio['median']:12.2f}" if ratio else ""
        lines.append(line(label, figures, width=44, digits=0) + beside)
    return "\n".join(lines)


def measure_in_folder(args: argparse.Namespace) -> dict[str, Any]:
    """As `measure`, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, Path(folder))


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=positive(int), default=192, help="files to make (default: 192)")
    add(
        "--scale", type=positive(float), default=1.0,
        help="factor of the files' sides, for large originals (default: 1)",
    )  # fmt: skip
    add(
        "--resample", choices=sorted(images.RESAMPLING), default="bilinear",
        help="filter of ours: in a run that of the checkpoint's processor (default: bilinear)",
    )  # fmt: skip
    add("--threads", type=positive(int), default=8, help="data.num_threads (default: 8, as there)")
    add(
        "--peers", nargs="*", choices=list(PEERS), default=list(PEERS),
        help=f"libraries to compare with (default: {' '.join(PEERS)})",
    )  # fmt: skip
    add("--windows", type=positive(int), default=5, help="turns of each (default: 5)")
    add("--window_secs", type=positive(float), default=3.0, help="seconds a turn (default: 3)")
    run_command(parser, measure_in_folder, report)


if __name__ == "__main__":
    main()
