"""The verdicts: what becomes of a packet read from the TUN, and of a datagram received.

This is flannel's udp wire format (one bare IPv4 packet is the whole UDP payload) with
its holes closed. The order of the checks is part of the rules, since the first that
applies names the drop:

    encapsulate   parse · route · TTL · path MTU
    decapsulate   parse · martian source · source check · destination check · TTL

As in flannel the route comes before the TTL, and *both* ends decrement the TTL, so hop
counts agree in a mixed cluster. Unlike flannel a TTL that runs out is answered with
time exceeded, and TTL 0 on input does not wrap to 255.

Nothing here raises on any input, keeps state, or knows of sockets and clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tundp.choices import SourceCheck as SourceCheck
from tundp.wire import fragment, icmp, ip
from tundp.wire.drop import DropReason


class Hop(Protocol):
    """What a route leads to."""

    @property
    def is_local(self) -> bool:
        """True for this node's own subnet, which is never sent anywhere."""
        ...


HopT = TypeVar("HopT", bound=Hop)


@dataclass(frozen=True, slots=True)
class Forward(Generic[HopT]):
    """Send each of `packets` as one datagram to `hop`.

    The one packet of the usual case is a view of the caller's buffer, TTL already
    decremented in place; fragments are new bytes.
    """

    hop: HopT
    packets: tuple[memoryview | bytes, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Write `packet`, a view of the caller's buffer, to the TUN."""

    packet: memoryview
    source_matches: bool
    destination_matches: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """Drop for `reason`, and send `packet` (a whole IPv4 packet) back to its source."""

    reason: DropReason
    packet: bytes


@dataclass(frozen=True, slots=True)
class Drop:
    """Drop for `reason`, in silence."""

    reason: DropReason


_SILENT = {reason: Drop(reason) for reason in DropReason}


def encapsulate(
    packet: memoryview,
    *,
    lookup: Callable[[int], HopT | None],
    path_mtu: Callable[[HopT], int],
    tun_address: int,
) -> Forward[HopT] | Reply | Drop:
    """What to do with one packet read from the TUN.

    packet: writable view of exactly one inner packet; on Forward its TTL and header
    checksum have been changed in place, on any other verdict it is untouched.
    lookup: IPv4 address (host order) to next hop, longest prefix first.
    path_mtu: the largest inner packet, in bytes, that the path to a hop carries.
    tun_address: our own address on the TUN (host order), source of ICMP errors.
    """
    header = ip.parse(packet)
    if isinstance(header, DropReason):
        return _SILENT[header]
    packet = packet[: header.total_len]
    hop = lookup(header.destination)
    if hop is None or hop.is_local:
        return _answer(
            DropReason.NO_ROUTE if hop is None else DropReason.OWN_SUBNET,
            icmp.net_unreachable(packet, header, tun_address),
        )
    if header.ttl <= 1:
        return _answer(
            DropReason.HOP_LIMIT_EXCEEDED, icmp.time_exceeded(packet, header, tun_address)
        )
    mtu = path_mtu(hop)
    if header.total_len > mtu and header.dont_fragment:
        return _answer(
            DropReason.TOO_BIG,
            icmp.fragmentation_needed(packet, header, tun_address, mtu=mtu),
        )
    ip.decrement_ttl(packet, header)
    if header.total_len > mtu:
        lowered = header._replace(ttl=header.ttl - 1)
        return Forward(hop, tuple(fragment.fragment(packet, lowered, mtu)))
    return Forward(hop, (packet,))


def narrow(
    packet: memoryview, *, hop: HopT, mtu: int | None, tun_address: int
) -> Forward[HopT] | Reply | Drop:
    """What to do with a packet `encapsulate` forwarded when its path takes less than known.

    packet: view of exactly the inner packet as it was forwarded, TTL decremented; it stays
    untouched. mtu: the largest inner packet, in bytes, the path to `hop` carries; None if that
    is not known: then the packet may be sent again as it is.
    """
    header = ip.read(packet)
    if mtu is None or header.total_len <= mtu:
        return Forward(hop, (packet,))
    if not header.dont_fragment:
        return Forward(hop, tuple(fragment.fragment(packet, header, mtu)))
    # An ICMP error quotes the packet as it came.
    offender = bytearray(packet)
    ip.restore_ttl(offender, header)
    return _answer(
        DropReason.TOO_BIG,
        icmp.fragmentation_needed(memoryview(offender), header, tun_address, mtu=mtu),
    )


def decapsulate(
    datagram: memoryview,
    *,
    outer_source: int,
    is_ours: Callable[[int], bool],
    admits: Callable[[int, int], bool],
    source_check: SourceCheck,
    tun_address: int,
) -> Deliver | Reply | Drop:
    """What to do with one datagram received from the underlay.

    datagram: writable view of the UDP payload; on Deliver its TTL and header checksum
    have been changed in place. Bytes behind the packet's total length are cut off.
    outer_source: address the datagram came from (host order).
    is_ours: whether an inner address (host order) is one of this node or its pods.
    admits: (inner source, outer source) -> whether that outer source may send it.
    source_check: what becomes of a packet `admits` refuses, or whose inner destination is not
    `is_ours`: this host would forward it wherever its routes lead.
    A Reply goes back through `encapsulate`, to the peer that holds the inner source:
    it never depends on this host forwarding, and never follows a forged outer source.
    """
    header = ip.parse(datagram)
    if isinstance(header, DropReason):
        return _SILENT[header]
    packet = datagram[: header.total_len]
    if not ip.is_single_host(header.source) or is_ours(header.source):
        # Replaces the kernel's own martian check, which is off on the TUN (accept_local, for
        # our ICMP). Independent of the source check.
        return _SILENT[DropReason.MARTIAN_SOURCE]
    is_checked = source_check is not SourceCheck.OFF
    source_matches = not is_checked or admits(header.source, outer_source)
    if not source_matches and source_check is SourceCheck.ENFORCE:
        return _SILENT[DropReason.SOURCE_MISMATCH]
    destination_matches = not is_checked or is_ours(header.destination)
    if not destination_matches and source_check is SourceCheck.ENFORCE:
        return _SILENT[DropReason.DESTINATION_MISMATCH]
    if header.ttl <= 1:
        return _answer(
            DropReason.HOP_LIMIT_EXCEEDED, icmp.time_exceeded(packet, header, tun_address)
        )
    ip.decrement_ttl(packet, header)
    return Deliver(packet, source_matches, destination_matches)


def _answer(reason: DropReason, packet: bytes | None) -> Reply | Drop:
    return _SILENT[reason] if packet is None else Reply(reason, packet)
