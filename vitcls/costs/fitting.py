"""Chooses how many images a pass has by the memory of the devices: `train.micro_batch=0`."""

import logging
from collections.abc import Callable
from typing import Any

from vitcls.costs import footprint
from vitcls.errors import UserError

log = logging.getLogger("vitcls")


def with_fitting_passes(make: Callable[[int | None], Any], sizes: list[int]) -> Any:
    """Returns the `program.Program` whose passes are the largest that fit into the devices' memory.

    The step is compiled, for smaller and smaller passes, until its memory suffices.

    Args:
      make: Returns the program with so many images in a pass on each device; None: all at once.
      sizes: The sizes that divide a step's batch, largest first.

    Raises:
      UserError: not even the smallest pass fits, or passes would change the result.
    """
    whole = make(None)
    check_passes_are_free(whole)
    available = footprint.usable_bytes(whole.mesh)
    programs = {whole.pass_size: whole}

    def needed(size: int) -> float:
        if size not in programs:
            programs[size] = make(size)
        return footprint.bytes_needed(programs[size])

    size = footprint.largest_fitting(
        sizes, needed, fixed=footprint.state_bytes(whole), available=available
    )
    if size is None:
        raise UserError(
            f"train.micro_batch=0: not even the smallest pass fits into the {available / 1e9:.2f} "
            "GB that each device has free. Set mesh.fsdp, model.remat or a smaller "
            "data.image_size; `python -m vitcls.plan` finds what fits."
        )
    log.info("train.micro_batch=0: %d images of %d in a pass.", size, whole.pass_size)
    return programs[size]


def trains_statistics(program: Any) -> bool:
    """Whether the size of a pass changes the result: BatchNorm normalises each by itself."""
    is_trained = program.config.model.batch_norm == "train"
    return is_trained and bool(program.state_shapes.batch_stats)


def check_passes_are_free(program: Any) -> None:
    """Raises `UserError` where `train.micro_batch=0` would change the result."""
    if trains_statistics(program):
        raise UserError(
            "train.micro_batch=0 makes passes as large as the devices' memory allows, but "
            "BatchNorm normalises each pass by itself: the result would depend on the devices. Set "
            "train.micro_batch to a number, or model.batch_norm='frozen'."
        )
