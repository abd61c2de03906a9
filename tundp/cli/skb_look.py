"""The kernel's drops beside `tundp drops`: a look for a while, or as long as it follows."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tundp.errors import PlatformError
from tundp.linux.skb_drops import SkbDrops, batches, skb_drops
from tundp.observe.skb_steps import Place, SkbStep, step_of

if TYPE_CHECKING:
    from tundp.observe.drops import DropsReport
    from tundp.wire.filter import Filter


class SkbLook:
    """What the kernel dropped of a node's packets since it began, as far as it could be seen."""

    def __init__(self, drops: SkbDrops, place: Place) -> None:
        self._drops = drops
        self._place = place
        self._began_s = time.monotonic()
        self.steps: list[SkbStep] = []

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

    async def keep(self) -> None:
        """Keep each drop, until cancelled."""
        async for step in self.follow():
            self.steps.append(step)

    def added(self, report: DropsReport, packets: Filter) -> DropsReport:
        """The report with what was seen."""
        from dataclasses import replace

        from tundp.observe.skb_rows import skb_rows

        return replace(
            report,
            kernel_seen=skb_rows(self.steps, packets),
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
        yield SkbLook(drops, place)


@contextlib.asynccontextmanager
async def kept(look: SkbLook | None) -> AsyncIterator[None]:
    """Keep what is dropped while the block lasts."""
    if look is None:
        yield
        return
    keeping = asyncio.ensure_future(look.keep())
    try:
        yield
    finally:
        # One look more than the pause between two, for what was dropped last.
        await asyncio.sleep(0.06)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
