"""What a config file says that its recipe gives, and whether a run gave it."""

import os
import runpy
from pathlib import Path

import numpy as np

from vitcls.analysis import paired
from vitcls.errors import UserError, unknown
from vitcls.recipes import Expected

_CONFIGS = Path(__file__).parents[2] / "configs"


def find(name: str) -> tuple[str, Expected]:
    """Returns what `--config` takes, and what is expected of it.

    Args:
      name: A file of configs/, `quickstart`, or the path of one, both with `:ARGUMENTS` if there
        are any.

    Raises:
      UserError: There is no such file, or it says nothing of these arguments.
    """
    stem, _, argument = name.partition(":")
    path = Path(stem if stem.endswith(".py") else _CONFIGS / f"{stem}.py")
    if not path.is_file():
        if stem.endswith(".py"):
            raise UserError(f"{stem} does not exist; name a config file, or one of configs/.")
        raise unknown("recipe", stem, [path.stem for path in _CONFIGS.glob("*.py")])
    try:
        expected = runpy.run_path(str(path)).get("EXPECTED", {})
    except Exception as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}") from error
    if argument not in expected:
        listed = ", ".join(f"{stem}:{known}" if known else stem for known in expected)
        raise UserError(
            f"{path.name} has no accuracy that is expected of {name}; it has "
            + (f"those of {listed}." if listed else "none; its docstring says what is known.")
        )
    return os.path.relpath(path) + (f":{argument}" if argument else ""), expected[argument]


def interval(expected: Expected, num_images: int) -> tuple[float, float]:
    """The accuracies that 95 of 100 further runs of the recipe have.

    Of two or more runs: Student's t prediction interval of one more. Of one run nothing says how
    much seeds differ: what two tests on other images would, each binomial; this is also added where
    the images are others. At least one image on either side.

    Args:
      expected: What is known.
      num_images: Images of the new run's split.
    """
    values = np.array(expected.accuracies)
    num, mean = len(values), float(values.mean())
    images, seeds = 0.0, ()
    if num == 1 or num_images != expected.num_images:
        images = mean * (1 - mean) * (1 / expected.num_images + 1 / num_images)
    if num > 1:  # of the mean, and of the new run beside it: s^2 / num + s^2
        seeds = (((1 + num) * float(values.var(ddof=1)), num),)
    low, high = paired.Difference(mean, images, seeds, p=1.0).interval()
    one = 1 / num_images + 1e-9  # rounding
    return max(0.0, min(low, mean - one)), min(1.0, max(high, mean + one))


def answer(expected: Expected, accuracy: float, num_images: int) -> tuple[bool, str]:
    """Whether a run's accuracy is inside, and that as a sentence."""
    low, high = interval(expected, num_images)
    is_inside = bool(low <= accuracy <= high)
    values = expected.accuracies
    known = f"one run had {values[0]:.4f}"
    if len(values) > 1:
        known = f"{len(values)} runs had {np.mean(values):.4f} ({min(values):.4f} to "
        known += f"{max(values):.4f})"
    where = "inside" if is_inside else "outside, above" if accuracy > high else "outside, below"
    return is_inside, (
        f"{where}: {expected.split} accuracy {accuracy:.4f} ({num_images} images); 95 of 100 runs "
        f"are expected between {low:.4f} and {high:.4f}, since {known}: {expected.source}."
    )
