"""Traces a few training steps with jax's profiler."""

import logging
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("vitcls")


class Profile:
    """Traces the steps after the first, which compiles."""

    def __init__(self, directory: Path, num_steps: int):
        """Takes the folder for the trace, and the number of steps; 0 or less: none."""
        self._directory, self._num_steps = directory, num_steps

    def before(self, number: int, state: Any) -> None:
        """Starts or stops the trace before a step of this process, counted from 1.

        Args:
          number: The step that comes next, also after the last one.
          state: What the last step returned; it is waited for.
        """
        if self._num_steps > 0 and number == 2:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
        if self._num_steps > 0 and number == 2 + self._num_steps:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            log.info("Traced %d steps into %s.", self._num_steps, self._directory)
