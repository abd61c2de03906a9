"""Coalescing: packets from the wire to as few TUN writes as possible, the reverse of `segment`.

Consecutive packets of one TCP or UDP flow become one super-packet if, and only if, the
kernel's segmentation would make the same packets of it again (but for an IP ID that DF
makes meaningless, RFC 6864, and a checksum of 0xFFFF, which comes back as 0). Both
checksums are verified first, because the kernel does not verify those of a super-packet.
Nothing waits: `flush` ends every batch, and the order within a flow is the order of
arrival. Native twin: native/src/coalesce.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, unique
from typing import Final

from tundp.wire import ip, transport, vnet
from tundp.wire.vnet import VnetHeader

MAX_ITEMS: Final = 8
"""Super-packets under construction; one more sends the oldest on its way."""
MAX_PACKET_LEN: Final = ip.MAX_PACKET_LEN
MAX_TCP_SEGMENTS: Final = 64

_MERGED_FLAGS = transport.ACK | transport.ECE
_ALLOWED_FLAGS = _MERGED_FLAGS | transport.PSH


@unique
class Miss(IntEnum):
    """Why a packet was written alone, or why it could not join the one before.

    The one place these are written; C reads them through native/include/tundp_tables.h. A row:
    number, meaning. Numbers and names never change; a new one comes last.
    """

    means: str
    """As the end of a sentence, without a stop."""

    def __new__(cls, number: int, means: str) -> Miss:
        """A member out of its row."""
        self = int.__new__(cls, number)
        self._value_ = number
        self.means = means
        return self

    OFF = 0, "coalescing of this protocol is switched off"
    NOT_TRANSPORT = 1, "neither TCP nor UDP"
    FRAGMENT = 2, "an IP fragment"
    IP_OPTIONS = 3, "the IP header has options"
    BAD_TRANSPORT = 4, "the transport header does not fit the packet"
    TCP_FLAGS = 5, "SYN, FIN, RST, URG, CWR or a reserved bit"
    NO_PAYLOAD = 6, "a pure ACK, or an empty datagram"
    NO_CHECKSUM = 7, "UDP without a checksum: a super-packet would invent one"
    BAD_CHECKSUM = 8, "a wrong checksum: left to the receiver's stack, which counts it"
    HEADER_DIFFERS = 9, "TOS, TTL, DF, flags, ack, window or options are not the first one's"
    SIZE = 10, "longer than the segments before"
    SEQUENCE = 11, "not the next byte of the stream, or (DF clear) not the next IP ID"
    FULL = 12, "64 KB, or as many segments as the kernel takes"

    @property
    def label(self) -> str:
        """The name in every output."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Written:
    """One write to the TUN: `count` packets as one. `packet` has no vnet header in it."""

    header: VnetHeader
    packet: bytes
    count: int


@dataclass(slots=True)
class _Item:
    """A super-packet under construction, or a first packet that may become one."""

    key: bytes
    packet: bytearray
    header_len: int
    ip_proto: int
    gso_size: int
    next_seq: int
    next_id: int
    count: int = 1


