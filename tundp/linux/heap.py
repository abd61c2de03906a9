"""glibc's malloc(3) told to give memory back: mallopt(3), by ctypes.

Left to itself it raises its limits with each big block that is freed, to 32 MB (malloc.c,
mp_.mmap_threshold). Blocks up to there are then cut from the heap, where one small block above
keeps all below it; and each thread has a heap of its own. A store's megabytes would stay in the
process for good, in steps.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
"""malloc.h."""
BIG_LEN: Final = 1 << 20
"""Bytes from which a block is a mapping of its own, which is unmapped when it is freed."""
FREE_LEN: Final = 4 << 20
"""Free bytes above a heap's last block that stay in the process."""
HEAPS: Final = 2
"""For all threads together: those that run Python wait for each other anyway."""


def bound() -> bool:
    """Set the limits for this process, from now on; whether they hold.

    Whoever has set some by the environment knows better, and other C libraries have none.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    limits = ((_MMAP_THRESHOLD, BIG_LEN), (_TRIM_THRESHOLD, FREE_LEN), (_ARENA_MAX, HEAPS))
    return all(mallopt(name, value) == 1 for name, value in limits)
