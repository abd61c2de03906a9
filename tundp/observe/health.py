"""Liveness and readiness of the daemon, both checked for as long as it runs.

alive  (/healthz, systemd's watchdog)   the event loop and every packet thread are running
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

HEARTBEAT_S: Final = 1.0
"""Between two checks of the packet threads' heartbeats."""
STUCK_S: Final = 3.0
"""A packet thread whose heartbeat is unchanged for so long, though it was woken, is stuck."""
LAG_MAX_S: Final = 1.0
"""An event loop that is later than this is not alive: packets flow, but leases are not
followed."""


class Health:
    """Watches the event loop and the packet threads; the node supplies the other checks."""

    def __init__(self) -> None:
        self.on_lag: Callable[[float], object] = float
        """Called each second or sooner with how late the event loop was, in seconds."""
        self._heartbeat: Callable[[], tuple[int, ...]] = tuple
        self._node_checks: Callable[[], list[Finding]] | None = None
        self._waits = "start-up to begin"
        self._why: Callable[[], str] = str
        self._lag_s = 0.0
        self._stuck: list[int] = []
        self._checked_at = 0.0

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
        """Why what start-up is blocked on failed this time."""
        self._why = lambda: why

    def attend(
        self, heartbeat: Callable[[], tuple[int, ...]], checks: Callable[[], list[Finding]]
    ) -> None:
        """The node is there: its packet threads' heartbeats, and its own checks."""
        self._heartbeat = heartbeat
        self._node_checks = checks

    def alive(self) -> list[Finding]:
        """What must hold for the process to be worth keeping."""
        lag_s = self._lag_s
        if self._checked_at:
            lag_s = max(lag_s, asyncio.get_running_loop().time() - self._checked_at - HEARTBEAT_S)
        loop = must_hold(
            "event-loop",
            lag_s < LAG_MAX_S,
            f"late by {max(0.0, lag_s) * 1000:.0f} ms",
        )
        detail = "all running"
        if self._stuck:
            numbers = ", ".join(str(number) for number in self._stuck)
            detail = f"thread {numbers} has made no iteration for {STUCK_S:.0f} s or more"
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
        """Check until cancelled, and feed systemd's watchdog while the process is alive."""
        loop = asyncio.get_running_loop()
        watchdog_s = notify.watchdog_s()
        pause_s = HEARTBEAT_S if watchdog_s is None else min(HEARTBEAT_S, watchdog_s / 4)
        fed_at = -1e9
        beats: tuple[int, ...] = ()
        changed_at: list[float] = []
        while True:
            now = self._checked_at = loop.time()
            before, beats = beats, self._heartbeat()
            if len(beats) != len(before):
                changed_at = [now] * len(beats)
            for number, (beat, last) in enumerate(zip(beats, before, strict=False)):
                if beat != last:
                    changed_at[number] = now
            was_stuck = self._stuck
            self._stuck = [n for n, changed in enumerate(changed_at) if now - changed >= STUCK_S]
            if self._stuck and not was_stuck:
                _log.error("packet thread %s is stuck", self._stuck)
            if watchdog_s is not None and now - fed_at > watchdog_s / 3 and self.is_alive:
                notify.notify("WATCHDOG=1")
                fed_at = now
            await asyncio.sleep(pause_s)
            self._lag_s = loop.time() - now - pause_s
            self.on_lag(max(0.0, self._lag_s))
