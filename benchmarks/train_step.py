"""Measures a training step, compared with a peer doing the same work and the machine's limit.

    python -m benchmarks.train_step --model=vit_b16 --image_size=224 --batch_size=8

Ours is the step of training: uint8 images on the device, flip, normalisation, network and AdamW,
compiled once with a donated state. The peer is the same in PyTorch or Flax. The limit is the speed
of a step that has nothing but its products, at the rate of the faster library's large products in
the same dtype. All take turns, so that a machine that slows down affects all of them. Compilation
is reported separately. Before the turns, the loss and the norm of the gradient of our first step
are compared with those in float32 at the highest precision; a difference beyond rounding is an
error.

One device is used. Ours needs jax, flax, optax and numpy; the peer also needs torch, and
transformers or timm. The Flax networks of transformers, on a CPU, need the environment of
benchmarks.make_peers.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import make_peers
from benchmarks.figures import num_cpus, positive, processor_name, run_command, summary
from benchmarks.models import NAMES, Config, arch_config, macs, make_model, published
from benchmarks.peer_process import start_process
from vitcls.augment import prepare
from vitcls.errors import UserError
from vitcls.models.attention import KERNELS, check_cudnn
from vitcls.step import adapt, optim
from vitcls.step import train_step as steps

# At this rate random labels are not learnt during the measurement. Otherwise gradients would vanish
# and become denormal numbers, which some CPUs compute slowly.
LR, WEIGHT_DECAY = 1e-5, 0.05
COPY_SIZE = 2**27  # float32 numbers: 512 MiB, beyond every cache
# Allowed relative distance of loss and gradient from the reference, in unit roundoffs. Independent
# errors of L layers add up to about sqrt(L): ResNet-50's gradient differs by 4 in bfloat16.
TOLERANCE = 8

Run = Callable[[int], float]  # number of calls -> their seconds


def measure(
    args: argparse.Namespace, make_ours: Callable[..., Any], *, is_training: bool
) -> dict[str, Any]:
    """Returns all figures, as `--json` writes them.

    Args:
      args: Arguments of the command line.
      make_ours: See `make_ours`.
      is_training: Whether its step trains; otherwise peer and limit are those of a forward pass.

    Raises:
      UserError: An argument does not fit, or the peer is not installed.
      ArithmeticError: Our numbers differ from the reference.
    """
    config = arch_config(args.model, args.image_size)
    load_before = os.getloadavg()[0]
    device = jax.devices()[0]
    if args.attention == "cudnn":
        check_cudnn(device, args.dtype)
    matmul_size = 2048 if device.platform == "cpu" else 8192

    runs = {}
    (call, library), peer = start_peer(args.peer, device.platform), None
    if call:  # first: a missing package is found at once
        peer = call(
            "start", library, dataclasses.asdict(config), dtype=args.dtype, lr=LR,
            device="cpu" if device.platform == "cpu" else "cuda", batch_size=args.batch_size,
            weight_decay=WEIGHT_DECAY, matmul_size=matmul_size,
            **({} if is_training else {"is_training": False}),
        )  # fmt: skip
        runs["peer"] = functools.partial(call, "run", "step")
        runs["peer_matmul"] = functools.partial(call, "run", "matmul")
    runs["ours"], ours = make_ours(
        config, dtype=args.dtype, batch_size=args.batch_size, attention=args.attention
    )
    if peer and peer["num_params"] != ours["num_params"]:
        raise UserError(
            f"--model={args.model} has {peer['num_params']} parameters in {library}, "
            f"{ours['num_params']} here: not the same network; use another --peer, or none."
        )
    keys = jax.random.split(jax.random.key(0))
    x, kernel = (jax.random.normal(key, (matmul_size,) * 2) for key in keys)
    # Orthogonal, so that thousands of products keep their scale.
    x, kernel = x.astype(args.dtype), jnp.linalg.qr(kernel)[0].astype(args.dtype)
    runs["matmul"] = chain(functools.partial(jax.jit(jnp.matmul), kernel), x)
    runs["copy"] = chain(jax.jit(jnp.negative, donate_argnums=0), jnp.ones(COPY_SIZE))

    num_calls = {name: calls_per_window(run, args.window_secs) for name, run in runs.items()}
    rates = {name: [] for name in runs}  # calls per second, one number per window
    for _ in range(args.windows):
        for name, run in runs.items():
            rates[name].append(num_calls[name] / run(num_calls[name]))

    gflop_per_mac = 6e-9 if is_training else 2e-9
    gflop = gflop_per_mac * macs(published(config))
    matmul_tflops = {
        name: summary(rates[name], 2e-12 * matmul_size**3)
        for name in ("matmul", "peer_matmul") if name in rates
    }  # fmt: skip
    limit = max(figures["median"] for figures in matmul_tflops.values()) * 1e3 / gflop
    for name, figures in (("ours", ours), ("peer", peer)):
        if figures:
            images_per_second = summary(rates[name], args.batch_size)
            figures |= {
                "images_per_second": images_per_second,
                "step_ms": 1e3 * args.batch_size / images_per_second["median"],
                "tflops": 1e-3 * gflop * images_per_second["median"],
                "share_of_limit": images_per_second["median"] / limit,
            }
    own_packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "model": args.model,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "attention": args.attention,
        "device": device_name(device),
        "num_cpus": num_cpus(),
        "load_before": load_before,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in own_packages},
        "gflop_per_image": gflop,
        "gflop_per_image_of_ours": gflop_per_mac * macs(config),
        "ours": ours,
        "peer": peer,
        "ratio": peer
        and summary([a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)]),
        "limit": {
            "images_per_second": limit,
            "tflops": matmul_tflops,
            "copy_gb_per_second": summary(rates["copy"], 8e-9 * COPY_SIZE),
        },
    }


def make_ours(
    config: Config, *, dtype: str, batch_size: int, attention: str
) -> tuple[Run, dict[str, Any]]:
    """Compiles our step, checks its numbers, and returns it with its entries of the report.

    Raises:
      ArithmeticError: See `check_numerics`.
    """
    model = make_model(config, dtype, attention=attention)
    variables = random_variables(config)
    state, train_step = make_training(model, variables)
    batch = jax.device_put(random_batch(config, batch_size))
    with jax.default_matmul_precision("highest"):
        _, reference = make_training(make_model(config, "float32"), variables)
        expected = jax.jit(lambda *args: reference(*args)[1])(state, batch)
    begin = time.perf_counter()
    compiled = jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()
    compile_secs = time.perf_counter() - begin
    num_params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    state, found = compiled(state, batch)
    return chain(lambda carry: compiled(carry[0], batch), (state, found)), {
        "num_params": num_params,
        "compile_secs": compile_secs,
        "numerics": check_numerics(found, expected, dtype),
    }


def random_variables(config: Config) -> Any:
    """Returns random variables of a network, with a random head.

    With the zero head of fine-tuning every network's first loss would be ln K.
    """
    key, zeros = jax.random.key(0), jnp.zeros((1, *config.image_size, 3))
    init = functools.partial(make_model(config, "float32").init, train=False)
    variables = jax.jit(init)(key, zeros)
    head = variables["params"]["classifier"]
    head["kernel"] = jax.random.normal(key, head["kernel"].shape) * len(head["kernel"]) ** -0.5
    return variables


def make_training(
    model: nn.Module,
    variables: Any,
    *,
    split: Callable[[Any], tuple[Any, Any]] = adapt.split,
    has_lora: bool = False,
) -> tuple[steps.TrainState, Callable[..., Any]]:
    """Returns the initial state and the step of a run: flip, normalisation, network, AdamW.

    Args:
      model: The network.
      variables: Its variables.
      split: Parameters -> (trained, frozen).
      has_lora: Whether they include LoRA's factors.
    """
    schedule = optim.make_schedule("constant", lr=LR, warmup_steps=0, total_steps=1)
    tx = optim.make_optimizer(
        "adamw", schedule, params=split(variables["params"])[0], weight_decay=WEIGHT_DECAY,
        decay=".*/kernel", clip_norm=0.0, args={},
    )  # fmt: skip
    normalise = functools.partial(
        prepare.normalise, rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    apply = adapt.with_lora(model.apply) if has_lora else model.apply
    train_step = steps.make_train_step(
        prepare.make_prepare(normalise, flip=True, label_smoothing=0.0),
        steps.make_loss_fn(apply, may_skip=False),
        tx,
        key=jax.random.key(0),
        schedule=schedule,
        ema_decay=0.0,
    )
    init_state = functools.partial(steps.init_state, tx=tx, use_ema=False, split=split)
    return jax.jit(init_state)(variables), train_step


def random_batch(config: Config, batch_size: int) -> dict[str, np.ndarray]:
    """Returns a batch as the data loader makes it, with random pixels and labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, config.num_classes, batch_size)
    return {
        "image": rng.integers(0, 256, (batch_size, *config.image_size, 3), np.uint8),
        "targets": np.eye(config.num_classes, dtype=np.float32)[labels],
        "mask": np.ones(batch_size, np.float32),
    }


