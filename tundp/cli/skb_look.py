"""The kernel's drops beside `tundp drops`: a look for a while, or as long as it follows."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tundp.errors import PlatformError
from tundp.linux.skb_drops import LOOK_S, SkbDrops, batches, skb_drops
from tundp.observe.skb_steps import Place, SkbStep, step_of

if TYPE_CHECKING:
    from tundp.observe.drops import DropsReport
    from tundp.observe.skb_rows import SkbTally


class SkbLook:
    """What the kernel dropped of a node's packets since it began, as far as it could be seen."""

    def __init__(self, drops: SkbDrops, place: Place) -> None:
        self._drops = drops
        self._place = place
        self._began_s = time.monotonic()

    @property
    def lost(self) -> int:
        """Drops that came too fast."""
        return self._drops.lost

    async def follow(self) -> AsyncIterator[SkbStep]:
        """Each drop as it comes."""
        async for batch in batches(self._drops):
            for drop in batch:
                if (step := step_of(drop, self._place)) is not None:
                    yield step

    async def count(self, tally: SkbTally) -> None:
        """Count each drop, until cancelled."""
        async for step in self.follow():
            tally.add(step)

    def added(self, report: DropsReport, tally: SkbTally) -> DropsReport:
        """The report with what was seen."""
        return replace(
            report,
            kernel_seen=tally.rows(),
            kernel_looked_s=round(time.monotonic() - self._began_s, 3),
            kernel_lost=self.lost,
        )


@contextlib.asynccontextmanager
async def skb_look(place: Place, notes: list[str]) -> AsyncIterator[SkbLook | None]:
    """Look while the block lasts; None with a note if that cannot be."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            drops = await stack.enter_async_context(skb_drops(place.network, place.port))
        except PlatformError as error:
            notes.append(f"the kernel's drops were not looked at: {error}")
            yield None
            return
        if not drops.has_pods:
            notes.append(
                "the kernel's drops in pods' own network namespaces were not looked at: that needs"
                " linux 6.12"
            )
        if not drops.has_reasons:
            notes.append("the kernel's drops have no reasons here: those need linux 5.17")
        yield SkbLook(drops, place)


@contextlib.asynccontextmanager
async def counted(look: SkbLook | None, tally: SkbTally) -> AsyncIterator[None]:
    """Count what is dropped while the block lasts."""
    if look is None:
        yield
        return
    counting = asyncio.ensure_future(look.count(tally))
    try:
        yield
    finally:
        # One look more, for what was dropped last.
        await asyncio.sleep(LOOK_S * 1.2)
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
