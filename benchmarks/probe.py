"""Measures many linear probes as one program, and the gain of kept features.

    python -m benchmarks.probe --examples=5000 --dim=384 --classes=10
    python -m benchmarks.probe --model=vit_s16 --image_size=224

The sweep is `heads.fit_probes`: learning rates x weight decays x seeds on random features. It is
compared with the same trials one by one, each a call of the same function compiled for one trial.
As a familiar measure it is also compared with one fit of scikit-learn's LogisticRegression. The
limit is the longer of two times: that of the trials' products at the rate of the fastest large
product, and that of reading and writing heads and momenta in every step at the rate of a copy. All
take turns. Compilation is reported separately. Before the turns, every head of the sweep is
compared with the head that was trained alone.

With --model the cost of a head over --probe_epochs is measured instead: trained through the frozen
network by the training step, or on features that are computed once. Images are random, and neither
includes decoding. One device is used.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import os
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import num_cpus, positive, run_command, summary
from benchmarks.models import arch_config, make_model
from benchmarks.train_step import (
    COPY_SIZE,
    calls_per_window,
    chain,
    device_name,
    make_training,
    random_batch,
    random_variables,
)
from vitcls.augment import prepare
from vitcls.probe import heads
from vitcls.step import adapt

PAIRS = list(itertools.product(np.geomspace(1e-4, 1.0, 10), (0.0, 1e-4, 1e-3, 1e-2)))
SEEDS = range(5)
NUM_TRIALS = len(PAIRS) * len(SEEDS)
# Limit on the difference between heads, relative to the largest entry: sums differ in order.
TOLERANCE = 1e-3
GOAL = 90  # factor that kept features should save over 100 epochs


def measure_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Returns all figures of the sweep, as `--json` writes them.

    Raises:
      ArithmeticError: A head of the sweep differs from that of the trial alone.
    """
    features, labels = random_features(args.examples, args.dim, args.classes)
    options = dict(
        num_classes=args.classes, num_epochs=args.epochs, batch_size=args.batch_size
    )  # fmt: skip
    lrs, weight_decays = jnp.array(PAIRS, jnp.float32).T
    seeds = jnp.array(SEEDS)
    begin = time.perf_counter()
    sweep = heads.fit_probes.lower(
        features, labels, seeds, lrs, weight_decays, at_once=len(PAIRS), **options
    ).compile()
    compile_secs = time.perf_counter() - begin
    one = jax.jit(functools.partial(heads.fit_probe, **options))
    one = one.lower(features, labels, seeds[0], lrs[0], weight_decays[0]).compile()
    trials = [(seed, *pair) for seed in seeds for pair in zip(lrs, weight_decays, strict=True)]

    def separate(_):
        return [one(features, labels, *trial) for trial in trials]

    difference = check_heads(sweep(features, labels, seeds, lrs, weight_decays), separate(None))
    matmul_size = 2048 if jax.default_backend() == "cpu" else 8192
    x, kernel = (
        jax.random.normal(key, (matmul_size,) * 2) for key in jax.random.split(jax.random.key(0))
    )
    kernel = jnp.linalg.qr(kernel)[0]  # repeated products keep their scale
    runs = {
        "ours": chain(lambda _: sweep(features, labels, seeds, lrs, weight_decays), None),
        "separate": chain(separate, None),
        "matmul": chain(functools.partial(jax.jit(jnp.matmul), kernel), x),
        "copy": chain(jax.jit(jnp.negative, donate_argnums=0), jnp.ones(COPY_SIZE)),
    }
    if args.peer == "sklearn":
        runs["sklearn"] = sklearn_run(np.asarray(features), np.asarray(labels))
    rates = in_turns(runs, args)

    num_batches = -(-args.examples // args.batch_size)
    num_rows = args.examples // num_batches * num_batches * args.epochs
    gflop = 4e-9 * num_rows * args.dim * args.classes * NUM_TRIALS
    gbyte = 16e-9 * num_batches * args.epochs * args.dim * args.classes * NUM_TRIALS
    tflops = summary(rates["matmul"], 2e-12 * matmul_size**3)
    gb_per_second = summary(rates["copy"], 8e-9 * COPY_SIZE)
    limit = max(1e-3 * gflop / tflops["median"], gbyte / gb_per_second["median"])
    seconds = {
        name: summary([1 / rate for rate in rates[name]])
        for name in ("ours", "separate", "sklearn")
        if name in rates
    }
    return environment(args) | {
        "examples": args.examples, "dim": args.dim, "classes": args.classes,
        "epochs": args.epochs, "batch_size": args.batch_size, "trials": NUM_TRIALS,
        "gflop": gflop, "compile_secs": compile_secs, "largest_difference": difference,
        "seconds": seconds,
        "ratio": summary([a / b for a, b in zip(rates["ours"], rates["separate"], strict=True)]),
        "limit": {"seconds": limit, "tflops": tflops, "copy_gb_per_second": gb_per_second},
        "share_of_limit": limit / seconds["ours"]["median"],
    }  # fmt: skip


def random_features(num: int, dim: int, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Returns standardised features (N, D) of overlapping classes, and their labels (N,)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num).astype(np.int32)
    values = rng.normal(size=(num_classes, dim))[labels] + 2 * rng.normal(size=(num, dim))
    return jnp.array(heads.scaling_of(values)(values), jnp.float32), jnp.array(labels)


def check_heads(stacked: heads.Linear, alone: list[heads.Linear]) -> float:
    """Returns the largest difference of a kernel's entry, relative to the largest entry.

    Raises:
      ArithmeticError: The difference exceeds rounding.
    """
    expected = np.stack([head.kernel for head in alone])
    found = np.asarray(stacked.kernel).reshape(expected.shape)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:  # also for a NaN
        raise ArithmeticError(
            f"A head of the sweep is {difference:.1e} away from the one trained alone, more than "
            f"{TOLERANCE:.0e}."
        )
    return difference


def sklearn_run(features: np.ndarray, labels: np.ndarray):
    """Returns a function that fits several times, to convergence, with a weight decay of 1e-3."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / (1e-3 * len(labels)), max_iter=1000)

    def run(num_calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(num_calls):
            model.fit(features, labels)
        return time.perf_counter() - begin

    return run


def measure_cached(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the cost of a head through the frozen network and on kept features."""
    config = arch_config(args.model, args.image_size)
    variables = random_variables(config)
    split = functools.partial(adapt.split, train="head")
    bare = make_model(dataclasses.replace(config, num_classes=0), "float32")
    # A copy: the step donates its state, which has the variables themselves.
    backbone = jax.tree.map(jnp.copy, variables | {"params": split(variables["params"])[1]})
    state, train_step = make_training(make_model(config, "float32"), variables, split=split)
    train_step = jax.jit(train_step, donate_argnums=0)
    batch = jax.device_put(random_batch(config, args.image_batch_size))
    normalise = functools.partial(
        prepare.normalise, rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    extract = jax.jit(
        lambda variables, images: bare.apply(variables, normalise(images), train=False)
    )
    dim = extract(backbone, batch["image"]).shape[1]
    features, labels = random_features(args.examples, dim, config.num_classes)
    fit = jax.jit(
        functools.partial(
            heads.fit_probe, num_classes=config.num_classes, num_epochs=args.probe_epochs,
            batch_size=args.batch_size,
        )
    )  # fmt: skip
    rates = in_turns(
        {
            "head_only": chain(lambda carry: train_step(carry[0], batch), (state, None)),
            "extract": chain(lambda _: extract(backbone, batch["image"]), None),
            "probe": chain(lambda _: fit(features, labels, 0, 0.1, 1e-4), None),
        },
        args,
    )
    batches = args.examples / args.image_batch_size
    head_only_secs = [args.probe_epochs * batches / rate for rate in rates["head_only"]]
    extract_secs = [batches / rate for rate in rates["extract"]]
    probe_secs = [1 / rate for rate in rates["probe"]]
    parts = zip(head_only_secs, extract_secs, probe_secs, strict=True)
    return environment(args) | {
        "model": args.model, "image_size": args.image_size, "examples": args.examples,
        "image_batch_size": args.image_batch_size, "probe_epochs": args.probe_epochs,
        "classes": config.num_classes,
        "seconds": {
            "head_only": summary(head_only_secs),
            "extract": summary(extract_secs),
            "probe": summary(probe_secs),
        },
        "gain": summary([whole / (once + probe) for whole, once, probe in parts]),
    }  # fmt: skip


def in_turns(runs: dict[str, Any], args: argparse.Namespace) -> dict[str, list[float]]:
    """Returns calls per second of `--clock`, one number per window; all take turns."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    num_calls = {name: calls_per_window(run, args.window_secs) for name, run in runs.items()}
    rates = {name: [] for name in runs}
    for _ in range(args.windows):
        for name, run in runs.items():
            begin = clock()
            run(num_calls[name])
            rates[name].append(num_calls[name] / (clock() - begin))
    return rates


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the machine, the versions and the clock."""
    return {
        "clock": args.clock,
        "device": device_name(jax.devices()[0]),
        "num_cpus": num_cpus(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")},
    }


def report(result: dict[str, Any]) -> str:
    """Returns the figures as text."""

    def spread(figures: dict[str, Any], form: str = ".3g") -> str:
        low, high = format(figures["min"], form), format(figures["max"], form)
        return f"{format(figures['median'], form)} ({low} to {high})"

    lines = [
        f"{result['device']}, {result['num_cpus']} CPUs, load {result['load']:.1f}, "
        f"{result['clock']} clock"
    ]
    seconds = result["seconds"]
    if "gain" in result:
        epochs = result["probe_epochs"]
        return "\n".join([
            *lines,
            f"{result['model']} at {result['image_size']} px, {result['examples']} images, "
            f"{result['classes']} classes, {epochs} epochs, seconds:",
            f"head through the frozen network  {spread(seconds['head_only'])}",
            f"features, once                   {spread(seconds['extract'])}",
            f"probe on them                    {spread(seconds['probe'])}",
            f"gain: {spread(result['gain'])}; {result['gain']['median'] / GOAL:.2f} of {GOAL}",
        ])  # fmt: skip
    limit = result["limit"]
    lines += [
        "{trials} trials of {epochs} epochs, {examples} examples of {dim} features, {classes} "
        "classes, batches of at most {batch_size}: {gflop:.1f} GFLOP".format(**result),
        f"one program        {spread(seconds['ours'])} s",
        f"separate trials    {spread(seconds['separate'])} s",
        f"limit              {limit['seconds']:.3g} s; one program is at "
        f"{result['share_of_limit']:.0%} of it",
        f"separate / one program: {spread(result['ratio'])}",
        f"product {limit['tflops']['median']:.3f} TFLOP/s, copy "
        f"{limit['copy_gb_per_second']['median']:.1f} GB/s, compilation "
        f"{result['compile_secs']:.1f} s, largest difference {result['largest_difference']:.1e}",
    ]
    if "sklearn" in seconds:
        lines.append(f"scikit-learn's LogisticRegression, one fit: {spread(seconds['sklearn'])} s")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one of the two, as `--json` writes them."""
    return measure_cached(args) if args.model else measure_sweep(args)


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, positive(int)
    add("--examples", type=count, default=5000, help="(default: 5000)")
    add("--dim", type=count, default=384, help="features of an example (default: 384)")
    add("--classes", type=count, default=10, help="of the sweep (default: 10)")
    add("--epochs", type=count, default=4, help="of the sweep (default: 4)")
    add("--batch_size", type=count, default=256, help="of a probe, at most (default: 256)")
    add("--peer", choices=("sklearn", "none"), default="sklearn", help="(default: sklearn)")
    add("--model", help="measure what kept features of this network save, such as vit_s16")
    add("--image_size", type=count, default=224, help="height and width (default: 224)")
    add("--image_batch_size", type=count, default=16, help="images in a step (default: 16)")
    add("--probe_epochs", type=count, default=100, help="with --model (default: 100)")
    add("--windows", type=count, default=5, help="turns of each (default: 5)")
    add("--window_secs", type=positive(float), default=3.0, help="seconds a turn (default: 3)")
    add(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: CPU seconds, for a machine that is shared with other work; start it on "
        "one core then, with taskset -c 0 (default: wall)",
    )  # fmt: skip
    run_command(parser, measure, report)


if __name__ == "__main__":
    main()