def check_numerics(
    found: dict[str, jax.Array], expected: dict[str, jax.Array], dtype: str
) -> dict[str, Any]:
    """Returns the loss and the norm of the gradient, and their relative differences.

    Raises:
      ArithmeticError: A difference exceeds `TOLERANCE` unit roundoffs of the products.
    """
    tolerance, numerics = relative_tolerance(dtype), {}
    for name in ("loss", "grad_norm"):
        value, reference = float(found[name]), float(expected[name])
        difference = abs(value - reference) / abs(reference)
        numerics[name] = {
            "value": value, "reference": reference, "difference": difference,
            "tolerance": tolerance,
        }  # fmt: skip
        if not difference <= tolerance:  # also for a NaN
            raise ArithmeticError(
                f"The first step's {name} is {value} in {dtype}, but {reference} in float32 at the "
                f"highest precision: a relative difference of {difference:.1e}, more than the "
                f"{tolerance:.1e} that rounding explains."
            )
    return numerics


def relative_tolerance(dtype: str) -> float:
    """Returns the largest relative difference that rounding in `dtype` explains."""
    # By default GPUs multiply float32 as TF32, TPUs as bfloat16.
    of_float32 = {"cpu": 2.0**-24, "gpu": 2.0**-11, "tpu": 2.0**-8}[jax.default_backend()]
    return TOLERANCE * (2.0**-8 if dtype == "bfloat16" else of_float32)


