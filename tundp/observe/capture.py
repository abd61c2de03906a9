"""A capture: what events of the packet threads become in a pcapng file. Decisions only, no I/O.

An interface for each stage (`flannel0/in`, `udp:8285/out`, `udp:8285/in`, `flannel0/out`) and each
reason of a drop (`drop/no_route`); one packet has the same epb_packetid on all of them, times are
of one clock. What the engine decided is in the packet's comment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.observe.capture_words import (
    drop_words,
    endpoint,
    hop_words,
    label,
    next_words,
    owner_words,
    table_words,
)
from tundp.observe.events import Event
from tundp.wire import describe, overhead, pcapng, transport
from tundp.wire.event import Stage
from tundp.wire.pcapng import Way
from tundp.wire.wire_size import wire_packets

SNAPLEN_MAX: Final = 0xFFFF
_PENDING_MAX: Final = 16384
"""Packets whose time of arrival is remembered."""
_READS: Final = frozenset({Stage.TUN_READ, Stage.UDP_RECEIVE})
_OUTER: Final = frozenset({Stage.UDP_SEND, Stage.UDP_RECEIVE})


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureChoice:
    """What of the events goes into a capture."""

    has_inner: bool = True
    has_outer: bool = True
    has_drops: bool = False
    is_wire_size: bool = False
    """Super-packets are cut into the packets they stand for, checksums completed."""
    snaplen: int = SNAPLEN_MAX
    """Bytes of an inner packet that are kept."""

    @property
    def stages(self) -> tuple[str, ...]:
        """What to ask the daemon for."""
        inner = ("read", "write") if self.has_inner else ()
        outer = ("send", "receive") if self.has_outer else ()
        return (*inner, *outer, *(("drop",) if self.has_drops else ()))

    @property
    def asked_len(self) -> int:
        """Bytes of each packet to ask the daemon for: only whole packets can be cut."""
        return SNAPLEN_MAX if self.is_wire_size else self.snaplen


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureAbout:
    """Where a capture is made, for its first block."""

    version: str
    """Of the daemon."""
    node: IPv4Address
    """PublicIP."""
    network: IPv4Network
    subnet: IPv4Network
    tun: str
    mtu: int
    port: int
    engine: str
    host: str = ""
    machine: str = ""
    kernel: str = ""
    filter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One packet of a capture."""

    interface: str
    way: Way
    time_ns: int
    """Since 1970."""
    data: bytes | bytearray
    """From the IPv4 header on, the outer one on the interfaces of the socket."""
    length: int
    """Bytes of the packet, of which `data` may be the first part."""
    inner: bytes | bytearray
    """The same without the outer headers."""
    number: int
    """Of the read or the receive that brought the packet, in its worker and direction."""
    comment: str
    event: Event

    @property
    def packet_id(self) -> int:
        """Of the packet among all of the capture: of its worker, direction and number."""
        return self.number << 8 | self.event.worker << 1 | (not self.event.stage.is_encap)

    @property
    def label(self) -> str:
        """The same for people: `e0.77` is packet 77 that worker 0 read from the TUN."""
        return label(self.event, self.number)


