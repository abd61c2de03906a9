"""The event record: what happened to a packet at one point of its way; `struct tundp_event` in C.

A packet passes two stages in each direction, and ends in the second one or in a drop:

    encap   TUN_READ     read from the TUN: a packet, or a super-packet that stands for several
            UDP_SEND     taken by the socket, one record for each packet
    decap   UDP_RECEIVE  received: a datagram, or several the kernel put together
            TUN_WRITE    taken by the TUN: a packet, or a super-packet

A dropped packet has a record of the stage it did not pass, `is_dropped` set, at the moment it is
counted. A record is HEADER_LEN bytes in host order, then the first bytes of the packet, padded
with zeros to a multiple of ALIGN.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class Stage(IntEnum):
    """Where in its way a packet is. Its number is its bit in a tap's `stages`."""

    TUN_READ = 1
    UDP_SEND = 2
    UDP_RECEIVE = 3
    TUN_WRITE = 4

    @property
    def is_encap(self) -> bool:
        """Whether the packet goes from the TUN to the underlay."""
        return self <= Stage.UDP_SEND


DROPS_BIT: Final = 1
"""Bit 0 of a tap's `stages`: records of drops, whatever their stage."""
ALL_STAGES: Final = DROPS_BIT | sum(1 << stage for stage in Stage)

ALIGN: Final = 8
SNAP_MAX: Final = 65535
"""Bytes of a packet a record can hold: any IPv4 packet whole (RFC 791 section 3.1)."""

_HEADER: Final = struct.Struct("=IBBBxQQIIIHHIIIHHII")
HEADER_LEN: Final = _HEADER.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One event record. Lengths are in bytes, addresses and ports in host order."""

    stage: Stage
    is_dropped: bool = False
    reason: int = 0
    """A DropReason's number, if dropped; of a newer daemon maybe one without a name."""
    time_ns: int = 0
    """CLOCK_MONOTONIC."""
    packet_id: int
    """Number of the TUN read, or of the receive, that brought it: per worker and direction."""
    more_ids: int = 0
    """A coalesced write holds packets of `packet_id` to `packet_id + more_ids`."""
    hop: int = 0
    """Hop id it goes to or came from; 0 none."""
    outer: int = 0
    """The peer's address: where it goes, or came from; 0 before it is routed."""
    port: int = 0
    """The peer's port."""
    error: int = 0
    """errno it was refused with; 0 if it was not the kernel that refused it."""
    length: int
    """Of the packet, or super-packet, from the IPv4 header on."""
    packets: int = 1
    """Wire-size packets the record stands for."""
    together: int = 1
    """Datagrams of the send or receive that carried it; packets of the read or write."""
    gso_size: int = 0
    """Payload bytes of each packet of a super-packet but the last; 0 if it is none."""
    generation: int = 0
    """Generation of the FIB it was decided by, modulo 2^32."""
    wait_ns: int = 0
    """Time from the datagram's arrival at this host to the receive that brought it, in ns: of
    UDP_RECEIVE only, see wire/socket_wait.py. 0: not known."""
    packet: bytes = b""
    """The first bytes, from the IPv4 header on; as they were at that moment."""

    def pack(self) -> bytes:
        """The record as bytes, padded."""
        size = padded_len(len(self.packet))
        header = _HEADER.pack(
            size,
            self.stage,
            self.is_dropped,
            self.reason,
            self.time_ns,
            self.packet_id,
            self.more_ids,
            self.hop,
            self.outer,
            self.port,
            self.error,
            self.length,
            self.packets,
            self.together,
            len(self.packet),
            self.gso_size,
            self.generation & 0xFFFFFFFF,
            self.wait_ns,
        )
        return (header + self.packet).ljust(size, b"\0")


def padded_len(captured: int) -> int:
    """Length of a record that holds `captured` bytes of its packet."""
    return -(-(HEADER_LEN + captured) // ALIGN) * ALIGN


def unpack(data: bytes | memoryview) -> Iterator[Record]:
    """The records in `data`, which begins and ends with whole ones.

    ValueError if it does not, or holds what no record can be.
    """
    offset, end = 0, len(data)
    while offset < end:
        if end - offset < HEADER_LEN:
            raise ValueError(f"{end - offset} bytes at the end are no event record")
        fields = _HEADER.unpack_from(data, offset)
        size, stage, is_dropped, reason = fields[:4]
        captured = fields[14]
        if size != padded_len(captured) or size > end - offset or stage not in set(Stage):
            raise ValueError(f"no event record at byte {offset}: size {size}, stage {stage}")
        start = offset + HEADER_LEN
        yield Record(
            stage=Stage(stage),
            is_dropped=bool(is_dropped),
            reason=reason,
            time_ns=fields[4],
            packet_id=fields[5],
            more_ids=fields[6],
            hop=fields[7],
            outer=fields[8],
            port=fields[9],
            error=fields[10],
            length=fields[11],
            packets=fields[12],
            together=fields[13],
            gso_size=fields[15],
            generation=fields[16],
            wait_ns=fields[17],
            packet=bytes(data[start : start + captured]),
        )
        offset += size


def scan(data: bytes) -> Iterator[tuple[int, bool, int, int, int, int, int]]:
    """The records in `data`, as `unpack` finds them, in a tenth of its time: for many of them.

    Of each: stage, is_dropped, outer, length, packets, and where its packet's bytes begin and end
    in `data`. ValueError as there.
    """
    offset, end = 0, len(data)
    header, header_len, stages = _HEADER.unpack_from, HEADER_LEN, frozenset(map(int, Stage))
    while offset < end:
        if end - offset < header_len:
            raise ValueError(f"{end - offset} bytes at the end are no event record")
        fields = header(data, offset)
        size, captured = fields[0], fields[14]
        if size != padded_len(captured) or size > end - offset or fields[1] not in stages:
            raise ValueError(f"no event record at byte {offset}: size {size}, stage {fields[1]}")
        start = offset + header_len
        yield (
            fields[1],
            bool(fields[2]),
            fields[8],
            fields[11],
            fields[12],
            start,
            start + captured,
        )
        offset += size
