"""The largest inner packet that arrives at a peer with DF set, by echo requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Final

AT_ONCE: Final = 12
"""Sizes asked at the same time. Each such round narrows the gap to a 13th."""
SMALLEST: Final = 552
"""Bytes: the daemon makes no path narrower, and the search ends there."""

Ask = Callable[[Collection[int]], Awaitable[Collection[int]]]
"""Sends packets of these lengths, several times each; which of them arrived."""


async def largest_that_arrives(full: int, known: int, ask: Ask) -> tuple[int | None, list[int]]:
    """The largest packet length up to `full` that arrives, and all that were tried, in order.

    known: a length that arrives already. None: nothing of what was tried arrives, nor `known`
    did: it is above SMALLEST. What arrives once fits the path, so that loss at random makes the
    result too small at most.
    """
    tried = [full]
    if full in await ask([full]):
        return full, tried
    most, least = full, known  # the first does not arrive, the second does
    if known < SMALLEST < full:
        tried.append(SMALLEST)
        if SMALLEST not in await ask([SMALLEST]):
            return None, tried
        least = SMALLEST
    while most - least > 1:
        step = max(1, -(-(most - least) // (AT_ONCE + 1)))
        sizes = list(range(least + step, most, step))[:AT_ONCE]
        arrived = await ask(sizes)
        tried += sizes
        least = max([least, *arrived])
        most = min([most, *(size for size in sizes if size > least)])
    return least, tried
