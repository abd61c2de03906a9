"""Where the rounds of `tundp top` come from: a running daemon's admin socket, and /proc.

A look at the counters is GET /v1/status. Flows are added up from GET /v1/events, which is open
only while they are wanted. Both are paced: a daemon is kept busy a fifth of the time at most by the
looks, and this process a quarter of it by the records; what it cannot read is lost and counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tundp.admin import fetch_document, open_events
from tundp.errors import PlatformError, TundpError
from tundp.linux.threads import owner_of, threads_of
from tundp.observe.events import BadQuery, EventStream
from tundp.observe.top import Flows, TopRound
from tundp.top.counts import Sample, round_of, sample_of
from tundp.top.flows import SNAP, STAGES, FlowTable, PeerOf, peer_finder

ANSWER_SHARE: Final = 5
"""An interval is at least so many times as long as the daemon's answer takes."""
READ_SHARE: Final = 3
"""Behind each batch of records the reader rests so many times as long as it took."""
RING: Final = 1 << 22
"""Bytes of each worker's ring: 32,768 records."""
RETRY_S: Final = 1.0
"""Between two attempts to have events."""
NO_EVENTS_S: Final = 5.0
"""How long the first event stream may take to begin."""


class Source:
    """Asks one daemon; use from one event loop, and `close` it."""

    def __init__(self, path: Path, *, interval: float) -> None:
        self._path = path
        self._asked = interval
        self._took = 0.0
        self._before: Sample | None = None
        self._owner: tuple[int, int | None] = (0, None)
        self._flows: FlowFeed | None = None
        self._peer_of: tuple[object, PeerOf] = (None, lambda _: "")

    @property
    def interval(self) -> float:
        """Seconds between two looks: what was asked for, unless the daemon needs longer."""
        return max(self._asked, ANSWER_SHARE * self._took)

    @property
    def is_slowed(self) -> bool:
        """Whether it is longer than what was asked for."""
        return self.interval > self._asked

    def set_interval(self, seconds: float) -> None:
        """Ask for another interval."""
        self._asked = seconds

    async def set_flows(self, text: str | None) -> None:
        """Add up flows of packets that match this filter from now on; None: none."""
        if self._flows is not None:
            if text == self._flows.text:
                return
            await self._flows.close()
            self._flows = None
        if text is not None:
            self._flows = FlowFeed(self._path, text)

    async def flows_begin(self) -> None:
        """Wait until events come, or it is known why not, or NO_EVENTS_S are over."""
        if self._flows is not None:
            await self._flows.begin()

    async def look(self) -> TopRound:
        """The round since the last look; PlatformError if the daemon does not answer."""
        started = time.monotonic()
        document = await fetch_document(self._path)
        took = time.monotonic() - started
        # A single slow answer is no reason to wait for the next one as long.
        self._took = took if self._before is None else min(took, max(self._took, took / 2))
        after = sample_of(document, monotonic=started, ticks=self._ticks(document))
        found = round_of(self._before, after, interval_s=self.interval, flows=self._take(after))
        self._before = after
        return found

    async def close(self) -> None:
        """End the stream of events."""
        await self.set_flows(None)

    def _take(self, after: Sample) -> Flows | None:
        if self._flows is None:
            return None
        routing = after.document.get("routing") or {}
        version = (after.process, routing.get("generation"))
        if self._peer_of[0] != version:
            self._peer_of = version, peer_finder(after.document["peers"])
        return self._flows.take(self._peer_of[1])

    def _ticks(self, document: object) -> Mapping[str, tuple[int, float, float]]:
        """CPU time by kind of thread; nothing if the daemon's process is not seen from here."""
        pid = document.get("pid") if isinstance(document, dict) else None
        if not isinstance(pid, int):
            return {}
        if self._owner[0] != pid:
            self._owner = pid, owner_of(self._path, pid)
        owner = self._owner[1]
        found: dict[str, tuple[int, float, float]] = {}
        for thread in threads_of(owner) if owner is not None else ():
            kind = kind_of(thread.name, is_main=thread.tid == owner)
            count, user, system = found.get(kind, (0, 0.0, 0.0))
            found[kind] = count + 1, user + thread.user_s, system + thread.system_s
        return {kind: found[kind] for kind in ("packets", "loop", "others") if kind in found}


def kind_of(name: str, *, is_main: bool) -> str:
    """What a thread of a daemon does: packet threads are named by the engine (`tundp-gso-0`)."""
    if is_main:
        return "loop"
    parts = name.split("-")
    return "packets" if len(parts) == 3 and parts[0] == "tundp" and parts[2].isdigit() else "others"


class FlowFeed:
    """Adds up the flows of packets that match a filter while it is open."""

    def __init__(self, path: Path, text: str) -> None:
        self.text = text
        self._path = path
        self._table = FlowTable()
        self._error = ""
        self._stream: EventStream | None = None
        self._lost_before = self._lost_taken = 0
        self._taken_at = time.monotonic()
        self._has_begun = asyncio.Event()
        self._task = asyncio.ensure_future(self._follow())

    async def begin(self) -> None:
        """See Source.flows_begin."""
        try:
            async with asyncio.timeout(NO_EVENTS_S):
                await self._has_begun.wait()
        except TimeoutError:
            self._error = self._error or f"no events come from the daemon on {self._path}"

    def take(self, peer_of: PeerOf) -> Flows:
        """The flows since the last call."""
        now, lost = time.monotonic(), self.lost
        found = self._table.take(
            seconds=now - self._taken_at,
            lost=lost - self._lost_taken,
            peer_of=peer_of,
            text=self.text,
            error=self._error,
        )
        self._taken_at, self._lost_taken = now, lost
        return found

    @property
    def seen(self) -> int:
        """Records read since the last call of `take`."""
        return self._table.records

    @property
    def lost(self) -> int:
        """Records lost since the start, as far as the daemon has told."""
        return self._lost_before + (0 if self._stream is None else self._stream.lost)

    async def close(self) -> None:
        """End it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            try:
                await self._read()
                self._error = f"the daemon on {self._path} ended the events"
            except (TundpError, BadQuery) as error:
                self._error = f"no flows: {error}"
            self._has_begun.set()
            await asyncio.sleep(RETRY_S)

    async def _read(self) -> None:
        """Read until the daemon ends the stream. PlatformError, BadQuery."""
        query = {"filter": self.text, "stages": STAGES, "snap": str(SNAP), "size": str(RING)}
        async with open_events(self._path, query) as stream:
            self._error = ""
            if not self._has_begun.is_set():
                self._taken_at = time.monotonic()
                self._has_begun.set()
            self._stream = stream
            try:
                async for _, data in stream.raw():
                    started = time.perf_counter()
                    self._table.add(data)
                    await asyncio.sleep(READ_SHARE * (time.perf_counter() - started))
            except ValueError as error:
                raise PlatformError(f"the daemon's events cannot be read: {error}") from None
            finally:
                self._lost_before, self._stream = self.lost, None
