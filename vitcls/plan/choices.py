"""Settings that save memory without changing the result, and the first that suffices."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vitcls.config.fields import REMATS
from vitcls.costs import footprint

# Every pass also reads all parameters and adds up all gradients. Passes of fewer images are
# therefore the last way to save memory.
_MIN_PASS = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings that do not change the result: `mesh.fsdp`, `model.remat` and images in a pass."""

    fsdp: int
    remat: str
    pass_size: int

    def fields(self) -> dict[str, Any]:
        """The config fields of this choice."""
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
    """Returns the first combination that fits, in the order of their cost in time.

    Smaller passes are tried first, since they cost almost no time while they are large enough.
    Computing layers again costs a tenth to a third of the time. Sharding parameters costs an
    exchange of all of them in every pass. Passes below `_MIN_PASS` images come last.

    Args:
      asked: The combination to start from.
      sizes: Images in a pass, largest first.
      fsdps: Sizes of the axis that shards parameters, for which the state alone fits.
      needed: Returns the bytes of a combination.
      fixed: Returns its bytes that do not depend on the size of a pass.
      available: Bytes that are available.
    """
    remats = REMATS[REMATS.index(asked.remat) :]
    large = [size for size in sizes if _MIN_PASS <= size <= asked.pass_size]
    small = [size for size in sizes if size < min(_MIN_PASS, asked.pass_size + 1)]
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
