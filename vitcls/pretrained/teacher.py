"""The teacher of a run: another checkpoint, whose logits a network is trained towards.

B batch, H W pixels, K classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcls import pretrained
from vitcls.data.sources import classes
from vitcls.errors import UserError
from vitcls.logs import parameters

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained classifier of the same classes.

    Attributes:
      logits: `(variables, images) -> float32 (B, K)`, of images as the student gets them.
      variables: The network's, float32 numpy arrays.
      sha256: Hash of the variables: where it differs, a run would not go on as it began.
    """

    logits: Callable[[PyTree, jax.Array], jax.Array]
    variables: PyTree
    sha256: str


def open_teacher(
    checkpoint: str, student: pretrained.Processor, *, dtype: jnp.dtype = jnp.float32
) -> Teacher:
    """Loads the checkpoint that teaches, for the student's image size and classes.

    Args:
      checkpoint: As `pretrained.load` takes it.
      student: How the student's images are normalised, their size, and its classes, which the
        teacher must have by name, in any order, perhaps among others.
      dtype: Type of the teacher's computation.

    Raises:
      UserError: the checkpoint does not exist, or it lacks one of the classes.
    """
    model, variables, processor = pretrained.load(checkpoint, image_size=student.size, dtype=dtype)
    try:
        positions = classes.match_names(student.class_names, processor.class_names)
    except UserError as error:
        raise UserError(
            f"loss.teacher={checkpoint!r} has other classes: {error} Name a teacher that has all "
            "classes of the data under the same names."
        ) from error
    # (pixels * rescale - mean) / std, undone for the student and done for the teacher.
    ratio = processor.rescale / student.rescale
    std, mean = (np.asarray(side, np.float32) for side in (processor.std, processor.mean))
    scale = (ratio * np.asarray(student.std, np.float32) / std)[None, None, None]
    shift = ((ratio * np.asarray(student.mean, np.float32) - mean) / std)[None, None, None]

    def logits(variables: PyTree, images: jax.Array) -> jax.Array:
        taught = model.apply(variables, images * scale + shift, train=False)
        return taught[:, positions]

    return Teacher(logits, variables, parameters.sha256(variables))
