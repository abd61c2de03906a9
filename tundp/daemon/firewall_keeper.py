"""The firewall's rules while the daemon runs: made, watched, put back."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from tundp.backoff import Backoff, Outage
from tundp.errors import PlatformError
from tundp.linux.firewall.choose import Firewall, Previous, needs_raw_sockets, watch_ruleset

_log = logging.getLogger(__name__)

RULES_LOOK_S: Final = 60.0
"""Between looks at rules whose every change the kernel reports."""


class FirewallKeeper:
    """The firewall's rules. None wanted: those of before are removed, and nothing is missing."""

    def __init__(self, firewall: Firewall, previous: Previous | None, resync_s: int) -> None:
        self.missing = "not set up yet" if firewall.is_wanted else ""
        """What is wrong with the rules; empty when all are there."""
        self._firewall = firewall
        self._previous = previous
        self._resync_s = resync_s
        self._outage = Outage(_log, f"{self.flavour} rules")

    @property
    def flavour(self) -> str:
        """`iptables` or `nftables`; empty if no rules are wanted."""
        return self._firewall.name if self._firewall.is_wanted else ""

    async def set_up(self) -> None:
        """Make the rules that are wanted, and remove what earlier settings or a flannel made.

        What cannot be made is tried again, and readyz fails meanwhile.
        """
        try:
            await self._firewall.set_up(self._previous)
        except PlatformError as error:
            self.missing = str(error)
            self._outage.failed(error, now=asyncio.get_running_loop().time())
        else:
            self.missing = ""
            if self._firewall.is_wanted:
                _log.info("%s rules are in place", self.flavour)

    async def keep(self) -> None:
        """Put rules back when they go; look when the kernel says so, or every period."""
        if not self._firewall.needs_care:
            return
        outage = self._outage
        clock = asyncio.get_running_loop().time
        backoff = Backoff(1.0, 60.0)
        # Of the legacy iptables' changes the kernel tells nobody.
        is_blind = self._firewall.name == "iptables" and needs_raw_sockets()
        period_s = self._resync_s if is_blind else max(RULES_LOOK_S, self._resync_s)
        async with watch_ruleset() as changed:
            while True:
                try:
                    if self.missing:
                        await self._firewall.set_up(self._previous)
                        self.missing = ""
                    elif missing := await self._firewall.repair():
                        _log.warning(
                            "firewall rules were gone or changed; mended: %s", ", ".join(missing)
                        )
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
