"""What stands in the way of the overlay's packets, looked for while the daemon runs.

After a start, soon after the kernel reports a change of rules, links, addresses or routes, and
every minute: policy rules and switches change without a notice. One look at a time, off the
packet path: child programs list the rules, a worker thread judges them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux.firewall.choose import watch_ruleset
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles.look import SUMMARY, Looked, look
from tundp.linux.obstacles.scene import Scene

_log = logging.getLogger(__name__)

LOOK_S: Final = 60.0
"""Between looks while nothing is reported."""
SETTLE_S: Final = 1.0
"""After a reported change, and before what makes a node unready is believed."""
PAUSE_S: Final = 30.0
"""Between looks while changes are reported all the time; it doubles up to this."""
SHARE: Final = 10
"""A look takes at most one part in so many of the time, whatever changes meanwhile."""
_NUMBER: Final = re.compile(r"\brule \d+ of ")


class ObstacleWatch:
    """The findings of the last look. scene: what to look for; None while there is no device."""

    def __init__(self, netlink: Netlink, scene: Callable[[], Scene | None]) -> None:
        self._netlink = netlink
        self._scene = scene
        self._is_due = asyncio.Event()
        self._found: Sequence[Finding] = ()
        self._summary = _not_looked("not yet")
        self._looked_at: float | None = None

    def findings(self) -> list[Finding]:
        """What the last look found, and what it looked at."""
        if self._looked_at is None:
            return [*self._found, self._summary]
        age_s = asyncio.get_running_loop().time() - self._looked_at
        evidence = f"{self._summary.evidence} ({age_s:.0f} s ago)"
        return [*self._found, replace(self._summary, evidence=evidence)]

    @property
    def count(self) -> int:
        """How many things are, or may be, in the way."""
        return sum(each.verdict is not Verdict.NOTE for each in self._found)

    def poke(self) -> None:
        """Something changed that may matter."""
        self._is_due.set()

    async def run(self) -> None:
        """Look until cancelled."""
        clock = asyncio.get_running_loop().time
        pause_s = 0.0
        async with watch_ruleset() as changed:
            while True:
                began = clock()
                await self._look()
                took_s = clock() - began
                is_reported = await self._wait(changed)
                if clock() - began - took_s > 2 * pause_s:
                    pause_s = 0.0
                if is_reported:
                    await asyncio.sleep(SETTLE_S + max(pause_s, took_s * SHARE))
                    pause_s = min(PAUSE_S, max(SETTLE_S, 2 * pause_s))

    async def _wait(self, changed: Callable[[float], Awaitable[bool]]) -> bool:
        """Whether anything was reported within the period."""
        waits = [
            asyncio.ensure_future(changed(LOOK_S)),
            asyncio.ensure_future(self._is_due.wait()),
        ]
        try:
            await asyncio.wait(waits, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            return any(each.done() and each.result() for each in waits)
        finally:
            for each in waits:
                each.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _look(self) -> None:
        self._is_due.clear()
        scene = self._scene()
        if scene is None:
            self._found, self._summary = (), _not_looked("there is no device")
            self._looked_at = None
            return
        index = _index_of(scene.device)
        try:
            seen = await self._ask(scene)
        except Exception as error:  # noqa: BLE001  (in the log, and UNKNOWN)
            # The rules are other people's. A mistake in judging them must not end the daemon.
            _log.exception("bug in looking for obstacles; please report it")
            self._found, self._summary = (), _not_looked(f"a bug: {error!r}")
            self._looked_at = None
            return
        if index is None or _index_of(scene.device) != index:
            # Its routes go with it, for a moment: the backend tells why.
            self._found, self._summary = (), _not_looked(f"{scene.device} is being made again")
            self._looked_at = None
            self._is_due.set()
            return
        self._tell(seen.findings)
        self._found, self._summary = seen.findings, seen.summary
        self._looked_at = asyncio.get_running_loop().time()

    async def _ask(self, scene: Scene) -> Looked:
        seen = await look(self._netlink, scene)
        if any(each.is_failure for each in seen.findings) and not any(
            each.is_failure for each in self._found
        ):
            # A route that is just being made again is no reason to turn a node away.
            await asyncio.sleep(SETTLE_S)
            seen = await look(self._netlink, scene)
        return seen

    def _tell(self, found: Sequence[Finding]) -> None:
        """Log what is new, and what is gone."""
        was = {_key(each) for each in self._found}
        now = {_key(each) for each in found}
        for each in found:
            if _key(each) not in was and each.verdict is not Verdict.NOTE:
                step = f"; {each.next_step}" if each.next_step else ""
                _log.warning("in the way: %s%s", each.evidence, step)
        for each in self._found:
            if _key(each) not in now and each.verdict is not Verdict.NOTE:
                _log.info("no longer in the way: %s", each.evidence)


def _key(finding: Finding) -> tuple[str, str]:
    """The same for a rule that only moved."""
    return finding.id, _NUMBER.sub("", finding.evidence)


def _index_of(device: str) -> int | None:
    try:
        return socket.if_nametoindex(device)
    except OSError:
        return None


def _not_looked(why: str) -> Finding:
    return Finding(id=SUMMARY, verdict=Verdict.UNKNOWN, evidence=f"not looked for: {why}")
