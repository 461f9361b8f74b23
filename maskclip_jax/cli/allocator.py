"""glibc's allocator set to keep freed memory for the next step instead of returning it page by page."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Tells glibc's malloc to keep what is freed; True where there is such a malloc, elsewhere nothing happens.

    XLA's CPU backend allocates its temporaries anew for every run. By default glibc maps each large one afresh, and
    the system then clears it page by page: filling 50 MB takes 38 ms of CPU time so, and 14 ms with kept memory. The
    process then stays as large as it once was. For commands, not for libraries: it is a setting of the whole process,
    and best made before its first threads start.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    return sum(mallopt(*setting) for setting in settings) == len(settings)
