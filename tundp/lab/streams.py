"""What a path loses: numbered UDP both ways at a rate, a TCP stream, each packet accounted for.

    async with Streams(node1, node2, rate=10_000) as streams:
        streams.mark("kill -9")
        ...
        await streams.flow()
    assert streams.result.lost == 0

Each direction has a sender in C, which writes down when each number was sent, and a receiver in C,
which writes down each that comes, in order (lab/generators.py): threads of their own, without the
GIL, in the pods' namespaces. What was lost, when, and what came twice or late is computed
afterwards, from these two lists (lab/losses.py). Numbers count from 0, once the path is known to
carry packets. Times are CLOCK_MONOTONIC, one clock for both ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from tundp.errors import LabError
from tundp.lab import generators
from tundp.lab.generators import Generator, Numbered
from tundp.lab.lab import Host, finish
from tundp.lab.losses import Circumstances, Direction, Ints, Stream, StreamsResult, judge
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import ping

PORT: Final = 9100
SIZE: Final = 100
"""Bytes of a datagram, without headers."""
PATH_S: Final = 30.0
"""How long it may take until the path answers a ping, or delivers again."""
SETTLE_S: Final = 0.3
"""No arrival for so long, and nothing is under way any more."""
SETTLE_MAX_S: Final = 5.0
LONGEST_S: Final = 180.0


@dataclass(frozen=True, slots=True)
class End:
    """One end of the streams: a host, its address, and how it is called."""

    host: Host
    address: str
    name: str

    @classmethod
    def of(cls, end: LabNode | End) -> End:
        """Of a node, its pod."""
        if isinstance(end, End):
            return end
        return cls(end.pod, end.pod_address, f"pod{end.number}")


class Streams:
    """Sends while the block lasts; `result` is there after it.

    LabError if the path between the two does not answer at first, or if a generator cannot start
    or ends by itself. The second pod is a LabNode's, so that its address is known.
    """

    def __init__(
        self,
        left: LabNode | End,
        right: LabNode | End,
        *,
        rate: int = 1000,
        tcp: bool = False,
        tcp_pace: int | None = None,
        port: int = PORT,
    ) -> None:
        """Between these two.

        rate: datagrams a second each way, 0 for none. tcp: a stream from left to right, too, at
        `tcp_pace` bytes a second or at full speed. port: of the datagrams; TCP has the next one.
        """
        ends = (End.of(left), End.of(right))
        self._rate = rate
        self._ways = [_Way(source, sink, rate, port) for source, sink in (ends, ends[::-1]) if rate]
        self._tcp = _Tcp(*ends, port + 1, tcp_pace) if tcp else None
        self._ends = ends
        self._started_ns = 0
        self._marks: list[tuple[str, float]] = []
        self._result: StreamsResult | None = None

    @property
    def result(self) -> StreamsResult:
        """What became of it, once the block has ended."""
        assert self._result is not None, "the streams have not ended yet"
        return self._result

    @property
    def now_s(self) -> float:
        """Seconds since the streams began."""
        return (time.monotonic_ns() - self._started_ns) / 1e9

    def mark(self, name: str) -> None:
        """Write down that this happens now, to stand beside the losses."""
        self._marks.append((name, self.now_s))

    def check(self) -> None:
        """LabError if a generator ended by itself. A TCP stream that did is in the result."""
        for way in self._ways:
            for generator in way.generators:
                generator.check()

    async def flow(self, count: int = 100) -> None:
        """Wait until each way has delivered `count` datagrams that are sent from now on.

        And the TCP stream, while it lives, something. LabError if one does not within PATH_S.
        """
        waiting = [way.delivered_since(way.sent, count) for way in self._ways]
        if self._tcp is not None:
            waiting.append(self._tcp.delivered_since(self._tcp.received))
        deadline = time.monotonic() + PATH_S
        while not all(is_done() for is_done in waiting):
            self.check()
            if time.monotonic() > deadline:
                raise LabError(
                    f"{self._ends[0].name} and {self._ends[1].name}: nothing flows for {PATH_S:g} s"
                )
            await asyncio.sleep(0.01)

    async def __aenter__(self) -> Self:
        await _wait_for_path(*self._ends)
        try:
            for generator in self._generators(lambda way: way.receiver):
                await finish(asyncio.to_thread(generator.start))
            self._started_ns = time.monotonic_ns()
            for generator in self._generators(lambda way: way.sender):
                await finish(asyncio.to_thread(generator.start))
        except BaseException:
            await finish(self._stop())
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await finish(self._end())

    def _generators(self, which: Callable[[_Way | _Tcp], Generator]) -> list[Generator]:
        ways: list[_Way | _Tcp] = [*self._ways]
        return [which(each) for each in (ways if self._tcp is None else [*ways, self._tcp])]

    async def _end(self) -> None:
        try:
            for generator in self._generators(lambda way: way.sender):
                await asyncio.to_thread(generator.stop)
            seconds = self.now_s
            await self._settle()
        finally:
            await self._stop()
        self.check()
        self._result = StreamsResult(
            rate=self._rate,
            seconds=seconds,
            directions=tuple(way.judged(self._started_ns) for way in self._ways),
            stream=None if self._tcp is None else self._tcp.judged(self._started_ns),
            marks=tuple(self._marks),
        )

    async def _settle(self) -> None:
        """Until everything has come, or nothing comes any more."""
        deadline = time.monotonic() + SETTLE_MAX_S
        quiet_since, seen = time.monotonic(), -1
        while time.monotonic() < min(deadline, quiet_since + SETTLE_S):
            count = sum(way.receiver.counted().samples for way in self._ways)
            if count != seen:
                quiet_since, seen = time.monotonic(), count
            await asyncio.sleep(0.01)

    async def _stop(self) -> None:
        for which in (lambda way: way.sender, lambda way: way.receiver):
            for generator in self._generators(which):
                await asyncio.to_thread(generator.stop)


class _Way:
    """One direction: its two generators and their lists."""

    def __init__(self, source: End, sink: End, rate: int, port: int) -> None:
        capacity = int(rate * LONGEST_S)
        self._name = f"{source.name} > {sink.name}"
        self._rate = rate
        self._pattern = generators.pattern()
        self._sent_ns: Ints = np.zeros(capacity, np.uint64)
        self._arrivals = Numbered.room_for(capacity + capacity // 4)
        run_id = generators.next_run()
        self.receiver = generators.numbered_receiver(
            *(sink.host, sink.address, port, self._pattern),
            run_id=run_id,
            size=SIZE,
            arrivals=self._arrivals,
        )
        self.sender = generators.numbered_sender(
            *(source.host, sink.address, port, self._pattern),
            run_id=run_id,
            size=SIZE,
            rate=rate,
            sent_ns=self._sent_ns,
        )

    @property
    def generators(self) -> tuple[Generator, Generator]:
        return self.receiver, self.sender

    @property
    def sent(self) -> int:
        """Numbers used up so far."""
        counted = self.sender.counted()
        return counted.messages + counted.refused

    def delivered_since(self, number: int, count: int) -> Callable[[], bool]:
        """Whether `count` with this number and higher ones, not sent yet, have come."""
        before = self.receiver.counted().samples

        def is_done() -> bool:
            numbers = self._arrivals.numbers[before : self.receiver.counted().samples]
            return int(np.count_nonzero(numbers >= number)) >= count

        return is_done

    def judged(self, started_ns: int) -> Direction:
        sender, receiver = self.sender.counted(), self.receiver.counted()
        sent, came = self.sent, receiver.samples
        return judge(
            self._name,
            self._sent_ns[:sent],
            Numbered(self._arrivals.numbers[:came], self._arrivals.at_ns[:came]),
            Circumstances(
                started_ns=started_ns,
                rate=self._rate,
                refused=sender.refused,
                corrupt=receiver.corrupt,
                missed=self.receiver.kernel_drops,
                late_s=sender.late_ns / 1e9,
            ),
        )


class _Tcp:
    """The stream: its two generators."""

    def __init__(self, left: End, right: End, port: int, pace: int | None) -> None:
        data = generators.pattern()
        where = (right.address, port, data)
        self.receiver = generators.stream_receiver(right.host, *where)
        self.sender = generators.stream_sender(left.host, *where, pace=pace)

    @property
    def received(self) -> int:
        return self.receiver.counted().bytes

    def delivered_since(self, received: int) -> Callable[[], bool]:
        """Whether more than so many bytes have come, or none will."""
        return lambda: (
            self.received > received
            or bool(self.sender.traffic.error or self.receiver.traffic.error)
        )

    def judged(self, started_ns: int) -> Stream:
        counted = self.receiver.counted()
        code = self.sender.traffic.error or self.receiver.traffic.error
        return Stream(
            received=counted.bytes,
            corrupt=counted.corrupt,
            error=os.strerror(code) if code else "",
            longest_stall_s=counted.stall_ns / 1e9,
            stall_at_s=(counted.stall_at_ns - started_ns) / 1e9,
        )


async def _wait_for_path(left: End, right: End) -> None:
    """Pings both ways until one comes back: neighbours are resolved, and the path is there."""
    deadline = time.monotonic() + PATH_S
    for source, sink in ((left, right), (right, left)):
        while True:
            answer = None
            with contextlib.suppress(OSError):  # no route as yet
                answer = await ping(source.host, sink.address, timeout_s=0.5)
            if answer is not None and answer.is_echo_reply:
                break
            await asyncio.sleep(0.01)
            if time.monotonic() > deadline:
                raise LabError(f"{source.name} has no path to {sink.address}")
