"""Memory of this process that was freed, kept for what needs it next."""

import contextlib
import ctypes

# Options of glibc's mallopt, <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """Has glibc keep what is freed; elsewhere nothing. Before threads are started.

    By default it returns large blocks to the system, and on a CPU XLA takes and frees a step's
    temporaries, gigabytes, at every step: half a million pages to be cleared, a tenth of a step.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)  # other arenas hold no large blocks
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
