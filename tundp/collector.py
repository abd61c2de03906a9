"""Python's garbage collector kept from walking what lasts: it stops every thread meanwhile.

A full collection takes 3 us for each object it sees. A snapshot of 100,000 entries makes a million,
which stay, and while they are made the collector comes by again and again.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Final

MANY: Final = 1000
"""Entries from which the collector's walks are noticed."""
_lock = threading.Lock()
_makers = [0]
"""How many threads are in `making`."""


def settle() -> None:
    """Collect what is garbage now; what is alive is not walked again."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def making(count: int) -> Iterator[None]:
    """Around the making of `count` entries that last. Any thread.

    What is alive at the end is not walked again. That includes what others made meanwhile, and
    cycles of theirs that are garbage later are never found: a snapshot's time of them.
    """
    if count <= MANY:
        yield
        return
    with _lock:
        _makers[0] += 1
        gc.collect()  # of what came since the last time, mostly nothing
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            gc.freeze()
            _makers[0] -= 1
            if not _makers[0]:
                gc.enable()
