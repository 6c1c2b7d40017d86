"""RandAugment and TrivialAugment: which operation of `pixels` each image gets, and how strong.

B batch, R rounds of one operation each.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from vitcls.augment import pixels

# (strength, from -1 to 1, and (height, width) of the images) -> the operation's value, all ().
Scale = Callable[[jax.Array, tuple[int, int]], jax.Array]


def _unused(s: jax.Array, size: tuple[int, int]) -> jax.Array:
    return jnp.zeros_like(s)


def _times(highest: float) -> Scale:
    return lambda s, size: highest * s


def _factor(spread: float) -> Scale:
    return lambda s, size: 1 + spread * s


# The operations of timm's "rand-...-inc1", all of which grow with the strength.
_RANDAUGMENT: Mapping[str, Scale] = {
    "autocontrast": _unused,
    "equalize": _unused,
    "invert": _unused,
    "rotate": _times(30),
    # timm keeps no bit at full strength, that is a black image.
    "posterize": lambda s, size: jnp.maximum(4 - jnp.floor(4 * jnp.abs(s)), 1),
    "solarize": lambda s, size: 256 - jnp.floor(256 * jnp.abs(s)),
    "solarize_add": lambda s, size: jnp.floor(110 * jnp.abs(s)),
    "color": _factor(0.9),
    "contrast": _factor(0.9),
    "brightness": _factor(0.9),
    "sharpness": _factor(0.9),
    "shear_x": _times(0.3),
    "shear_y": _times(0.3),
    "translate_x": lambda s, size: 0.45 * size[1] * s,
    "translate_y": lambda s, size: 0.45 * size[0] * s,
}
_ACTIVE = 0.5  # share of the rounds that change the image
_MAGNITUDE_STD = 0.5

# torchvision's TrivialAugmentWide.
_TRIVIALAUGMENT: Mapping[str, Scale] = {
    "identity": _unused,
    "shear_x": _times(0.99),
    "shear_y": _times(0.99),
    "translate_x": lambda s, size: jnp.trunc(32 * s),
    "translate_y": lambda s, size: jnp.trunc(32 * s),
    "rotate": _times(135),
    "brightness": _factor(0.99),
    "color": _factor(0.99),
    "contrast": _factor(0.99),
    "sharpness": _factor(0.99),
    "posterize": lambda s, size: 8 - jnp.round(6 * jnp.abs(s)),
    "solarize": lambda s, size: 255 * (1 - jnp.abs(s)),
    "autocontrast": _unused,
    "equalize": _unused,
}
_NUM_STRENGTHS = 31  # evenly from 0 to 1


def sample_randaugment(
    keys: jax.Array, *, num_ops: int, magnitude: float, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Samples operations as timm's `rand-m{magnitude}-n{num_ops}-mstd0.5-inc1`.

    Cubuk et al. 2019, arXiv:1909.13719. In timm every second round does nothing, on average, and
    each round samples its own magnitude around the given one.

    Args:
      keys: (B,).
      num_ops: R.
      magnitude: From 0 to 10.
      size: (height, width) of the images.

    Returns:
      Operations int32 (R, B) and their values float32 (R, B), as `pixels.apply` takes them.
    """

    def one(sampled):
        choice, sign, active, level = sampled
        level = magnitude + _MAGNITUDE_STD * jax.scipy.special.ndtri(level)
        strength = jnp.where(sign < 0.5, -1, 1) * jnp.clip(level, 0, 10) / 10
        operation, value = _choose(_RANDAUGMENT, choice, strength, size)
        return jnp.where(active < _ACTIVE, operation, pixels.INDEX["identity"]), value

    sampled = jax.vmap(lambda key: jax.random.uniform(key, (num_ops, 4)), out_axes=1)(keys)
    return jax.vmap(jax.vmap(one))(sampled)


def sample_trivialaugment(keys: jax.Array, *, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Samples one operation of any strength, as torchvision's `TrivialAugmentWide`; R is 1.

    Müller and Hutter 2021, arXiv:2103.10158. Arguments and results as for `sample_randaugment`.
    """

    def one(key):
        choice, sign, strength = jax.random.uniform(key, (3,))
        strength = jnp.floor(_NUM_STRENGTHS * strength) / (_NUM_STRENGTHS - 1)
        return _choose(_TRIVIALAUGMENT, choice, jnp.where(sign < 0.5, -1, 1) * strength, size)

    operations, values = jax.vmap(one)(keys)
    return operations[None], values[None]


def _choose(
    table: Mapping[str, Scale], choice: jax.Array, strength: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """The operation at `choice`, from 0 to below 1, of the table, and its value: (), ()."""
    index = jnp.floor(len(table) * choice).astype(jnp.int32)
    values = jnp.stack([scale(strength, size) for scale in table.values()])
    return jnp.array([pixels.INDEX[name] for name in table])[index], values[index]
