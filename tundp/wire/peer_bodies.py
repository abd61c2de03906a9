"""Bodies of the messages between nodes: wire/peer_message.py. Version 1, big-endian.

    HELLO          -> u64 received, u64 sent (Unix ns), u32 uptime (s), u16 MTU, u16 port,
                      text implementation, text version, text engine
    REACH          u32 start -> u32 total, u32 start, entries of u32 network, u8 prefix length,
                      u8 state, u32 round-trip time (us, 0 unknown), u16 path MTU (0 unknown)
    TRACE_START    u16 seconds, text filter -> u64 session
    TRACE_NEXT     u64 session, u32 sequence -> u32 lost, u8 more follow, records after that number
    TRACE_STOP     u64 session -> nothing
    REFUSED        answer only: u8 Refused, text; UNSUPPORTED is the one of every version, and the
                   version in its header is the highest its sender speaks

A text is a u16 length and UTF-8. A record: u32 sequence, u64 time (Unix ns), u8 stage, u8 is it
dropped, u16 errno, u32 length, u32 packets, u32 together, u16 gso_size, u64 packet id, u32 more
ids, u8 worker, u8 length and name of the drop reason, u8 length and first bytes of the packet.

Each `pack_` gives bytes, each `parse_` takes any and raises Malformed, nothing else. What a newer
version of a node puts behind a body that is known here is ignored, but for tables.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import Final, NamedTuple

from tundp.wire.peer_message import Malformed

FILTER_MAX: Final = 1000
"""Bytes of a filter in a question."""
CAPTURED_MAX: Final = 64
"""Bytes of a packet in a record."""
SECONDS_MAX: Final = 60
"""Of one trace session."""
IMPLEMENTATION: Final = "tundp"

_HELLO: Final = struct.Struct("!QQIHH")
_REACH_HEAD: Final = struct.Struct("!II")
_REACH_ENTRY: Final = struct.Struct("!IBBIH")
_SECONDS: Final = struct.Struct("!H")
_NUMBER: Final = struct.Struct("!I")
_SESSION: Final = struct.Struct("!Q")
_NEXT: Final = struct.Struct("!QI")
_RECORDS_HEAD: Final = struct.Struct("!IB")
_RECORD: Final = struct.Struct("!IQBBHIIIHQIB")
_TEXT_LEN: Final = struct.Struct("!H")
_REASON_MAX: Final = 64


@unique
class Refused(IntEnum):
    """Why a question is not answered."""

    UNSUPPORTED = 1
    """An unknown kind, or another version."""
    BAD_QUESTION = 2
    BAD_FILTER = 3
    NO_TRACE = 4
    """Too many traces or readers."""
    NO_SESSION = 5
    """It has ended, or another trace of the same node replaced it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who answers."""

    received_ns: int
    """Unix time the question was read, by the answering node's clock."""
    sent_ns: int
    """Unix time the answer was made."""
    uptime_s: int
    mtu: int
    """Of its TUN."""
    port: int
    implementation: str
    version: str
    engine: str


class ReachEntry(NamedTuple):
    """How the answering node reaches one peer."""

    network: int
    """The lease's network, host order."""
    prefix_len: int
    state: int
    """0: nothing is known; else engine.reach.Standing by its place."""
    rtt_us: int
    """0: not known."""
    path_mtu: int
    """Bytes of an inner packet; 0: not known."""


@dataclass(frozen=True, slots=True)
class Reaches:
    """Part of a table, sorted by network."""

    total: int
    """Entries of the whole table."""
    start: int
    entries: tuple[ReachEntry, ...]


@dataclass(frozen=True, slots=True)
class TraceStart:
    """A wish to see the packets exchanged between the two nodes."""

    seconds: int
    filter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """An event record of the other node; see wire.event.Record for what is not described."""

    sequence: int
    """Grows by one from record to record of a session, from 1 on; modulo 2^32."""
    time_ns: int
    """Unix time, by the other node's clock."""
    stage: int
    is_dropped: bool
    error: int
    length: int
    packets: int
    together: int
    gso_size: int
    packet_id: int
    more_ids: int
    worker: int
    reason: str
    """Name of the drop reason; empty if it was not dropped."""
    packet: bytes
    """The first bytes, at most CAPTURED_MAX."""