def chain(call: Callable[[Any], Any], carry: Any) -> Run:
    """Returns a function that repeats `carry = call(carry)` and waits for the last result."""

    def run(num_calls):
        nonlocal carry
        begin = time.perf_counter()
        for _ in range(num_calls):
            carry = call(carry)
        jax.block_until_ready(carry)
        return time.perf_counter() - begin

    return run


def calls_per_window(run: Run, window_secs: float) -> int:
    """Returns the number of calls in about `window_secs` seconds, after a first call compiled."""
    run(1)
    num_calls = 1
    while (secs := run(num_calls)) < window_secs / 4:
        num_calls *= 2
    return math.ceil(num_calls * window_secs / secs)


def start_peer(peer: str, platform: str) -> tuple[Callable[..., Any] | None, str | None]:
    """Starts the process of a peer; returns its caller, and the library of its network.

    Raises:
      UserError: Its environment does not exist, or it does not support this platform.
    """
    if peer == "auto":
        has_timm = platform == "gpu" and importlib.util.find_spec("timm")
        peer = "none" if platform == "tpu" else "timm" if has_timm else "torch"
    if peer == "none":
        return None, None
    if peer != "flax":
        return start_process("benchmarks.torch_peer"), {"torch": "transformers"}.get(peer, peer)
    if platform != "cpu":
        raise UserError("--peer=flax is measured on a CPU only: set JAX_PLATFORMS=cpu.")
    if not make_peers.PYTHON.exists():
        raise UserError(
            "--peer=flax needs an environment of its own, which this makes once: "
            "python -m benchmarks.make_peers"
        )
    return start_process("benchmarks.flax_peer", python=make_peers.PYTHON), "transformers"


def device_name(device: jax.Device) -> str:
    """Returns the product name of the device; JAX calls every CPU "cpu"."""
    return (device.platform == "cpu" and processor_name()) or device.device_kind


