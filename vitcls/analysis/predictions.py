"""Predictions of a run for every image of a split, from `predictions/SPLIT.npz`.

N images, K classes.
"""

import csv
import dataclasses
import zipfile
from pathlib import Path

import numpy as np
from scipy.special import softmax

from vitcls.errors import UserError
from vitcls.folders.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions for one split.

    Attributes:
      labels: int32 (N,), from 0 to K - 1.
      logits: float32 (N, K), finite.
      ids: str (N,).
    """

    labels: np.ndarray
    logits: np.ndarray
    ids: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """float64 (N, K)."""
        return softmax(self.logits.astype(np.float64), axis=1)


def split_names(workdir: Path) -> list[str]:
    """The splits that have predictions, sorted; none before the run has ended."""
    return sorted(path.stem for path in Workdir(workdir).predictions.glob("*.npz"))


def read_predictions(workdir: Path, split: str) -> Predictions:
    """Reads the predictions for a split.

    Args:
      workdir: Folder of a run, or of `vitcls.evaluate --output`.
      split: Name of the split, such as "test".

    Raises:
      UserError: The predictions are missing or damaged.
    """
    path = Workdir(workdir).predictions / f"{split}.npz"
    if not path.is_file():
        known = split_names(workdir)
        raise UserError(
            f"{path} does not exist: "
            + (
                f"there are predictions for {', '.join(known)}."
                if known
                else "the run has not ended. Run its command again to finish it, or use "
                "vitcls.evaluate --output on its checkpoint."
            )
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = Predictions(*(arrays[name] for name in ("labels", "logits", "ids")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read: {error}. It should hold labels, logits and ids; delete it and "
            "run the command that made it again."
        ) from error
    _check(path, found)
    return found


def _check(path: Path, found: Predictions) -> None:
    labels, logits, ids = found.labels, found.logits, found.ids
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or ids.shape != labels.shape:
        raise UserError(
            f"{path}: labels {labels.shape}, logits {logits.shape} and ids {ids.shape} must "
            "have the shapes (N,), (N, K) and (N,). Make it again with vitcls.evaluate --output."
        )
    if not logits.size:
        raise UserError(f"{path} has no examples: nothing can be measured.")
    is_class = (labels >= 0) & (labels < logits.shape[1])
    if labels.dtype.kind not in "iu" or not is_class.all():
        raise UserError(
            f"{path}: labels must be integers from 0 to {logits.shape[1] - 1}, one of the "
            f"{logits.shape[1]} columns of logits."
        )
    num_bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if num_bad:
        raise UserError(
            f"{path}: the logits of {num_bad} of {len(logits)} images are not finite, so that no "
            "metric means anything. Train again with a lower optim.lr, or in float32."
        )


def read_logits(path: Path) -> np.ndarray:
    """The logits in an npz file of `vitcls.predict`, float32 (N, K), without any labels.

    Raises:
      UserError: The file is not such a file, or has no images.
    """
    remedy = "make it with vitcls.predict --output=FILE.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            logits = arrays["logits"]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {remedy}.") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} has no logits that can be read ({error}); {remedy}.") from error
    if logits.ndim != 2 or not logits.size or not np.isfinite(logits).all():
        raise UserError(f"{path} must have finite logits (N, K), one image or more; {remedy}.")
    return logits


def read_confidence(path: Path) -> np.ndarray:
    """The largest probability for each image, float64 (N,); labels do not matter.

    Args:
      path: CSV of `vitcls.predict --output`, or an npz file with `logits` (N, K).

    Raises:
      UserError: The file is neither.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                confidence = softmax(arrays["logits"].astype(np.float64), axis=1).max(axis=1)
        else:
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                rows = list(csv.DictReader(file))
            name = "probability" if rows and "probability" in rows[0] else "probability_1"
            confidence = np.array([float(row[name]) for row in rows if not row["error"]])
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name a file.") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is neither CSV of vitcls.predict nor an npz file with logits (N, K): "
            f"{type(error).__name__}: {error}."
        ) from error
    if not (confidence.size and np.isfinite(confidence).all()):
        raise UserError(f"{path} has no images, or probabilities that are not finite.")
    return confidence
