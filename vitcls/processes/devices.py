"""Starts jax's devices, which can fail, and checks the settings that change its results."""

import functools

import jax
import numpy as np

from vitcls.errors import Unavailable, UserError

# Settings that this program is written for, and the effect of another value.
_NEEDED = {
    "jax_enable_x64": (False, "computes in float64 what is meant in float32"),
    "jax_numpy_dtype_promotion": ("standard", "refuses sums of numbers of two types"),
    "jax_disable_jit": (False, "compiles nothing, so that nothing can be planned or split"),
}
# Further settings change numbers, perhaps on purpose, so runs keep them.
_RECORDED = (
    "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_random_seed_offset",
)  # fmt: skip


def check_settings() -> None:
    """Raises `UserError` for a setting of jax that this program cannot compute with."""
    for name, (needed, consequence) in _NEEDED.items():
        value = getattr(jax.config, name)
        if value != needed:
            variable = name.upper()
            raise UserError(
                f"{variable}={value} {consequence}: unset it, or set {variable}={needed}."
            )


def settings() -> dict[str, str]:
    """Returns the settings of jax that change numbers, by name."""
    return {name: str(getattr(jax.config, name)) for name in _RECORDED}


def start_devices() -> list[jax.Device]:
    """Starts the devices, once, before they are used, and returns those of all processes.

    Raises:
      UserError: see `check_settings`.
      Unavailable: the backend does not start, or another process has its devices.
    """
    check_settings()
    _start()
    return jax.devices()


@functools.cache
def _start() -> None:
    platforms = jax.config.jax_platforms
    try:
        devices = jax.local_devices()
        # A GPU without free memory starts, and fails at the first array.
        for device in devices:
            jax.block_until_ready(jax.device_put(np.zeros((), np.float32), device))
    # Backends raise many types, for a missing device even an assertion.
    except Exception as error:
        raise _unavailable(str(error) or "it has no devices here", platforms) from error
    # Without a driver, jax skips "cuda" and computes on the CPU. Training would take months.
    wanted = (platforms or "").partition(",")[0]
    if devices[0].platform == "cpu" and wanted not in ("", "cpu"):
        raise _unavailable(f"no device of {wanted!r} is here, only a processor", platforms)


def _unavailable(reason: str, platforms: str | None) -> Unavailable:
    asked = f" with JAX_PLATFORMS={platforms}" if platforms else ""
    return Unavailable(
        f"jax cannot start its devices{asked}: {reason}. Another process may have them, or the "
        "driver is missing or broken (nvidia-smi). Try again, or on another machine; "
        "JAX_PLATFORMS=cpu computes on the processor."
    )
