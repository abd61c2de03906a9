"""The stream of event records over the admin socket: frames, and what a reader makes of them.

GET /v1/events answers with frames of `u32 kind, u32 length` and that many bytes, host order:

    HELLO    JSON: whose events they are (Hello); the first frame
    RECORDS  u32 worker, u32 0, event records (wire/event.py) of that worker, oldest first
    NOTE     JSON: {lost: {worker: records that had no room so far}, until_ns: CLOCK_MONOTONIC when
             the rings were read whose records all came before this frame}; at least two a second,
             and one behind the records beside which more were lost

Within a worker records are in order; those of several workers are to be ordered by time.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final, Protocol, Self

from tundp.engine.taps import RING_LEN_MAX, RING_LEN_MIN, Tap, TapRequest
from tundp.errors import FilterError, PlatformError
from tundp.wire.event import ALL_STAGES, DROPS_BIT, SNAP_MAX, Record, Stage, unpack
from tundp.wire.filter import parse as parse_filter

POLL_S: Final = 0.02
"""Between two looks at the rings: at a million packets a second 128 MB a second are to be had."""
NOTE_S: Final = 0.5
_FRAME: Final = struct.Struct("=II")
_WORKER: Final = struct.Struct("=II")
_FRAME_MAX: Final = RING_LEN_MAX + _WORKER.size
STAGE_NAMES: Final = {
    "read": 1 << Stage.TUN_READ,
    "send": 1 << Stage.UDP_SEND,
    "receive": 1 << Stage.UDP_RECEIVE,
    "write": 1 << Stage.TUN_WRITE,
    "drop": DROPS_BIT,
}
"""What `stages` of a query is made of."""


class FrameKind(IntEnum):
    """What is in a frame."""

    HELLO = 1
    RECORDS = 2
    NOTE = 3


class BadQuery(ValueError):  # noqa: N818  (as in tundp.errors)
    """A query nobody can answer. `position`: where in the filter, if it is that."""

    def __init__(self, text: str, position: int | None = None) -> None:
        super().__init__(text)
        self.position = position


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Whose events they are."""

    version: str
    node: str
    """PublicIP of the node, as its lease says."""
    network: str
    subnet: str
    tun: str
    mtu: int
    port: int
    engine: str
    workers: int
    unix_ns: int
    """Unix time less CLOCK_MONOTONIC, when the stream began."""
    reasons: tuple[str, ...]
    """Names of the drop reasons, by number."""
    chaos: str = ""
    """What `tundp chaos` does to packets when the stream begins, in words."""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """What `frame` wrote; members this version does not know are left out."""
        document = json.loads(data)
        known = {name: document[name] for name in cls.__slots__ if name != "chaos"}
        chaos = str(document.get("chaos", ""))
        return cls(**(known | {"reasons": tuple(document["reasons"]), "chaos": chaos}))


def tap_request(query: Mapping[str, str]) -> TapRequest:
    """The tap a query asks for; BadQuery."""
    try:
        packets = parse_filter(query.get("filter", ""))
    except FilterError as error:
        raise BadQuery(str(error), error.position) from None
    names = [name for name in query.get("stages", "").split(",") if name]
    unknown = [name for name in names if name not in STAGE_NAMES]
    if unknown:
        raise BadQuery(f"there is no stage {unknown[0]!r}: {', '.join(STAGE_NAMES)}")
    stages = 0
    for name in names:
        stages |= STAGE_NAMES[name]
    return TapRequest(
        filter=packets,
        stages=stages or ALL_STAGES,
        snap=_number(query, "snap", 128, (0, SNAP_MAX)),
        size=_number(query, "size", 1 << 20, (RING_LEN_MIN, RING_LEN_MAX)),
    )


def _number(query: Mapping[str, str], name: str, default: int, allowed: tuple[int, int]) -> int:
    text = query.get(name, str(default))
    low, high = allowed
    if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
        raise BadQuery(f"{name} must be a number from {low} to {high}")
    return int(text)


def _frame(kind: FrameKind, *parts: bytes) -> bytes:
    length = sum(map(len, parts))
    return b"".join((_FRAME.pack(kind, length), *parts))


