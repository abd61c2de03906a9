"""Whether the daemon is alive, and whether the node is in the overlay: true at all times.

alive  (/healthz, systemd's watchdog)   the event loop turns, every packet thread turns
ready  (/readyz)                        alive, and all a pod needs is there: lease, device,
                                        leases of the others, firewall rules, subnet.env

flannel's healthz answers 200 whatever happens, and its readyz never goes back to 503.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from tundp.finding import Finding, failures, must_hold
from tundp.linux import notify

_log = logging.getLogger(__name__)

PULSE_S: Final = 1.0
"""Between two looks at the packet threads."""
STUCK_S: Final = 3.0
"""A packet thread that has not moved for so long, though it was asked to, is stuck."""
LAG_MAX_S: Final = 1.0
"""A loop that is so late is not alive: packets flow, but nothing follows the leases."""


class Health:
    """Keeps looking at the loop and the packet threads; asks the node for the rest."""

    def __init__(self) -> None:
        self._pulse: Callable[[], tuple[int, ...]] = tuple
        self._node_checks: Callable[[], list[Finding]] | None = None
        self._waits = "its turn"
        self._why: Callable[[], str] = str
        self._lag_s = 0.0
        self._stuck: list[int] = []
        self._turned_at = 0.0

    @property
    def startup_phase(self) -> str:
        """What start-up is blocked on, and why if that is known; for status and readyz."""
        why = self._why()
        return f"{self._waits}: {why}" if why else self._waits

    def waits_for(self, what: str, why: Callable[[], str] | None = None) -> None:
        """Start-up is blocked on `what`; `why`, when asked, says what it has met so far.

        systemd shows it, too.
        """
        self._waits = what
        self._why = why or str
        notify.notify(f"STATUS=waiting for {what}")

    def waiting_failed(self, why: str) -> None:
        """What is waited for did not come this time."""
        self._why = lambda: why

    def attend(
        self, pulse: Callable[[], tuple[int, ...]], checks: Callable[[], list[Finding]]
    ) -> None:
        """From now on there is a node: its packet threads, and what it checks of itself."""
        self._pulse = pulse
        self._node_checks = checks

    def alive(self) -> list[Finding]:
        """What must hold for the process to be worth keeping."""
        lag_s = self._lag_s
        if self._turned_at:
            lag_s = max(lag_s, asyncio.get_running_loop().time() - self._turned_at - PULSE_S)
        loop = must_hold(
            "event-loop",
            lag_s < LAG_MAX_S,
            f"late by {max(0.0, lag_s) * 1000:.0f} ms",
        )
        detail = "all turning"
        if self._stuck:
            numbers = ", ".join(str(number) for number in self._stuck)
            detail = f"thread {numbers} has not moved for {STUCK_S:.0f} s or more"
        return [loop, must_hold("packet-threads", not self._stuck, detail)]

    def ready(self) -> list[Finding]:
        """What must hold for pods to use the overlay; `alive` included."""
        if self._node_checks is None:
            return [*self.alive(), must_hold("start", False, f"waiting for {self.startup_phase}")]
        return [*self.alive(), *self._node_checks()]

    @property
    def is_alive(self) -> bool:
        """Whether `alive` holds."""
        return not failures(self.alive())

    @property
    def is_ready(self) -> bool:
        """Whether `ready` holds."""
        return not failures(self.ready())

    async def watch(self) -> None:
        """Look for ever, and feed systemd's watchdog while the process is alive."""
        loop = asyncio.get_running_loop()
        watchdog_s = notify.watchdog_s()
        pause_s = PULSE_S if watchdog_s is None else min(PULSE_S, watchdog_s / 4)
        fed_at = -1e9
        turns: tuple[int, ...] = ()
        moved_at: list[float] = []
        while True:
            now = self._turned_at = loop.time()
            before, turns = turns, self._pulse()
            if len(turns) != len(before):
                moved_at = [now] * len(turns)
            for number, (turn, last) in enumerate(zip(turns, before, strict=False)):
                if turn != last:
                    moved_at[number] = now
            was_stuck = self._stuck
            self._stuck = [n for n, moved in enumerate(moved_at) if now - moved >= STUCK_S]
            if self._stuck and not was_stuck:
                _log.error("packet thread %s is stuck", self._stuck)
            if watchdog_s is not None and now - fed_at > watchdog_s / 3 and self.is_alive:
                notify.notify("WATCHDOG=1")
                fed_at = now
            await asyncio.sleep(pause_s)
            self._lag_s = loop.time() - now - pause_s
