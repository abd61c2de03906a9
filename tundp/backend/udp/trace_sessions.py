"""Traces that other nodes have this one make: of the packets that it exchanges with each of them.

The filter is the other node's, joined with both ends: one address in the subnets that our routing
table gives to it, one in our own. The packet threads run it, and each record's addresses are looked
up again: a subnet in another one may be a third node's.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Final

from tundp.backend.udp.peer_table import PeerTable
from tundp.engine.base import Dataplane
from tundp.engine.taps import RING_LEN_MIN, Tap, TapRequest
from tundp.errors import FilterError, TooManyReaders
from tundp.lease.fib import LOCAL_HOP_ID
from tundp.lease.model import Peer
from tundp.wire import peer_bodies
from tundp.wire.drop import DropReason
from tundp.wire.event import HEADER_LEN, Record, padded_len, unpack
from tundp.wire.filter import parse
from tundp.wire.peer_bodies import PeerRecord, Refusal, Refused, TraceStart

SESSIONS_MAX: Final = 4
"""On one node."""
SILENT_S: Final = 5.0
"""A session nobody asks for so long ends."""
BUFFER_RECORDS: Final = 2000
"""Of one session; of more the oldest are lost."""
NOT_OURS: Final = "not proto 253 and not quoted proto 253"
"""Messages between nodes, and what kernels say of them: each answer would make more records."""
_SUBNETS_MAX: Final = 8
"""Subnets of one node in a filter."""
_DRAIN_S: Final = 0.1
"""Between two looks at the ring."""
_DRAIN_LEAST_S: Final = 0.05
_DRAIN_RECORDS: Final = 250
"""Taken from a ring in one look: so many a session are all a flood costs the event loop."""
_CAPTURED_LEAST: Final = 28
"""Addresses, id, and the first bytes behind the header: what tells a packet from others."""
_SIZE_LEN: Final = 4
_REASONS: Final = tuple(DropReason)


class _Session:
    """One trace for one peer."""

    def __init__(
        self, peer: Peer, tap: Tap, seconds: float, is_between: Callable[[bytes], bool]
    ) -> None:
        self.number = secrets.randbits(64)
        self.peer = peer
        self._tap = tap
        self._is_between = is_between
        self._records: deque[PeerRecord] = deque()
        self._sequence = 0
        self._skipped = 0
        self._clock = asyncio.get_running_loop().time
        self._drained_at = self.asked_at = self._clock()
        self._ends_at = self.asked_at + seconds
        self._unix_ns = time.time_ns() - time.monotonic_ns()

    @property
    def is_over(self) -> bool:
        """Whether its time is up, or nobody asks for it."""
        now = self._clock()
        return now >= self._ends_at or now >= self.asked_at + SILENT_S

    @property
    def lost(self) -> int:
        return self._skipped + sum(self._tap.lost())

    def drain(self) -> None:
        """Take what the packet threads have written meanwhile."""
        if (now := self._clock()) < self._drained_at + _DRAIN_LEAST_S:
            return
        self._drained_at = now
        for worker, data in self._tap.read():
            skipped, rest = _newest(data, _DRAIN_RECORDS)
            self._skipped += skipped
            for record in unpack(rest):
                if self._is_between(record.packet):
                    self._put(worker, record)

    def take(self, after: int, room: int) -> bytes:
        """The body of the answer: records behind number `after`; up to that they have come."""
        self.asked_at = self._clock()
        self.drain()
        while self._records and _is_up_to(self._records[0].sequence, after):
            self._records.popleft()
        packed: list[bytes] = []
        left = peer_bodies.records_room(room)
        for record in self._records:
            data = peer_bodies.pack_record(record)
            if len(data) > left and not packed:
                # A small MTU: a shorter record is better than none.
                short = record.packet[: max(_CAPTURED_LEAST, len(record.packet) - len(data) + left)]
                data = peer_bodies.pack_record(replace(record, packet=short))
            if len(data) > left:
                break
            packed.append(data)
            left -= len(data)
        more = len(packed) < len(self._records)
        return peer_bodies.pack_records(self.lost, packed, more=more)

    def close(self) -> None:
        self._tap.close()

    def _put(self, worker: int, record: Record) -> None:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        self._records.append(
            PeerRecord(
                sequence=self._sequence,
                time_ns=record.time_ns + self._unix_ns,
                stage=record.stage,
                is_dropped=record.is_dropped,
                error=record.error,
                length=record.length,
                packets=record.packets,
                together=record.together,
                gso_size=record.gso_size,
                packet_id=record.packet_id,
                more_ids=record.more_ids,
                worker=min(worker, 255),
                reason=_REASONS[record.reason].label if record.is_dropped else "",
                packet=record.packet,
            )
        )
        if len(self._records) > BUFFER_RECORDS:
            self._records.popleft()
            self._skipped += 1


class TraceSessions:
    """See the module. Made on the event loop's thread; every method is called there."""

    def __init__(self, engine: Dataplane, own_subnet: IPv4Network, table: PeerTable) -> None:
        self._engine = engine
        self._own_subnet = own_subnet
        self._table = table
        self._sessions: dict[int, _Session] = {}
        """By hop id."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def start(self, peer: Peer, wanted: TraceStart) -> int | Refusal:
        """Begin a trace for a peer, in place of one it has; the number of the session."""
        self._end_those_over()
        hop_id = peer.hop_id
        if hop_id not in self._sessions and len(self._sessions) >= SESSIONS_MAX:
            return Refusal(
                Refused.NO_TRACE, f"{SESSIONS_MAX} traces of other nodes are running there already"
            )
        text = self._joined(hop_id, wanted.filter)
        if isinstance(text, Refusal):
            return text
        try:
            tap = self._engine.open_tap(
                TapRequest(filter=parse(text), snap=peer_bodies.CAPTURED_MAX, size=RING_LEN_MIN)
            )
        except FilterError as error:
            return Refusal(
                Refused.BAD_FILTER, f"too long, with the addresses of both nodes: {error.reason}"
            )
        except TooManyReaders as error:
            return Refusal(Refused.NO_TRACE, str(error))
        session = _Session(
            peer, tap, wanted.seconds, lambda packet: self._is_between(packet, hop_id)
        )
        self._end(hop_id)
        self._sessions[hop_id] = session
        if self._timer is None:
            self._look_later()
        return session.number

    def next(self, peer: Peer, number: int, after: int, room: int) -> bytes | Refusal:
        """The body of the answer to TRACE_NEXT, at most `room` bytes."""
        self._end_those_over()
        session = self._sessions.get(peer.hop_id)
        if session is None or session.number != number:
            return Refusal(Refused.NO_SESSION, "that trace has ended")
        return session.take(after, room)

    def stop(self, peer: Peer, number: int) -> None:
        """End a session; of no other peer, and no other session."""
        session = self._sessions.get(peer.hop_id)
        if session is not None and session.number == number:
            self._end(peer.hop_id)

    def forget(self, hop_id: int) -> None:
        """The hop is gone, or stands for another node."""
        self._end(hop_id)

    def close(self) -> None:
        """End all. Harmless when repeated."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for hop_id in list(self._sessions):
            self._end(hop_id)

    def _joined(self, hop_id: int, wanted: str) -> str | Refusal:
        """The filter, of packets that the two nodes exchange."""
        try:
            packets = parse(wanted).text
        except FilterError as error:
            return Refusal(Refused.BAD_FILTER, str(error))
        subnets = self._table.subnets_of(hop_id)
        if not 1 <= len(subnets) <= _SUBNETS_MAX:
            return Refusal(
                Refused.NO_TRACE, f"that node has {len(subnets)} subnets: 1 to {_SUBNETS_MAX}"
            )
        theirs = " or ".join(f"net {subnet}" for subnet in subnets)
        ends = f"net {self._own_subnet} and ({theirs}) and {NOT_OURS}"
        return f"({packets}) and {ends}" if packets else ends

    def _is_between(self, packet: bytes, hop_id: int) -> bool:
        """Whether the longest prefixes give one address to us, the other to the peer."""
        hops = {self._table.hop_of(int.from_bytes(packet[at : at + 4], "big")) for at in (12, 16)}
        return hops == {LOCAL_HOP_ID, hop_id}

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_DRAIN_S, self._look)

    def _look(self) -> None:
        self._timer = None
        self._end_those_over()
        for session in self._sessions.values():
            session.drain()
        if self._sessions:
            self._look_later()

    def _end_those_over(self) -> None:
        for hop_id in [hop_id for hop_id, each in self._sessions.items() if each.is_over]:
            self._end(hop_id)

    def _end(self, hop_id: int) -> None:
        if (session := self._sessions.pop(hop_id, None)) is not None:
            session.close()


def _newest(data: bytes, most: int) -> tuple[int, memoryview]:
    """How many records at the beginning are skipped, and the rest: at most `most` records."""
    starts: deque[int] = deque(maxlen=most)
    count = at = 0
    while at + HEADER_LEN <= len(data):
        starts.append(at)
        count += 1
        at += max(padded_len(0), int.from_bytes(data[at : at + _SIZE_LEN], sys.byteorder))
    return count - len(starts), memoryview(data)[starts[0] if starts else len(data) :]


def _is_up_to(sequence: int, after: int) -> bool:
    """Whether a number of 32 bits that wraps is at most `after`."""
    return (after - sequence) & 0xFFFFFFFF < 1 << 31
