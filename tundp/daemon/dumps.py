"""Copies of the flight recorder, made at a moment that may not come again.

One is made when asked for (SIGUSR1), and by itself when drops come in a burst: in one second many
times as many as in the minute before. A copy is a JSON file beside the admin socket, as `tundp
blackbox --json` gives it; the newest few are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tundp.engine.recorder import FlightRecorder
from tundp.files import write_atomically
from tundp.observe import blackbox

_log = logging.getLogger(__name__)

KEPT: Final = 4
"""Copies beside each other; the oldest gives way."""
LOOK_S: Final = 1.0
BURST_MIN: Final = 100
"""Drops a second below which nothing is a burst."""
BURST_FACTOR: Final = 10
"""A burst has so many times the drops of an average second of the minute before."""
HISTORY: Final = 60
PAUSE_S: Final = 600.0
"""Between two copies made for a burst."""


class Dumps:
    """Makes copies of a flight recorder."""

    def __init__(
        self, recorder: FlightRecorder | None, path: Path, drops: Callable[[], int | None]
    ) -> None:
        """path: of the flight recorder. drops: how many packets were dropped so far, if known."""
        self._recorder = recorder
        self._path = path
        self._drops = drops
        self._burst = BurstDetector()

    async def run(self) -> None:
        """Copy on SIGUSR1 and on bursts, until cancelled."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, asked.set)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await asked.wait()
                if asked.is_set():
                    asked.clear()
                    await self._dump("SIGUSR1")
                elif why := self._burst.look(self._drops(), loop.time()):
                    await self._dump(why)
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)

    async def _dump(self, why: str) -> None:
        if self._recorder is None:
            _log.warning("%s: there is no flight recorder to copy", why)
            return
        try:
            path = await asyncio.to_thread(self._write, self._recorder)
        except OSError as error:
            _log.warning("%s: the flight recorder cannot be copied: %s", why, error)
        else:
            _log.warning("%s: flight recorder copied to %s", why, path)

    def _write(self, recorder: FlightRecorder) -> Path:
        now_ns = time.time_ns()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(now_ns // 1_000_000_000))
        stamp += f".{now_ns // 1_000_000 % 1000:03d}"
        path = self._path.with_name(f"{self._path.name}-{stamp}.json")
        write_atomically(path, json.dumps(blackbox.document(recorder.recorded())), mode=0o600)
        for old in sorted(_copies(self._path))[:-KEPT]:
            old.unlink(missing_ok=True)
        return path


class BurstDetector:
    """Tells a burst of drops from their daily rate. Pure."""

    def __init__(self) -> None:
        self._before: int | None = None
        self._rates: deque[int] = deque(maxlen=HISTORY)
        self._quiet_until = float("-inf")

    def look(self, drops: int | None, now: float) -> str:
        """Call once a second with the drops so far; what the burst is, or an empty text."""
        before, self._before = self._before, drops
        if drops is None or before is None:
            return ""
        rate = drops - before
        usual = sum(self._rates) / len(self._rates) if self._rates else 0.0
        self._rates.append(rate)
        if rate < max(BURST_MIN, BURST_FACTOR * usual) or now < self._quiet_until:
            return ""
        self._quiet_until = now + PAUSE_S
        return f"{rate} packets dropped within a second, {usual:.0f} a second before"


def _copies(path: Path) -> Iterator[Path]:
    """The copies there are."""
    stamp = f"{'[0-9]' * 8}T{'[0-9]' * 6}.{'[0-9]' * 3}"
    return path.parent.glob(f"{path.name}-{stamp}.json")
