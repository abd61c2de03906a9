"""The firewall's rules while the daemon runs: made, watched, put back."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from tundp.backoff import Backoff, Outage
from tundp.errors import PlatformError
from tundp.linux.firewall.choose import Firewall, Previous, watch_ruleset

_log = logging.getLogger(__name__)

RULES_LOOK_S: Final = 60.0
"""Between looks at rules whose every change the kernel reports."""


class FirewallKeeper:
    """The firewall's rules. None wanted: there is nothing to do, and nothing missing."""

    def __init__(self, firewall: Firewall | None, previous: Previous | None, resync_s: int) -> None:
        self.missing = "not set up yet" if firewall is not None else ""
        """What is wrong with the rules; empty when all are there."""
        self._firewall = firewall
        self._previous = previous
        self._resync_s = resync_s
        self._outage = Outage(_log, f"{self.flavour} rules")

    @property
    def flavour(self) -> str:
        """`iptables`, `nftables`, or empty."""
        return "" if self._firewall is None else self._firewall.name

    @property
    def evidence(self) -> str:
        """What was seen of the rules at the last look at them."""
        if self._firewall is None:
            return "no rules of ours are wanted"
        return self.missing or f"our {self.flavour} rules are there"

    async def set_up(self) -> None:
        """Make the rules. What cannot be made is tried again, and readyz says so meanwhile."""
        if self._firewall is None:
            return
        try:
            await self._firewall.set_up(self._previous)
        except PlatformError as error:
            self.missing = str(error)
            self._outage.failed(error, now=asyncio.get_running_loop().time())
        else:
            self.missing = ""
            _log.info("%s rules made", self.flavour)

    async def keep(self) -> None:
        """Put rules back when they go; look when the kernel says so, or every period."""
        if self._firewall is None:
            return
        outage = self._outage
        clock = asyncio.get_running_loop().time
        backoff = Backoff(1.0, 60.0)
        is_blind = await self._firewall.is_blind()
        period_s = self._resync_s if is_blind else max(RULES_LOOK_S, self._resync_s)
        async with watch_ruleset() as changed:
            while True:
                try:
                    if self.missing:
                        await self._firewall.set_up(self._previous)
                        self.missing = ""
                    elif missing := await self._firewall.repair():
                        _log.warning("firewall rules were gone; put back: %s", ", ".join(missing))
                except PlatformError as error:
                    self.missing = str(error)
                    outage.failed(error, now=clock())
                    await asyncio.sleep(backoff.next_s())
                    continue
                outage.ended(now=clock())
                backoff.reset()
                # Many change at once; and two who disagree must not spin.
                await asyncio.sleep(1.0)
                await changed(float(period_s))
