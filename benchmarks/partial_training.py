"""Measures the gain of training only a part of a network, and its bound.

    python -m benchmarks.partial_training --model=vit_s16 --image_size=224 --batch_size=8

Every way is the step of training (see `benchmarks.train_step`), compiled for the trained part:

  full           everything, for comparison
  half           the upper half of the layers and the head; the rest is frozen
  head           the head alone
  lora           LoRA of rank 8 next to the kernels of attention, and the head
  patch_dropout  everything, on half of the patches

The bound is the ratio of the multiply-adds of both steps, counted in the differentiated function: a
step of products alone would gain as much. All take turns, so that a machine that slows down affects
all of them. Memory is the compiler's figure for the peak of a step: its arguments, including the
state, and its temporaries.
"""

import argparse
import functools
import os
from typing import Any

import jax

from benchmarks import models
from benchmarks.figures import positive, run_command, summary
from benchmarks.train_step import (
    calls_per_window,
    chain,
    device_name,
    make_training,
    random_batch,
    random_variables,
)
from vitcls.errors import UserError
from vitcls.models import vit_config
from vitcls.step import adapt

WAYS = ("full", "half", "head", "lora", "patch_dropout")
LORA_RANK = 8


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns all figures, as `--json` writes them.

    Raises:
      UserError: The name is unknown.
    """
    config = models.arch_config(args.model, args.image_size)
    if not isinstance(config, vit_config.ViTConfig):
        raise UserError(f"--model={args.model}: LoRA and PatchDropout are of ViTs; name one.")
    load_before = os.getloadavg()[0]
    variables = random_variables(config)
    batch = jax.device_put(random_batch(config, args.batch_size))
    runs, found = {}, {}
    for way in WAYS:
        state, step = _training(way, config, args.dtype, variables)
        macs = models.macs_of(step, state, batch)
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        memory = compiled.memory_analysis()
        num_trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        found[way] = {
            "num_trained": num_trained,
            "gmacs": 1e-9 * macs,
            "peak_mb": 1e-6 * (memory.argument_size_in_bytes + memory.temp_size_in_bytes),
        }
        # A copy: the first call donates the state, and the ways share the frozen variables.
        state = jax.tree.map(lambda leaf: leaf.copy(), state)
        runs[way] = chain(
            functools.partial(lambda step, carry: step(carry[0], batch), compiled), (state, None)
        )
    num_calls = {way: calls_per_window(run, args.window_secs) for way, run in runs.items()}
    rates = {way: [] for way in WAYS}  # images per second, one number per window
    for _ in range(args.windows):
        for way, run in runs.items():
            rates[way].append(num_calls[way] * args.batch_size / run(num_calls[way]))
    full = found["full"]
    for way, figures in found.items():
        gains = [a / b for a, b in zip(rates[way], rates["full"], strict=True)]
        figures |= {
            "images_per_second": summary(rates[way]),
            "gain": summary(gains),
            "bound": full["gmacs"] / figures["gmacs"],
            "memory_share": figures["peak_mb"] / full["peak_mb"],
        }
        figures["share_of_bound"] = figures["gain"]["median"] / figures["bound"]
    return {
        "model": args.model,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": device_name(jax.devices()[0]),
        "load_before": load_before,
        "jax": jax.__version__,
        "ways": found,
    }


def _training(
    way: str, config: vit_config.ViTConfig, dtype: str, variables: Any
) -> tuple[Any, Any]:
    """Returns the initial state and the step of one way to train."""
    model, split = models.make_model(config, dtype), adapt.split
    if way == "half":
        layers = "|".join(map(str, range(config.depth // 2)))
        split = functools.partial(adapt.split, freeze=rf"embeddings/.*|encoder/layer_({layers})/.*")
    elif way == "head":
        split = functools.partial(adapt.split, train="head")
    elif way == "lora":
        split = _add_lora
    elif way == "patch_dropout":
        model = model.clone(patch_dropout_rate=0.5)
    return make_training(model, variables, split=split, has_lora=way == "lora")


def _add_lora(params: adapt.Params) -> tuple[adapt.Params, adapt.Params]:
    return adapt.add_lora(
        *adapt.split(params, train="head"),
        jax.random.key(0),
        rank=LORA_RANK,
        alpha=LORA_RANK,
        targets=r".*/attention/.*/kernel",
    )


def report(result: dict[str, Any]) -> str:
    """Returns the figures as a Markdown table."""
    lines = [
        f"{result['model']} at {result['image_size']} px, batch {result['batch_size']}, "
        f"{result['dtype']}, {result['device']}, load {result['load_before']:.1f} before, "
        f"jax {result['jax']}",
        "",
        "| way | trained parameters | images/s | gain | bound | gain / bound | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, figures in result["ways"].items():
        speed, gain = figures["images_per_second"], figures["gain"]
        lines.append(
            f"| {way} | {figures['num_trained']:,} "
            f"| {speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f}) "
            f"| {gain['median']:.2f} ({gain['min']:.2f} to {gain['max']:.2f}) "
            f"| {figures['bound']:.2f} | {figures['share_of_bound']:.2f} "
            f"| {figures['peak_mb']:.0f} MB ({figures['memory_share']:.0%}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="vit_s16", help=f"{', '.join(vit_config.EXAMPLES)} (default: vit_s16)")
    add("--image_size", type=positive(int), default=224, help="height and width (default: 224)")
    add("--batch_size", type=positive(int), default=8, help="images in a step (default: 8)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    add("--windows", type=positive(int), default=5, help="turns of each (default: 5)")
    add("--window_secs", type=positive(float), default=3.0, help="seconds a turn (default: 3)")
    run_command(parser, measure, report)


if __name__ == "__main__":
    main()