@dataclass(slots=True)
class Coalescer:
    """Feed packets with `add`, end a batch with `flush`; `written` is what to write, in order.

    max_udp_segments: what the kernel takes in one UDP super-packet, 64 or (6.9) 128.
    """

    is_tcp_on: bool = True
    is_udp_on: bool = True
    max_udp_segments: int = 64
    written: list[Written] = field(default_factory=list)
    misses: list[int] = field(default_factory=lambda: [0] * len(Miss))
    _items: list[_Item] = field(default_factory=list)

    def add(self, packet: bytes | bytearray | memoryview) -> None:
        """Take one packet whose IPv4 header `ip.parse` accepted, exactly total length bytes."""
        header_len = (packet[0] & 0x0F) * 4
        flags_offset = int.from_bytes(packet[6:8], "big")
        ip_proto = packet[9]
        if flags_offset & (ip.FLAG_MF | ip.OFFSET_MASK):
            self._pass_before_all(packet, Miss.FRAGMENT)
        elif ip_proto not in (transport.PROTO_TCP, transport.PROTO_UDP):
            self._miss(Miss.NOT_TRANSPORT)
            self._write_alone(packet)
        elif header_len != ip.MIN_HEADER_LEN:
            self._pass_before_all(packet, Miss.IP_OPTIONS)
        elif not (self.is_tcp_on if ip_proto == transport.PROTO_TCP else self.is_udp_on):
            self._miss(Miss.OFF)
            self._write_alone(packet)
        elif ip_proto == transport.PROTO_TCP:
            self._add_tcp(packet)
        else:
            self._add_udp(packet)

    def flush(self) -> None:
        """End the batch: write every item, oldest first."""
        while self._items:
            self._close(self._items[0])

    def _add_tcp(self, packet: bytes | bytearray | memoryview) -> None:
        segment = packet[ip.MIN_HEADER_LEN :]
        if len(segment) < transport.TCP_MIN_HEADER_LEN:
            self._pass_before_all(packet, Miss.BAD_TRANSPORT)
            return
        tcp_len = transport.tcp_header_len(segment)
        if not transport.TCP_MIN_HEADER_LEN <= tcp_len <= len(segment):
            self._pass_before_all(packet, Miss.BAD_TRANSPORT)
            return
        flags = segment[transport.TCP_FLAGS_OFF]
        is_odd = not flags & transport.ACK or flags & ~_ALLOWED_FLAGS
        if is_odd or segment[transport.TCP_DATA_OFF] & 0x0F:
            self._pass_before_flow(packet, Miss.TCP_FLAGS)
        elif len(segment) == tcp_len:
            self._pass_before_flow(packet, Miss.NO_PAYLOAD)
        else:
            self._add(packet, ip.MIN_HEADER_LEN + tcp_len, transport.PROTO_TCP)

    def _add_udp(self, packet: bytes | bytearray | memoryview) -> None:
        datagram = packet[ip.MIN_HEADER_LEN :]
        if len(datagram) < transport.UDP_HEADER_LEN:
            self._pass_before_all(packet, Miss.BAD_TRANSPORT)
            return
        if int.from_bytes(datagram[4:6], "big") != len(datagram):
            self._pass_before_flow(packet, Miss.BAD_TRANSPORT)
        elif len(datagram) == transport.UDP_HEADER_LEN:
            self._pass_before_flow(packet, Miss.NO_PAYLOAD)
        elif datagram[6:8] == b"\0\0":
            self._pass_before_flow(packet, Miss.NO_CHECKSUM)
        else:
            self._add(packet, ip.MIN_HEADER_LEN + transport.UDP_HEADER_LEN, transport.PROTO_UDP)

    def _add(self, packet: bytes | bytearray | memoryview, header_len: int, ip_proto: int) -> None:
        item = self._find(packet)
        if item is not None:
            why_not = self._why_not(item, packet, header_len)
            if why_not is not None:
                self._miss(why_not)
                self._close(item)
                item = None
        if not transport.is_valid(packet, ip.MIN_HEADER_LEN):
            self._pass_before_flow(packet, Miss.BAD_CHECKSUM)
            return
        payload_len = len(packet) - header_len
        is_pushed = ip_proto == transport.PROTO_TCP and bool(_tcp_flags(packet) & transport.PSH)
        if item is not None:
            item.packet += packet[header_len:]
            item.count += 1
            item.next_seq = item.next_seq + payload_len & 0xFFFFFFFF
            item.next_id = item.next_id + 1 & 0xFFFF
            if is_pushed:
                item.packet[ip.MIN_HEADER_LEN + transport.TCP_FLAGS_OFF] |= transport.PSH
            if is_pushed or payload_len < item.gso_size:
                self._close(item)
            return
        if is_pushed:
            # Nothing may follow it in one super-packet.
            self._write_alone(packet)
            return
        if len(self._items) == MAX_ITEMS:
            self._close(self._items[0])
        seq = int.from_bytes(packet[24:28], "big") if ip_proto == transport.PROTO_TCP else 0
        self._items.append(
            _Item(
                key=_key(packet),
                packet=bytearray(packet),
                header_len=header_len,
                ip_proto=ip_proto,
                gso_size=payload_len,
                next_seq=seq + payload_len & 0xFFFFFFFF,
                next_id=int.from_bytes(packet[4:6], "big") + 1 & 0xFFFF,
            )
        )

    def _why_not(
        self, item: _Item, packet: bytes | bytearray | memoryview, header_len: int
    ) -> Miss | None:
        """Why `packet` cannot be the next of `item`, or None if it can."""
        is_tcp = item.ip_proto == transport.PROTO_TCP
        payload_len = len(packet) - header_len
        if header_len != item.header_len or _fixed(packet, header_len, is_tcp=is_tcp) != _fixed(
            item.packet, header_len, is_tcp=is_tcp
        ):
            return Miss.HEADER_DIFFERS
        if payload_len > item.gso_size:
            return Miss.SIZE
        if is_tcp and int.from_bytes(packet[24:28], "big") != item.next_seq:
            return Miss.SEQUENCE
        dont_fragment = int.from_bytes(packet[6:8], "big") & ip.FLAG_DF
        if not dont_fragment and int.from_bytes(packet[4:6], "big") != item.next_id:
            return Miss.SEQUENCE
        most = MAX_TCP_SEGMENTS if is_tcp else self.max_udp_segments
        if item.count == most or len(item.packet) + payload_len > MAX_PACKET_LEN:
            return Miss.FULL
        return None

    def _pass_before_all(self, packet: bytes | bytearray | memoryview, miss: Miss) -> None:
        """Write a packet whose flow is unknown: everything that came before goes first."""
        self._miss(miss)
        self.flush()
        self._write_alone(packet)

    def _pass_before_flow(self, packet: bytes | bytearray | memoryview, miss: Miss) -> None:
        self._miss(miss)
        item = self._find(packet)
        if item is not None:
            self._close(item)
        self._write_alone(packet)

    def _find(self, packet: bytes | bytearray | memoryview) -> _Item | None:
        key = _key(packet)
        return next((item for item in self._items if item.key == key), None)

    def _miss(self, miss: Miss) -> None:
        self.misses[miss] += 1

    def _write_alone(self, packet: bytes | bytearray | memoryview) -> None:
        self.written.append(Written(VnetHeader(), bytes(packet), 1))

    def _close(self, item: _Item) -> None:
        self._items.remove(item)
        packet = item.packet
        if item.count == 1:
            self._write_alone(packet)
            return
        is_tcp = item.ip_proto == transport.PROTO_TCP
        transport_len = len(packet) - ip.MIN_HEADER_LEN
        packet[2:4] = len(packet).to_bytes(2, "big")
        ip.store_checksum(packet, ip.MIN_HEADER_LEN)
        if not is_tcp:
            packet[24:26] = transport_len.to_bytes(2, "big")
        checksum_off = transport.checksum_off(item.ip_proto)
        field_off = ip.MIN_HEADER_LEN + checksum_off
        packet[field_off : field_off + 2] = transport.pseudo_sum(packet, transport_len).to_bytes(
            2, "big"
        )
        header = VnetHeader(
            flags=vnet.NEEDS_CSUM,
            gso_type=vnet.GSO_TCPV4 if is_tcp else vnet.GSO_UDP_L4,
            hdr_len=item.header_len,
            gso_size=item.gso_size,
            csum_start=ip.MIN_HEADER_LEN,
            csum_offset=checksum_off,
        )
        self.written.append(Written(header, bytes(packet), item.count))


def _key(packet: bytes | bytearray | memoryview) -> bytes:
    """Protocol, addresses and ports of a packet without IP options."""
    return bytes(packet[9:10]) + bytes(packet[12:24])


def _tcp_flags(packet: bytes | bytearray | memoryview) -> int:
    return packet[ip.MIN_HEADER_LEN + transport.TCP_FLAGS_OFF]


def _fixed(packet: bytes | bytearray | memoryview, header_len: int, *, is_tcp: bool) -> bytes:
    """What must be equal in every packet of a super-packet, besides the key."""
    # TOS, flags and offset, TTL.
    fixed = bytes((packet[1], packet[6], packet[7], packet[8]))
    if not is_tcp:
        return fixed
    tcp = packet[ip.MIN_HEADER_LEN : header_len]
    return (
        fixed
        + bytes(tcp[transport.TCP_ACK_OFF : transport.TCP_FLAGS_OFF])
        + bytes((tcp[transport.TCP_FLAGS_OFF] & _MERGED_FLAGS,))
        + bytes(tcp[transport.TCP_WINDOW_OFF : transport.TCP_CHECKSUM_OFF])
        + bytes(tcp[transport.TCP_URGENT_OFF :])
    )