def report(result: dict[str, Any]) -> str:
    """Returns the figures as text."""
    ours, peer, limit = result["ours"], result["peer"], result["limit"]
    versions = result["versions"] | (peer["versions"] if peer else {})
    lines = [
        f"{result['model']} at {result['image_size']} px, batch {result['batch_size']}, "
        f"{result['dtype']}: {ours['num_params'] / 1e6:.1f} M parameters, "
        f"{result['gflop_per_image']:.1f} GFLOP an image (ours computes "
        f"{result['gflop_per_image_of_ours']:.1f})",
        f"{result['device']}, {result['num_cpus']} CPUs, load {result['load_before']:.1f} before",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        f"{'':36}{'images/s':>10}{'min - max':>20}{'ms/step':>10}{'TFLOP/s':>10}{'of limit':>10}",
    ]
    for name, figures in (("ours", ours), ("peer", peer)):
        if figures:
            speed = figures["images_per_second"]
            spread = f"{speed['min']:.2f} - {speed['max']:.2f}"
            name = name if figures is ours else f"{peer['library']}, {peer['variant']}"
            lines.append(
                f"{name:36}{speed['median']:10.2f}{spread:>20}{figures['step_ms']:10.1f}"
                f"{figures['tflops']:10.3f}{figures['share_of_limit']:10.1%}"
            )
    tflops = limit["images_per_second"] * result["gflop_per_image"] * 1e-3
    lines += [
        f"{'limit: products only':36}{limit['images_per_second']:10.2f}{'':30}{tflops:10.3f}",
        "",
    ]
    if peer:
        ratio = result["ratio"]
        lines.append(
            f"ours / peer: {ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f} over "
            f"{len(ratio['windows'])} turns)"
        )
    products = ", ".join(
        f"{name} {figures['median']:.3f} TFLOP/s" for name, figures in limit["tflops"].items()
    )
    lines += [
        f"product of matrices: {products}; copy {limit['copy_gb_per_second']['median']:.1f} GB/s",
        f"compilation: ours {ours['compile_secs']:.1f} s"
        + (f", first step of the peer {peer['warm_up_secs']:.1f} s" if peer else ""),
    ]
    for name, numbers in ours["numerics"].items():
        lines.append(
            "first {name}: {value:.6g}, float32 reference {reference:.6g}, relative "
            "difference {difference:.1e}".format(name=name, **numbers)
        )
    return "\n".join(lines)


def run_step_command(
    name: str, description: str, make_ours: Callable[..., Any], *, is_training: bool
) -> None:
    """Reads the command line, measures, prints: the command `benchmarks.NAME`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="vit_b16", help=f"{', '.join(NAMES)} (default: vit_b16)")
    add("--image_size", type=positive(int), default=224, help="height and width (default: 224)")
    add("--batch_size", type=positive(int), default=8, help="images in a step (default: 8)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    add(
        "--attention", choices=KERNELS, default="xla",
        help="attention of ours, as model.attention (default: xla)",
    )  # fmt: skip
    add(
        "--peer", default="auto",
        choices=("auto", "torch", "timm", "none", *(["flax"] if is_training else [])),
        help="torch: the network of transformers in PyTorch; flax: in Flax, training only, see "
        "benchmarks.make_peers; timm: timm's; auto: timm on a GPU if it is installed, otherwise "
        "torch (default: auto)",
    )  # fmt: skip
    add("--windows", type=positive(int), default=5, help="turns of each (default: 5)")
    add("--window_secs", type=positive(float), default=3.0, help="seconds a turn (default: 3)")

    def measure_beside_peer(args: argparse.Namespace) -> dict[str, Any]:
        if args.peer != "none":  # on a GPU the peer needs that memory; read at first use
            os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
        jax.config.update("jax_enable_compilation_cache", False)  # the time of compiling counts
        return measure(args, make_ours, is_training=is_training)

    run_command(parser, measure_beside_peer, report)


def main() -> None:
    """Measures the training step."""
    run_step_command("train_step", __doc__, make_ours, is_training=True)


if __name__ == "__main__":
    main()