@dataclass(frozen=True, slots=True)
class Records:
    """What a session has seen since."""

    lost: int
    """Records of the session that had no room so far; modulo 2^32."""
    more: bool
    """Whether there are records already that did not fit."""
    records: tuple[PeerRecord, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer."""

    why: int
    """Refused; of a newer node maybe a number without a name."""
    text: str


def pack_hello(hello: Hello) -> bytes:
    """The body of the answer to HELLO."""
    return _HELLO.pack(
        hello.received_ns, hello.sent_ns, hello.uptime_s, hello.mtu, hello.port
    ) + b"".join(map(_text, (hello.implementation, hello.version, hello.engine)))


def parse_hello(body: bytes) -> Hello:
    """See pack_hello."""
    reader = _Reader(body)
    received_ns, sent_ns, uptime_s, mtu, port = reader.unpack(_HELLO)
    return Hello(
        received_ns=received_ns,
        sent_ns=sent_ns,
        uptime_s=uptime_s,
        mtu=mtu,
        port=port,
        implementation=reader.text(),
        version=reader.text(),
        engine=reader.text(),
    )


def pack_reach(start: int) -> bytes:
    """The body of the question REACH."""
    return _NUMBER.pack(start)


def parse_reach(body: bytes) -> int:
    """The index it starts from."""
    return int(_Reader(body).unpack(_NUMBER)[0])


def reach_room(room: int) -> int:
    """How many entries fit into a body of `room` bytes."""
    return max(0, (room - _REACH_HEAD.size) // _REACH_ENTRY.size)


def pack_reaches(reaches: Reaches) -> bytes:
    """The body of the answer to REACH."""
    return _REACH_HEAD.pack(reaches.total, reaches.start) + b"".join(
        _REACH_ENTRY.pack(*entry) for entry in reaches.entries
    )


def parse_reaches(body: bytes) -> Reaches:
    """See pack_reaches."""
    reader = _Reader(body)
    total, start = reader.unpack(_REACH_HEAD)
    entries = []
    while reader.left:
        entry = ReachEntry._make(reader.unpack(_REACH_ENTRY))
        if entry.prefix_len > 32:
            raise Malformed(f"a prefix of {entry.prefix_len} bits")
        entries.append(entry)
    return Reaches(total, start, tuple(entries))


def pack_trace_start(start: TraceStart) -> bytes:
    """The body of the question TRACE_START; Malformed if the filter is too long to be asked."""
    text = start.filter.encode()
    if len(text) > FILTER_MAX:
        raise Malformed(f"a filter of {len(text)} bytes: at most {FILTER_MAX} fit a question")
    return _SECONDS.pack(start.seconds) + _text(start.filter)


def parse_trace_start(body: bytes) -> TraceStart:
    """See pack_trace_start."""
    reader = _Reader(body)
    (seconds,) = reader.unpack(_SECONDS)
    text = reader.text()
    if not 1 <= seconds <= SECONDS_MAX or len(text.encode()) > FILTER_MAX:
        raise Malformed(f"a trace of {seconds} s: 1 to {SECONDS_MAX}")
    return TraceStart(seconds, text)


def pack_session(session: int) -> bytes:
    """The body of the answer to TRACE_START, and of the question TRACE_STOP."""
    return _SESSION.pack(session)


def parse_session(body: bytes) -> int:
    """See pack_session."""
    return int(_Reader(body).unpack(_SESSION)[0])


def pack_trace_next(session: int, after: int) -> bytes:
    """The body of the question TRACE_NEXT: the records behind number `after`, which have come."""
    return _NEXT.pack(session, after)


def parse_trace_next(body: bytes) -> tuple[int, int]:
    """Session, and the last record that has come."""
    session, after = _Reader(body).unpack(_NEXT)
    return int(session), int(after)


def pack_record(record: PeerRecord) -> bytes:
    """One record; what is longer than may be is cut."""
    packet = record.packet[:CAPTURED_MAX]
    reason = record.reason.encode()[:_REASON_MAX]
    head = _RECORD.pack(
        record.sequence,
        record.time_ns,
        record.stage,
        record.is_dropped,
        record.error,
        record.length,
        record.packets,
        record.together,
        record.gso_size,
        record.packet_id,
        record.more_ids,
        record.worker,
    )
    return b"".join((head, bytes([len(reason)]), reason, bytes([len(packet)]), packet))


def pack_records(lost: int, packed: list[bytes], *, more: bool) -> bytes:
    """The body of the answer to TRACE_NEXT, of records that are packed."""
    return b"".join((_RECORDS_HEAD.pack(lost & 0xFFFFFFFF, more), *packed))


def records_room(room: int) -> int:
    """Bytes of records that fit into a body of `room` bytes."""
    return room - _RECORDS_HEAD.size


def parse_records(body: bytes) -> Records:
    """See pack_records."""
    reader = _Reader(body)
    lost, more = reader.unpack(_RECORDS_HEAD)
    records = []
    while reader.left:
        fields = reader.unpack(_RECORD)
        reason = _decoded(reader.counted(), "a drop reason")
        packet = reader.counted()
        if not 1 <= fields[2] <= 4 or len(packet) > CAPTURED_MAX:
            raise Malformed(f"a record of stage {fields[2]}, {len(packet)} bytes captured")
        records.append(
            PeerRecord(
                sequence=fields[0],
                time_ns=fields[1],
                stage=fields[2],
                is_dropped=bool(fields[3]),
                error=fields[4],
                length=fields[5],
                packets=fields[6],
                together=fields[7],
                gso_size=fields[8],
                packet_id=fields[9],
                more_ids=fields[10],
                worker=fields[11],
                reason=reason,
                packet=packet,
            )
        )
    return Records(lost, bool(more), tuple(records))


def pack_refusal(refusal: Refusal, room: int) -> bytes:
    """The body of REFUSED, at most `room` bytes: its text is cut."""
    text = refusal.text.encode()[: max(0, room - 1 - _TEXT_LEN.size)]
    return bytes([refusal.why]) + _text(text.decode(errors="ignore"))


def parse_refusal(body: bytes) -> Refusal:
    """See pack_refusal."""
    reader = _Reader(body)
    return Refusal(reader.take(1)[0], reader.text())


def _text(text: str) -> bytes:
    data = text.encode()
    return _TEXT_LEN.pack(len(data)) + data


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Malformed(f"{what} that is no UTF-8") from None


class _Reader:
    """Takes a body apart from its beginning."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._body) - self._at

    def take(self, length: int) -> bytes:
        if length > self.left:
            raise Malformed(f"{length} bytes wanted, {self.left} are left")
        found = self._body[self._at : self._at + length]
        self._at += length
        return found

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def counted(self) -> bytes:
        return self.take(self.take(1)[0])

    def text(self) -> str:
        return _decoded(self.take(self.unpack(_TEXT_LEN)[0]), "a text")
