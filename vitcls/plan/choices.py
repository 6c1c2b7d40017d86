"""What saves memory without changing the result, and the first of it that suffices."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vitcls.config.fields import REMATS
from vitcls.costs import footprint

# Images in a pass below which the other ways to save memory come first: a pass also reads all
# parameters and adds up all gradients.
_LEAST_PASS = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """What saves memory without changing the result: `mesh.fsdp`, `model.remat` and passes."""

    fsdp: int
    remat: str
    pass_size: int

    def fields(self) -> dict[str, Any]:
        """The config fields that make it."""
        return {
            "mesh.data": -1,
            "mesh.fsdp": self.fsdp,
            "model.remat": self.remat,
            "train.micro_batch": self.pass_size,
        }

    def line(self) -> str:
        """Returns `64 images in a pass, remat none, fsdp 1`."""
        return f"{self.pass_size} images in a pass, remat {self.remat}, fsdp {self.fsdp}"


def first_fitting(
    asked: Choice,
    *,
    sizes: list[int],
    fsdps: list[int],
    needed: Callable[[Choice], float],
    fixed: Callable[[Choice], float],
    available: float,
) -> Choice | None:
    """Returns the first combination that fits, in the order of what it costs in time.

    Smaller passes cost next to nothing while they are large enough, then layers that are computed
    again a tenth to a third of the time, then sharing parameters an exchange of all of them in
    every pass; small passes come last.

    Args:
      asked: The combination to start from.
      sizes: Of passes, largest first.
      fsdps: Sizes of the axis that shares parameters, for which the state alone fits.
      needed: Bytes of a combination.
      fixed: Bytes of it that do not depend on the size of a pass.
      available: Bytes that there are.
    """
    remats = REMATS[REMATS.index(asked.remat) :]
    large = [size for size in sizes if _LEAST_PASS <= size <= asked.pass_size]
    small = [size for size in sizes if size < min(_LEAST_PASS, asked.pass_size + 1)]
    for some in (large, small):
        for fsdp in fsdps:
            for remat in remats if some else ():
                choice = Choice(fsdp, remat, some[0])
                size = footprint.largest_fitting(
                    some,
                    lambda size, choice=choice: needed(dataclasses.replace(choice, pass_size=size)),
                    fixed=fixed(choice),
                    available=available,
                )
                if size is not None:
                    return dataclasses.replace(choice, pass_size=size)
    return None
