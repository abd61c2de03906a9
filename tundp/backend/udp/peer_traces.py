"""Follows a trace on another node: begins it, fetches its records, ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, Protocol, TypeVar

from tundp.backend.peers import (
    Asked,
    Outcome,
    TraceBegun,
    TraceEnded,
    TraceLost,
    TracePart,
    clock_of,
)
from tundp.lease.model import Peer
from tundp.wire import peer_bodies
from tundp.wire.peer_bodies import SECONDS_MAX, Hello, Records, TraceStart
from tundp.wire.peer_message import Kind, Malformed

BUSY_S: Final = 0.05
"""Between two questions while records come."""
IDLE_S: Final = 0.2
NOTE_S: Final = 1.0
"""Between two signs of life, at most."""
_HELLOS: Final = 3
"""Of so many the one that took least tells the clock."""
_BEGIN_AGAIN_S: Final = SECONDS_MAX - 5.0
"""A trace that lasts longer than a session gets another one."""
_BEGIN_MAX: Final = 3
"""Times in a row that a session is begun before the other node has given one record or none."""
_MISSES_MAX: Final = 2
"""Questions in a row without an answer, each asked twice: the node is gone."""

T = TypeVar("T")


class Asking(Protocol):
    """Who asks a peer: see PeerAsks."""

    def ask(
        self, peer: Peer, kind: Kind, body: bytes, parse: Callable[[bytes], T]
    ) -> Awaitable[Asked[T]]:
        """See PeerAsks."""
        ...

    def tell(self, peer: Peer, kind: Kind, body: bytes) -> None:
        """See PeerAsks."""
        ...


class PeerTrace:
    """One trace on one other node."""

    def __init__(self, asks: Asking, peer: Peer, packets: str) -> None:
        """packets: the filter."""
        self._asks = asks
        self._peer = peer
        self._packets = packets
        self._session: int | None = None
        self._after = 0
        self._lost = 0
        """Records of the session that were lost, and of those before."""
        self._lost_before = 0

    async def parts(self, seconds: float | None) -> AsyncGenerator[TracePart, None]:
        """What the other node sees, until `seconds` are over, it fails, or this is closed.

        TooBusy.
        """
        clock = asyncio.get_running_loop().time
        ends_at = None if seconds is None else clock() + seconds
        try:
            hello = await self._hello()
            if isinstance(hello, TraceEnded):
                yield hello
                return
            if (refused := await self._begin(seconds)) is not None:
                yield refused
                return
            yield hello
            async for part in self._follow(ends_at):
                yield part
        finally:
            self._end()

    async def _hello(self) -> TraceBegun | TraceEnded:
        best: TraceBegun | None = None
        for _ in range(_HELLOS):
            asked: Asked[Hello] = await self._asks.ask(
                self._peer, Kind.HELLO, b"", peer_bodies.parse_hello
            )
            clock = clock_of(asked)
            if asked.answer is None or clock is None:
                # One that was answered before is there: a lost question is no end.
                return best or TraceEnded(asked.outcome, asked.detail)
            if best is None or clock.error_ns < best.clock.error_ns:
                best = TraceBegun(asked.answer, clock)
        assert best is not None
        return best

    async def _begin(self, seconds: float | None) -> TraceEnded | None:
        """Begin a session; why it cannot be."""
        wanted = SECONDS_MAX if seconds is None else max(1, min(SECONDS_MAX, int(seconds) + 2))
        try:
            body = peer_bodies.pack_trace_start(TraceStart(wanted, self._packets))
        except Malformed as error:
            return TraceEnded(Outcome.NOT_SENT, str(error))
        asked = await self._asks.ask(self._peer, Kind.TRACE_START, body, peer_bodies.parse_session)
        if asked.answer is None:
            return TraceEnded(asked.outcome, asked.detail)
        self._session, self._after = asked.answer, 0
        self._lost_before, self._lost = self._lost_before + self._lost, 0
        return None

    async def _follow(self, ends_at: float | None) -> AsyncGenerator[TracePart, None]:
        clock = asyncio.get_running_loop().time
        began_at, noted_at = clock(), clock()
        told, misses, begun = 0, 0, 1
        while ends_at is None or clock() < ends_at:
            assert self._session is not None
            asked: Asked[Records] = await self._asks.ask(
                self._peer,
                Kind.TRACE_NEXT,
                peer_bodies.pack_trace_next(self._session, self._after),
                peer_bodies.parse_records,
            )
            found = asked.answer
            if found is None:
                misses += 1
                is_answered = asked.outcome is Outcome.ANSWER
                if misses >= _MISSES_MAX and not is_answered:
                    yield TraceEnded(asked.outcome, asked.detail)
                    return
                if is_answered and begun >= _BEGIN_MAX:
                    yield TraceEnded(asked.outcome, f"the trace there ended: {asked.detail}")
                    return
            else:
                misses, begun = 0, 1
                for record in found.records:
                    yield record
                if found.records:
                    self._after = found.records[-1].sequence
                self._lost = found.lost
            is_over = clock() - began_at >= _BEGIN_AGAIN_S and not (found and found.records)
            if is_over or (found is None and asked.outcome is Outcome.ANSWER):
                # Its time is up, or the other node was started again.
                left = None if ends_at is None else ends_at - clock()
                if (refused := await self._begin(left)) is not None:
                    yield refused
                    return
                began_at, begun = clock(), begun + 1
            lost = self._lost_before + self._lost
            is_empty = found is not None and not found.records
            if is_empty or lost != told or clock() - noted_at >= NOTE_S:
                told, noted_at = lost, clock()
                yield TraceLost(lost, is_empty)
            await asyncio.sleep(BUSY_S if found and found.records else IDLE_S)

    def _end(self) -> None:
        if self._session is not None:
            self._asks.tell(self._peer, Kind.TRACE_STOP, peer_bodies.pack_session(self._session))
            self._session = None