async def frames(tap: Tap, hello: Hello) -> AsyncGenerator[bytes]:
    """What the daemon sends, until cancelled. The tap stays the caller's."""
    clock = asyncio.get_running_loop().time
    yield _frame(FrameKind.HELLO, json.dumps(asdict(hello)).encode())
    noted, lost_then = 0.0, 0
    while True:
        until_ns = time.monotonic_ns()
        for worker, records in tap.read():
            yield _frame(FrameKind.RECORDS, _WORKER.pack(worker, 0), records)
        lost = {str(worker): count for worker, count in enumerate(tap.lost()) if count}
        if clock() - noted >= NOTE_S or sum(lost.values()) != lost_then:
            noted, lost_then = clock(), sum(lost.values())
            yield _frame(FrameKind.NOTE, json.dumps({"lost": lost, "until_ns": until_ns}).encode())
        await asyncio.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class PeerName:
    """Another node: its endpoint, and the subnets that lead there."""

    address: IPv4Address
    port: int
    subnets: tuple[IPv4Network, ...] = ()

    def subnet_of(self, address: IPv4Address) -> IPv4Network | None:
        """The longest of its subnets that holds an address."""
        found = [subnet for subnet in self.subnets if address in subnet]
        return max(found, key=lambda subnet: subnet.prefixlen, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event record, with its numbers turned into names."""

    worker: int
    record: Record
    time_ns: int
    """Unix time."""
    reason: str | None
    """Name of the drop reason; None if it was not dropped."""
    peer: PeerName | None
    """Whom the packet goes to or came from; without subnets if it is no peer of this node."""

    @property
    def stage(self) -> Stage:
        """See Record."""
        return self.record.stage

    @property
    def packet(self) -> bytes:
        """See Record."""
        return self.record.packet


class PeerNames(Protocol):
    """Who has which address."""

    async def subnets_of(self, address: IPv4Address) -> tuple[IPv4Network, ...]:
        """The subnets that lead to it; () if none does."""
        ...


class EventStream:
    """The reader's end. Iterate once; it ends when the daemon does."""

    def __init__(self, read: Callable[[int], Awaitable[bytes]], peers: PeerNames) -> None:
        """read: exactly so many bytes; asyncio.IncompleteReadError at the end."""
        self._read = read
        self._peers = peers
        self._hello: Hello | None = None
        self._lost: dict[str, int] = {}
        self._heard_ns: int | None = None

    @property
    def hello(self) -> Hello:
        """Whose events they are; after `begin`."""
        assert self._hello is not None, "begin() comes first"
        return self._hello

    @property
    def lost(self) -> int:
        """Records that had no room in the daemon's rings so far, as of a second ago at most."""
        return sum(self._lost.values())

    @property
    def heard_ns(self) -> int | None:
        """Unix time of the daemon's last look at its rings, whose records all came.

        A busy daemon's lies seconds back. None if it does not say. By CLOCK_MONOTONIC, which it
        has in common with us: the wall clock may be set meanwhile.
        """
        if self._heard_ns is None:
            return None
        return time.time_ns() - (time.monotonic_ns() - self._heard_ns)

    async def begin(self) -> None:
        """Read the daemon's hello. PlatformError if it is none."""
        kind, data = await self._frame()
        try:
            if kind != FrameKind.HELLO:
                raise ValueError("no hello")
            self._hello = Hello.parse(data)
        except (ValueError, KeyError, TypeError) as error:
            raise PlatformError(
                f"the daemon's event stream cannot be read ({error}): is it of another version?"
            ) from None

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events, in the order they arrive here. PlatformError for what is no event."""
        async for batch in self.batches():
            for event in batch:
                yield event

    async def batches(self) -> AsyncIterator[list[Event]]:
        """The events of one worker at a time, as they arrive; for whoever has many to deal with."""
        async for worker, data in self.raw():
            try:
                records = list(unpack(memoryview(data)))
            except ValueError as error:
                raise PlatformError(f"the daemon's event stream is broken: {error}") from None
            yield [await self._event(worker, record) for record in records]

    async def raw(self) -> AsyncIterator[tuple[int, bytes]]:
        """Number of a worker and its next records, as bytes: for whoever only counts them."""
        while True:
            try:
                kind, data = await self._frame()
            except asyncio.IncompleteReadError:
                return
            if kind == FrameKind.NOTE:
                note = json.loads(data)
                self._lost = note.get("lost", {})
                if "until_ns" in note:
                    self._heard_ns = int(note["until_ns"])
            elif kind == FrameKind.RECORDS:
                worker, _ = _WORKER.unpack_from(data)
                yield worker, data[_WORKER.size :]

    async def _frame(self) -> tuple[int, bytes]:
        kind, length = _FRAME.unpack(await self._read(_FRAME.size))
        if length > _FRAME_MAX:
            raise PlatformError(f"the daemon's event stream is broken: a frame of {length} bytes")
        return kind, await self._read(length)

    async def _event(self, worker: int, record: Record) -> Event:
        return Event(
            worker=worker,
            record=record,
            time_ns=record.time_ns + self.hello.unix_ns,
            reason=reason_name(record, self.hello.reasons),
            peer=await self._peer(record),
        )

    async def _peer(self, record: Record) -> PeerName | None:
        if not record.outer:
            return None
        address = IPv4Address(record.outer)
        subnets = await self._peers.subnets_of(address) if record.hop else ()
        return PeerName(address, record.port, subnets)


def reason_name(record: Record, reasons: tuple[str, ...]) -> str | None:
    """The name of a record's drop reason, as the daemon that wrote it has it."""
    if not record.is_dropped:
        return None
    if record.reason < len(reasons):
        return reasons[record.reason]
    return f"reason_{record.reason}"


def subnets_by_address(peers: Iterator[Mapping[str, Any]]) -> dict[str, tuple[IPv4Network, ...]]:
    """PublicIP to subnets, of the peers of a status document."""
    found: dict[str, tuple[IPv4Network, ...]] = {}
    for peer in peers:
        address = str(peer["public_ip"])
        found[address] = (*found.get(address, ()), IPv4Network(peer["subnet"]))
    return found
