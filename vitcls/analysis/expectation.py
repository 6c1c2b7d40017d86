"""The accuracy that a config file expects of its recipe, and whether a run reached it."""

import os
import runpy
from pathlib import Path

import numpy as np

from vitcls.analysis import paired
from vitcls.errors import UserError, unknown
from vitcls.recipes import Expected

_CONFIGS = Path(__file__).parents[2] / "configs"


def find_expected(name: str) -> tuple[str, Expected]:
    """Returns the value for `--config`, and the result that the file expects.

    Args:
      name: A file of configs/, such as `quickstart`, or a path; `:ARGUMENTS` may follow.

    Raises:
      UserError: The file does not exist, or it expects nothing for these arguments.
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
            f"{path.name} has no expected accuracy for {name}; it has "
            + (f"one for {listed}." if listed else "none: its docstring says what is known.")
        )
    return os.path.relpath(path) + (f":{argument}" if argument else ""), expected[argument]


def prediction_interval(expected: Expected, num_images: int) -> tuple[float, float]:
    """The range of accuracies that 95 of 100 further runs of the recipe have.

    With two or more known runs this is Student's t prediction interval of one more run. One run
    does not show how much seeds differ: its interval is that of two binomial tests on different
    images. This variance is also added if the number of images differs. The interval is at least
    one image wide on either side.

    Args:
      expected: The known runs.
      num_images: Number of images in the new run's split.
    """
    values = np.array(expected.accuracies)
    num, mean = len(values), float(values.mean())
    images, seeds = 0.0, ()
    if num == 1 or num_images != expected.num_images:
        images = mean * (1 - mean) * (1 / expected.num_images + 1 / num_images)
    if num > 1:  # the variance of the mean plus that of the new run: s^2 / num + s^2
        seeds = (((1 + num) * float(values.var(ddof=1)), num),)
    low, high = paired.Difference(mean, images, seeds, p=1.0).interval()
    one = 1 / num_images + 1e-9  # rounding
    return max(0.0, min(low, mean - one)), min(1.0, max(high, mean + one))


def check_accuracy(expected: Expected, accuracy: float, num_images: int) -> tuple[bool, str]:
    """Returns whether a run's accuracy is inside the interval, and a sentence that says so."""
    low, high = prediction_interval(expected, num_images)
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
