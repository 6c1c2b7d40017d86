"""Computing a layer again in the backward pass instead of keeping what it computed.

Chen et al. 2016, arXiv:1604.06174.
"""

from typing import Any

import flax.linen as nn
import jax


def _is_product(primitive: Any, *args: Any, **params: Any) -> bool:
    # Without batch dimensions: weights times activations, but not attention's N x N scores.
    is_dot = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return is_dot or primitive is jax.lax.conv_general_dilated_p


# What each policy keeps besides a layer's input.
POLICIES = {"dots": _is_product, "full": jax.checkpoint_policies.nothing_saveable}


def call_layer(layer: nn.Module, *args: Any, remat: str, **static: Any) -> Any:
    """Returns `layer(*args, **static)`, keeping for the backward pass what `remat` says.

    Args:
      layer: The module.
      *args: Arrays, or None.
      remat: "none" to keep everything, or a key of `POLICIES`.
      **static: What is not an array.
    """
    if remat == "none":
        return layer(*args, **static)

    def apply(layer, *args):
        return layer(*args, **static)

    return nn.remat(apply, policy=POLICIES[remat])(layer, *args)
