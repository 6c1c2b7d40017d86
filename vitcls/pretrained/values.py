"""Values that no network can have: nan, infinity and variances below zero."""

from collections.abc import Sequence

import numpy as np

from vitcls.errors import UserError

_MAX_LISTED = 8
# Running variances of BatchNorm, as torch and as we name them.
_VARIANCES = ("running_var", "/var")


def flaw(name: str, values: np.ndarray) -> str:
    """Returns what is wrong with a tensor's values, beginning with its name, or ""."""
    num_bad = values.size - np.count_nonzero(np.isfinite(values))
    if num_bad:
        return f"{name} ({num_bad} of {values.size} not finite in {values.dtype})"
    if name.endswith(_VARIANCES) and (values < 0).any():
        return f"{name} (a variance below 0)"
    return ""


def refuse(flaws: Sequence[str], *, source: str, advice: str) -> None:
    """Raises `UserError` if there are flaws: names the tensors.

    Args:
      flaws: What `flaw` returned for the tensors; empty texts do not count.
      source: Where they are; begins the message.
      advice: What to do about it, a sentence.
    """
    flaws = list(filter(None, flaws))
    if flaws:
        more = ", ..." if len(flaws) > _MAX_LISTED else ""
        raise UserError(
            f"{source} has values that no network can use, in {len(flaws)} tensors: "
            f"{', '.join(flaws[:_MAX_LISTED])}{more}. {advice}"
        )
