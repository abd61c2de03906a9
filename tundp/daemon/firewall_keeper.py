"""The firewall's rules while the daemon runs: made, watched, put back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from tundp.backoff import Backoff, Contest, Outage
from tundp.errors import PlatformError
from tundp.linux.firewall.choose import Firewall, Previous, watch_ruleset

_log = logging.getLogger(__name__)

RULES_LOOK_S: Final = 60.0
"""Between looks at rules whose every change the kernel reports."""


class FirewallKeeper:
    """The firewall's rules. None wanted: those of before are removed, and nothing is missing."""

    def __init__(self, firewall: Firewall, previous: Previous | None, resync_s: int) -> None:
        self._failure = "not set up yet" if firewall.is_wanted else ""
        """Why the rules are not there; empty when all are."""
        self._contest = Contest(_log)
        self._firewall = firewall
        self._previous = previous
        self._resync_s = resync_s
        self._outage = Outage(_log, f"{self.flavour} rules")

    @property
    def missing(self) -> str:
        """What is wrong with the rules; empty when all are there."""
        return self._failure

    @property
    def contest(self) -> str:
        """Whether another program keeps taking them, and how often; empty if none does."""
        return self._contest.words(now=time.monotonic())

    @property
    def flavour(self) -> str:
        """`iptables` or `nftables`; empty if no rules are wanted."""
        return self._firewall.name if self._firewall.is_wanted else ""

    @property
    def evidence(self) -> str:
        """What was seen of the rules at the last look at them."""
        if not self._firewall.is_wanted:
            return self.missing or "no rules of ours are wanted"
        return self.missing or f"our {self.flavour} rules are there"

    @property
    def wanted(self) -> str:
        """What is wanted, in words that are equal for equal rules."""
        return self._firewall.wanted

    def memory(self) -> Mapping[str, Any]:
        """See Firewall.memory; empty if nothing was made."""
        return {} if self._failure or not self._firewall.is_wanted else self._firewall.memory()

    async def take_over(self, memory: Mapping[str, Any]) -> None:
        """Go on with the rules of a predecessor that wanted the same: mend them, if at all."""
        if not self._firewall.is_wanted:
            self._failure = ""
            return
        if not memory or not self._firewall.recall(memory):
            await self.set_up()
            return
        try:
            missing = await self._firewall.repair()
        except PlatformError as error:
            self._failure = str(error)
            self._outage.failed(error, now=asyncio.get_running_loop().time())
        else:
            self._failure = ""
            if missing:
                _log.warning("firewall rules were missing; mended: %s", ", ".join(missing))

    async def set_up(self) -> None:
        """Make the rules that are wanted, and remove what earlier settings or a flannel made.

        What cannot be made is tried again, and readyz fails meanwhile.
        """
        try:
            await self._firewall.set_up(self._previous)
        except PlatformError as error:
            self._failure = str(error)
            self._outage.failed(error, now=asyncio.get_running_loop().time())
        else:
            self._failure = ""
            if self._firewall.is_wanted:
                _log.info("%s rules made", self.flavour)

    async def keep(self) -> None:
        """Put rules back when they go; look when the kernel says so, or every period."""
        if not self._firewall.needs_care:
            return
        outage = self._outage
        clock = asyncio.get_running_loop().time
        backoff = Backoff(1.0, 60.0)
        is_blind = await self._firewall.is_blind()
        period_s = self._resync_s if is_blind else max(RULES_LOOK_S, self._resync_s)
        async with watch_ruleset() as changed:
            while True:
                try:
                    if self._failure:
                        await self._firewall.set_up(self._previous)
                        self._failure = ""
                    elif missing := await self._firewall.repair():
                        self._contest.undone(
                            f"firewall rules were gone or changed; mended: {', '.join(missing)}",
                            now=time.monotonic(),
                        )
                except PlatformError as error:
                    self._failure = str(error)
                    outage.failed(error, now=clock())
                    await asyncio.sleep(backoff.next_s())
                    continue
                outage.ended(now=clock())
                backoff.reset()
                # Many change at once; and two who disagree must not spin.
                await asyncio.sleep(1.0)
                await changed(float(period_s))
