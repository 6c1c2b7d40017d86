"""What one row of the config's fields says."""

import dataclasses
import math
from typing import Any

# In `Field.needs`: any value of the other field but 0 and "".
SET = None


@dataclasses.dataclass(frozen=True)
class Field:
    """A field: its default, its meaning, and the values that it accepts.

    Attributes:
      default: Its value in a new config. A type stands for a value that is unset at first.
      text: What it means, with its unit.
      at_least: The lowest value of a number.
      at_most: The highest value; None: every value below `below`.
      below: The limit that a value must not reach.
      among: The allowed values, if it has a fixed list of them.
      is_pattern: Whether it is a regular expression.
      needs: Other fields and the values that they must have for this one to have an effect.
      may_change: Whether a continued run may have another value. Such a field must not change what
        is computed.
    """

    default: Any
    text: str
    at_least: float | None = None
    at_most: float | None = None
    below: float = math.inf
    among: tuple[str, ...] = ()
    is_pattern: bool = False
    needs: dict[str, Any] = dataclasses.field(default_factory=dict)
    may_change: bool = False

    @property
    def value(self) -> Any:
        """The default as it reads in a flat config: None where it is unset."""
        return None if isinstance(self.default, type) else self.default
