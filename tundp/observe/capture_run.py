"""A capture while it runs: from the stream of events to its outputs, until something ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from tundp.errors import PlatformError
from tundp.observe.capture import Entry, Recorder
from tundp.observe.capture_output import DRAIN_S, FLUSH_LEN, CaptureOutput
from tundp.observe.capture_pcapng import PcapngFile
from tundp.observe.events import Event

IDLE_S: Final = 0.25
"""Without an event for so long, nothing is left of what passed before the end."""
CATCH_UP_S: Final = 30.0
"""At the end, for what passed before it and was not read yet."""
_PAST_NS: Final = 100_000_000
"""Behind the end: a worker's records may come so much later than another's."""


class EventSource(Protocol):
    """What a capture reads: events, and how many were lost because nobody read them in time."""

    @property
    def lost(self) -> int:
        """Since the stream was opened."""
        ...

    def __aiter__(self) -> AsyncIterator[Event]:
        """Events, oldest first within a worker."""
        ...


@dataclass(slots=True)
class CaptureRun:
    """One capture and its outputs, which it does not close."""

    recorder: Recorder
    file: PcapngFile
    to_file: CaptureOutput | None
    to_lines: CaptureOutput | None
    line: Callable[[Entry], str]
    lost_line: Callable[[int], str]
    count_max: int | None = None
    """Packets after which it ends; packets, not reads: an inner and its outer one are two."""
    clock: Callable[[], int] = time.time_ns
    """Nanoseconds since 1970, by the clock of the events."""
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to end at once, whatever was not read yet."""
    os_dropped: Callable[[], Awaitable[Mapping[str, int]]] | None = None
    """Packets the kernel has lost since the capture began, by interface; asked at the end."""
    count: int = 0
    lost: int = 0
    has_source_ended: bool = False
    """Whether the source came to its end, rather than the capture."""
    _seen: int = 0
    _end_ns: int | None = None
    _dirty: asyncio.Event = field(default_factory=asyncio.Event)
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, source: EventSource, stop: asyncio.Event, for_s: float | None) -> None:
        """Capture until the source ends, `stop`, so many seconds, or so many packets.

        What passed before the end and was not read yet is read then. The file is ended properly
        whatever the reason; then what ended it is raised: BrokenPipeError if nobody reads,
        PlatformError if the daemon or the disk failed.
        """
        if self.to_file is not None:
            self.to_file.put(self.file.head())
            await self._flush()
        async with contextlib.AsyncExitStack() as stack:
            gone = asyncio.Event()
            for output in self._outputs():
                await stack.enter_async_context(output.watched(gone))
            following = asyncio.create_task(self._follow(source))
            tasks = [
                following,
                asyncio.create_task(self._flush_batches()),
                asyncio.create_task(_true_when(stop)),
                asyncio.create_task(_raise_when(gone)),
            ]
            try:
                await asyncio.wait(tasks, timeout=for_s, return_when=asyncio.FIRST_COMPLETED)
                await self._catch_up(tasks)
            finally:
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
        failure = next((each for each in ends if isinstance(each, Exception)), None)
        if isinstance(failure, BrokenPipeError):
            raise failure
        if failure is None:
            await self._end()
        else:
            # The end may still fit on a full disk; if not, the file stays without statistics.
            with contextlib.suppress(PlatformError, BrokenPipeError):
                await self._end()
            raise failure

    async def _catch_up(self, tasks: list[asyncio.Task[None]]) -> None:
        """Let `_follow` read what passed before now; not if something failed."""
        following, flushing, _, reading = tasks
        if following.done() or flushing.done() or reading.done():
            return
        self._end_ns = self.clock()
        hurry = asyncio.create_task(_true_when(self.hurry))
        give_up_at = asyncio.get_running_loop().time() + CATCH_UP_S
        running = {following, flushing, reading, hurry}
        try:
            while asyncio.get_running_loop().time() < give_up_at:
                seen = self._seen
                done, _ = await asyncio.wait(
                    running, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED
                )
                if done or self._seen == seen:
                    return
        finally:
            hurry.cancel()
            await asyncio.gather(hurry, return_exceptions=True)

    async def _follow(self, source: EventSource) -> None:
        async for event in source:
            self._seen += 1
            lost = source.lost
            if lost > self.lost:
                self.file.lost(lost - self.lost)
                if self.to_lines is not None:
                    self.to_lines.put(f"{self.lost_line(lost - self.lost)}\n".encode())
                self.lost = lost
            if self._end_ns is not None and event.time_ns > self._end_ns:
                if event.time_ns > self._end_ns + _PAST_NS:
                    break
                continue
            for entry in self.recorder.entries(event):
                await self._put(entry)
                self.count += 1
                if self.count == self.count_max:
                    return
            self._dirty.set()
        else:
            self.has_source_ended = True
        self.lost = source.lost

    async def _put(self, entry: Entry) -> None:
        output = self.to_file
        if output is not None:
            if output.is_full:
                await self._next_file(output)
            output.put(self.file.packet(entry))
        if self.to_lines is not None:
            self.to_lines.put(f"{self.line(entry)}\n".encode(errors="backslashreplace"))
        if any(each.pending > FLUSH_LEN for each in self._outputs()):
            await self._flush()

    async def _next_file(self, output: CaptureOutput) -> None:
        output.put(self.file.tail(self.clock(), lost=self.lost))
        await self._flush()
        output.next_file()
        output.put(self.file.head())

    async def _flush_batches(self) -> None:
        """Write whenever no event is left to read: this task runs when `_follow` has to wait."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._flush()

    async def _flush(self) -> None:
        async with self._writing:
            for output in self._outputs():
                await output.flush()

    async def _end(self) -> None:
        """End the file properly. A reader that does not read gets no more than DRAIN_S seconds."""
        if self.to_file is not None:
            os_dropped = {} if self.os_dropped is None else await self.os_dropped()
            tail = self.file.tail(self.clock(), lost=self.lost, os_dropped=os_dropped)
            self.to_file.put(tail)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._flush()

    def _outputs(self) -> list[CaptureOutput]:
        return [each for each in (self.to_file, self.to_lines) if each is not None]


async def _true_when(event: asyncio.Event) -> None:
    await event.wait()


async def _raise_when(gone: asyncio.Event) -> None:
    await gone.wait()
    raise BrokenPipeError
