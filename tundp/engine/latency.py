"""Latency histograms: how long packets are in an engine, from read or receive to send or write.

A batch is what one iteration of a worker's loop reads or receives. Of every EVERY-th one, from the
first on, the clock is read after the first read or receive that brought something, and after the
last send or write. All its packets, dropped ones included, are counted with the time between, so
that none took longer than its bucket says. Two readings cost 50 to 150 ns, which for batches of one
packet would be 2 % of all that is done for it. Standard library only: native/tables.py reads it. C
twin: native/src/latency.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

EVERY: Final = 8
"""One of so many batches is measured, by worker and direction."""
FINITE: Final = 21
"""Buckets with an upper bound: 1 us, 2 us, 4 us and so on, up to 2^20 us, 1.05 s."""
COUNT: Final = FINITE + 1
"""The last one is for what took longer."""
BOUNDS_US: Final = tuple(1 << number for number in range(FINITE))


def bucket(elapsed_ns: int) -> int:
    """The number of the bucket of a time: the first whose bound is not below it."""
    microseconds = -(-elapsed_ns // 1000)
    return min(max(microseconds - 1, 0).bit_length(), FINITE)


def quantile_us(counts: Sequence[int], share: float) -> int | None:
    """The bound, in microseconds, that `share` of the packets did not exceed.

    0: the longest bound was exceeded. None: nothing was counted.
    """
    wanted = share * sum(counts)
    below = 0
    for bound, count in zip(BOUNDS_US, counts, strict=False):
        below += count
        if below >= wanted and below:
            return bound
    return 0 if sum(counts) else None