class _Receives:
    """Which receive brought which packet of a write that holds packets of several.

    A packet cut out of it again is the one that was received, byte for byte, so that its
    addresses, ports, sequence number and checksum tell which.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, bytes], list[int]] = {}
        self._keys: deque[tuple[int, bytes]] = deque()

    def add(self, event: Event) -> None:
        """Remember a received packet."""
        if (key := self._key(event.worker, event.packet)) is None:
            return
        if len(self._keys) >= _PENDING_MAX:
            self._numbers.pop(self._keys.popleft(), None)
        self._keys.append(key)
        self._numbers.setdefault(key, []).append(event.record.packet_id)

    def number(self, event: Event, packet: bytes | bytearray) -> int:
        """The number of a packet's receive, the write's first one if that is not known."""
        first = event.record.packet_id
        last = first + event.record.more_ids
        key = self._key(event.worker, packet)
        numbers = self._numbers.get(key, []) if first < last and key is not None else []
        found = next((each for each in numbers if first <= each <= last), None)
        if found is None:
            return first
        numbers.remove(found)
        return found

    @staticmethod
    def _key(worker: int, packet: bytes | bytearray) -> tuple[int, bytes] | None:
        start = (packet[0] & 0x0F) * 4 if packet else 0
        head = packet[start : start + transport.TCP_MIN_HEADER_LEN]
        if len(head) < transport.UDP_HEADER_LEN:
            return None
        end = 8 if packet[9] == transport.PROTO_UDP else transport.TCP_MIN_HEADER_LEN
        return worker, bytes(packet[9:10] + packet[12:20] + head[:end])


@dataclass(slots=True)
class Recorder:
    """From events to entries. Remembers when packets came, to tell how long they took."""

    about: CaptureAbout
    choice: CaptureChoice
    _came: dict[tuple[int, bool, int], int] = field(default_factory=dict)
    _receives: _Receives = field(default_factory=_Receives)

    def entries(self, event: Event) -> Iterator[Entry]:
        """The packets of one event, in order; none if the capture does without its stage."""
        if event.stage in _READS:
            self._remember(event)
        is_outer = event.stage in _OUTER and event.reason is None
        if not self._is_wanted(event, is_outer=is_outer):
            return
        pieces = self._pieces(event)
        comment = self._comment(event, is_outer=is_outer, is_cut=pieces is not None)
        interface, way = self.interface_of(event)
        whole: Sequence[bytes | bytearray] = [event.packet] if pieces is None else pieces
        for at, piece in enumerate(whole):
            length = event.record.length if pieces is None else len(piece)
            inner = piece[: self.choice.snaplen]
            data = self._outer(event, inner, length) if is_outer else inner
            yield Entry(
                interface=interface,
                way=way,
                time_ns=event.time_ns,
                data=data,
                length=length + (overhead.OVERHEAD if is_outer else 0),
                inner=inner,
                number=self._number(event, piece),
                comment=f"{comment}, {at + 1} of {len(whole)}" if len(whole) > 1 else comment,
                event=event,
            )

    def interface_of(self, event: Event) -> tuple[str, Way]:
        """The name of the interface an event belongs to, and its direction there."""
        way = Way.INBOUND if event.stage in _READS else Way.OUTBOUND
        if event.reason is not None:
            return f"drop/{event.reason}", way
        device = f"udp:{self.about.port}" if event.stage in _OUTER else self.about.tun
        return f"{device}/{'in' if way is Way.INBOUND else 'out'}", way

    @property
    def stage_interfaces(self) -> Sequence[tuple[str, str]]:
        """The interfaces without those of drops: name and description."""
        tun, udp = self.about.tun, f"udp:{self.about.port}"
        inner = (
            (f"{tun}/in", "packets read from the TUN, as pods sent them"),
            (f"{tun}/out", "packets written to the TUN, on their way to pods"),
        )
        outer = (
            (f"{udp}/out", "datagrams sent to peers; outer headers made again"),
            (f"{udp}/in", "datagrams received from peers; outer headers made again"),
        )
        return (*(inner * self.choice.has_inner), *(outer * self.choice.has_outer))

    def _number(self, event: Event, piece: bytes | bytearray) -> int:
        if not event.record.more_ids or not self.choice.is_wire_size:
            return event.record.packet_id
        return self._receives.number(event, piece)

    def _pieces(self, event: Event) -> list[bytearray] | None:
        if not self.choice.is_wire_size:
            return None
        record = event.record
        return wire_packets(memoryview(record.packet), record.length, record.gso_size)

    def _is_wanted(self, event: Event, *, is_outer: bool) -> bool:
        if event.reason is not None:
            return self.choice.has_drops
        return self.choice.has_outer if is_outer else self.choice.has_inner

    def _remember(self, event: Event) -> None:
        if len(self._came) >= _PENDING_MAX:
            del self._came[next(iter(self._came))]
        key = (event.worker, event.stage.is_encap, event.record.packet_id)
        self._came.setdefault(key, event.time_ns)
        if self.choice.is_wire_size and event.stage is Stage.UDP_RECEIVE:
            self._receives.add(event)

    def _outer(self, event: Event, inner: bytes | bytearray, length: int) -> bytes:
        here = int(self.about.node), self.about.port
        there = event.record.outer, event.record.port
        source, destination = (here, there) if event.stage is Stage.UDP_SEND else (there, here)
        return pcapng.outer_datagram(
            inner,
            length,
            source=source[0],
            destination=destination[0],
            source_port=source[1],
            destination_port=destination[1],
        )

    def _comment(self, event: Event, *, is_outer: bool, is_cut: bool) -> str:
        """What the engine decided of a packet, and what is not as it was on the wire."""
        record = event.record
        parts = [f"#{label(event)} {self._decision(event)}"]
        came = self._came.get((event.worker, event.stage.is_encap, event.record.packet_id))
        if came is not None and event.stage not in _READS:
            since = "read" if event.stage.is_encap else "receive"
            parts.append(f"{(event.time_ns - came) / 1000:.1f} us after its {since}")
        if record.together > 1:
            call = "receive" if event.stage is Stage.UDP_RECEIVE else "send"
            parts.append(f"{record.together} datagrams in its {call}")
        if wait := describe.socket_wait(record.wait_ns):
            parts.append(wait)
        if record.packets > 1 or record.gso_size:
            size = f" of {record.gso_size} bytes each" if record.gso_size else ""
            parts.append(f"super-packet for {record.packets} packets{size}")
            if self.choice.is_wire_size and not is_cut:
                parts.append("not cut: it is not whole, or its header does not describe it")
        if is_outer:
            parts.append("outer header made again: ID, TTL, TOS, checksum not known")
        return "; ".join(parts) + next_words(event)

    def _decision(self, event: Event) -> str:
        if event.reason is not None:
            return drop_words(event)
        hop, table = hop_words(event), table_words(event)
        match event.stage:
            case Stage.TUN_READ:
                return f"lookup {hop}{table}" if hop else "read from the TUN"
            case Stage.UDP_SEND:
                return f"lookup {hop}{table}; encap +{overhead.OVERHEAD} B"
            case Stage.UDP_RECEIVE:
                return f"from {endpoint(event)}{owner_words(event)}"
            case _:
                source = f" from {endpoint(event)}" if event.record.outer else ""
                return f"decap -{overhead.OVERHEAD} B{source}{table}"
