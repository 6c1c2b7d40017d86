"""Runs a command that the system stops if the process that started it dies for any reason.

  python -m launch.tied PARENT_PID COMMAND...

The command replaces this process. On SIGTERM a run saves and ends with 75. A hook between fork and
exec would do the same, but a process that has imported jax must not fork.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Requests the signal from the system, then becomes the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it is dead already
            sys.exit(128 + signal.SIGTERM)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
