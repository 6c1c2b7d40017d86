"""Measures evaluation, compared with transformers' network in PyTorch and the limit.

    python -m benchmarks.forward --model=vit_b16 --batch_size=32

Ours is the step of evaluation: uint8 images on the device, normalisation, network, the sums of the
metrics, and logits. The peer is the network in PyTorch's inference mode, with its loss. The limit
is that of `benchmarks.train_step`, for the products of a forward pass. All take turns. Before that
our logits are compared with those in float32 at the highest precision.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.models import Config, make_model
from benchmarks.train_step import (
    Run,
    chain,
    random_batch,
    random_variables,
    relative_tolerance,
    run_step_command,
)
from vitcls.augment import prepare
from vitcls.step import eval_step


def make_ours(
    config: Config, *, dtype: str, batch_size: int, attention: str
) -> tuple[Run, dict[str, Any]]:
    """Compiles our evaluation step, checks its logits, returns it and its entries of the report.

    Raises:
      ArithmeticError: See `check_logits`.
    """
    variables = random_variables(config)
    batch = random_batch(config, batch_size)
    batch = jax.device_put(batch | {"index": jnp.arange(batch_size)})
    normalise = functools.partial(
        prepare.normalise, rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3
    )

    def make(dtype: str, **kwargs):
        return jax.jit(
            eval_step.make_eval_step(normalise, make_model(config, dtype, **kwargs).apply)
        )

    with jax.default_matmul_precision("highest"):
        expected = make("float32")(variables, batch)[1]["logits"]
    begin = time.perf_counter()
    compiled = make(dtype, attention=attention).lower(variables, batch).compile()
    compile_secs = time.perf_counter() - begin
    found = compiled(variables, batch)[1]["logits"]
    # The sums of each batch are fetched, as an evaluation does.
    return chain(lambda _: jax.device_get(compiled(variables, batch)[0]), None), {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "compile_secs": compile_secs,
        "numerics": {"logits' norm": check_logits(found, expected, dtype)},
    }


def check_logits(found: jax.Array, expected: jax.Array, dtype: str) -> dict[str, float]:
    """Returns the norms of the logits (B, K), and of their difference relative to the latter's.

    Raises:
      ArithmeticError: The difference exceeds rounding, see `relative_tolerance`.
    """
    norm = float(jnp.linalg.norm(expected))
    difference = float(jnp.linalg.norm(found - expected)) / norm
    tolerance = relative_tolerance(dtype)
    if not difference <= tolerance:  # also for a NaN
        raise ArithmeticError(
            f"The logits in {dtype} are {difference:.1e} away from those in float32 at the highest "
            f"precision, relatively, more than the {tolerance:.1e} that rounding explains."
        )
    value = float(jnp.linalg.norm(found))
    return {"value": value, "reference": norm, "difference": difference, "tolerance": tolerance}


def main() -> None:
    """Measures the evaluation step."""
    run_step_command("forward", __doc__, make_ours, is_training=False)


if __name__ == "__main__":
    main()
