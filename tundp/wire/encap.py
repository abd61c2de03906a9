"""The verdicts: what becomes of a packet read from the TUN, and of a datagram received.

This is flannel's udp wire format (one bare IPv4 packet is the whole UDP payload) with
its holes closed. The order of the checks is part of the rules, since the first that
applies names the drop:

    encapsulate   parse · route · TTL · path MTU
    decapsulate   parse · martian source · martian destination · tunnel in tunnel
                  · source check · destination check · TTL

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
from tundp.wire import echo, fragment, icmp, ip, peer_message
from tundp.wire.drop import DropReason
from tundp.wire.policy import Policy


class Hop(Protocol):
    """What a route leads to."""

    @property
    def is_local(self) -> bool:
        """True for this node's own subnet, which is never sent anywhere."""
        ...


HopT = TypeVar("HopT", bound=Hop)

Endpoint = tuple[int, int]
"""IPv4 address (host order) and UDP port, of the underlay."""


class AddressTable(Protocol):
    """What `decapsulate` asks of the leases and of this host. Addresses are in host order."""

    def is_own(self, address: int) -> bool:
        """Whether an inner address is one of this node or its pods."""
        ...

    def is_broadcast(self, address: int) -> bool:
        """Whether an address is a broadcast address of one of this host's networks."""
        ...

    def is_node(self, address: int) -> bool:
        """Whether an address is one of this host's, or a peer's PublicIP."""
        ...

    def holder(self, address: int) -> Endpoint | None:
        """Who sends what has this inner source: the peer whose lease, or whose PublicIP it is.

        None: it is neither in a lease nor a peer's PublicIP.
        """
        ...

    def peer(self, address: int) -> Endpoint | None:
        """The endpoint of the peer with this PublicIP, or None."""
        ...


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
    echo_len: int = 0
    """Above 0 for an answer to what measures paths: that many bytes of the packet show it."""
    peer_len: int = 0
    """Above 0 for a message between nodes (wire/peer_message.py): that many bytes of it count."""


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
_UDP = 17
_ICMP_LEN = 8
"""Bytes before what an ICMP error quotes (RFC 792)."""
_QUOTED_LEN = 8
"""Bytes it quotes behind the header, at least (RFC 792)."""
_PORTS_LEN = 4
"""Bytes of source and destination port, the first of a UDP header."""


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
    datagram: memoryview, *, sender: Endpoint, table: AddressTable, policy: Policy
) -> Deliver | Reply | Drop:
    """What to do with one datagram received from the underlay.

    datagram: writable view of the UDP payload; on Deliver its TTL and header checksum
    have been changed in place. Bytes behind the packet's total length are cut off.
    sender: outer source address and port of the datagram.
    policy.source_check: what becomes of a packet that `sender` may not send, or whose inner
    destination is not ours: this host would forward it wherever its routes lead.
    A Reply goes back through `encapsulate`, to the peer that holds the inner source:
    it never depends on this host forwarding, and never follows a forged outer source.
    """
    header = ip.parse(datagram)
    if isinstance(header, DropReason):
        return _SILENT[header]
    packet = datagram[: header.total_len]
    if not _is_host(header.source, table) or table.is_own(header.source):
        # Replaces the kernel's own martian check, which is off on the TUN (accept_local, for
        # our ICMP). Independent of the source check.
        return _SILENT[DropReason.MARTIAN_SOURCE]
    if not _is_host(header.destination, table):
        # With route_localnet, which kube-proxy sets, the kernel delivers 127/8 from any device.
        return _SILENT[DropReason.MARTIAN_DESTINATION]
    if _is_for_tunnel(packet, header, table, policy):
        # The kernel would give it to our own socket, or forward it to another node's, with an
        # outer source that its sender chose.
        return _SILENT[DropReason.TUNNEL_IN_TUNNEL]
    is_checked = policy.source_check is not SourceCheck.OFF
    is_enforced = policy.source_check is SourceCheck.ENFORCE
    fault = _sender_fault(header.source, sender, table, policy) if is_checked else None
    if fault is not None and is_enforced:
        return _SILENT[fault]
    destination_matches = not is_checked or table.is_own(header.destination)
    if not destination_matches and is_enforced:
        return _SILENT[DropReason.DESTINATION_MISMATCH]
    if header.ttl <= 1:
        return _answer(
            DropReason.HOP_LIMIT_EXCEEDED, icmp.time_exceeded(packet, header, policy.tun_address)
        )
    ip.decrement_ttl(packet, header)
    return Deliver(
        packet,
        fault is None,
        destination_matches,
        _echo_len(packet, header, policy),
        _peer_len(packet, header, sender, table, policy),
    )


def _is_host(address: int, table: AddressTable) -> bool:
    return ip.is_single_host(address) and not table.is_broadcast(address)


def _is_for_tunnel(
    packet: memoryview, header: ip.Ipv4Header, table: AddressTable, policy: Policy
) -> bool:
    """Whether an inner packet is a datagram, or its first fragment, for the port of a node."""
    ports = header.header_len
    return (
        header.ip_proto == _UDP
        and not header.fragment_offset
        and header.total_len >= ports + _PORTS_LEN
        and int.from_bytes(packet[ports + 2 : ports + _PORTS_LEN], "big") == policy.port
        and (header.destination == policy.tun_address or table.is_node(header.destination))
    )


def _echo_len(packet: memoryview, header: ip.Ipv4Header, policy: Policy) -> int:
    """How many bytes of a packet for us show an answer to what measures paths; 0: it is none.

    An ICMP echo reply with our identifier, whole or its first fragment: its cookie shows that the
    request arrived, however narrow the way back is.
    """
    start = header.header_len
    is_answer = (
        header.ip_proto == ip.PROTO_ICMP
        and header.destination == policy.tun_address
        and not header.fragment_offset
        and header.total_len >= start + echo.HEAD_LEN
        and echo.is_reply(packet[start:], policy.echo_id)
    )
    return start + echo.HEAD_LEN if is_answer else 0


def _peer_len(
    packet: memoryview,
    header: ip.Ipv4Header,
    sender: Endpoint,
    table: AddressTable,
    policy: Policy,
) -> int:
    """How many bytes of a packet for us are of the talk between nodes; 0: none.

    The whole of a message, protocol 253 (RFC 3692); of an ICMP error of a kernel that knows no
    such protocol, up to the first 8 bytes of our message that it quotes. Not fragmented. The
    sender must be who may send from its inner source, whatever the source check.
    """
    if (
        header.destination != policy.tun_address
        or header.ip_proto not in (peer_message.IP_PROTO, ip.PROTO_ICMP)
        or header.flags_offset & (ip.FLAG_MF | ip.OFFSET_MASK)
    ):
        return 0
    if header.ip_proto == ip.PROTO_ICMP:
        length = _refusal_len(packet, header, policy)
    else:
        length = header.total_len if header.total_len <= peer_message.PACKET_MAX else 0
    if length and _sender_fault(header.source, sender, table, policy) is None:
        return length
    return 0


def _refusal_len(packet: memoryview, header: ip.Ipv4Header, policy: Policy) -> int:
    """Bytes of an ICMP protocol unreachable (RFC 792) about a message of ours; 0: it is none."""
    quoted = header.header_len + _ICMP_LEN
    if header.total_len < quoted + ip.MIN_HEADER_LEN + _QUOTED_LEN:
        return 0
    quoted_len = (packet[quoted] & 0x0F) * 4
    is_one = (
        (packet[header.header_len], packet[header.header_len + 1])
        == (icmp.TYPE_DEST_UNREACHABLE, icmp.CODE_PROTOCOL_UNREACHABLE)
        and packet[quoted] >> 4 == 4
        and quoted_len >= ip.MIN_HEADER_LEN
        and header.total_len >= quoted + quoted_len + _QUOTED_LEN
        and packet[quoted + 9] == peer_message.IP_PROTO
        and int.from_bytes(packet[quoted + 12 : quoted + 16], "big") == policy.tun_address
    )
    return quoted + quoted_len + _QUOTED_LEN if is_one else 0


def _sender_fault(
    source: int, sender: Endpoint, table: AddressTable, policy: Policy
) -> DropReason | None:
    """Why `sender` may not send what comes from `source`; None if it may."""
    holder = table.holder(source)
    if holder is None and policy.admits(source):
        holder = table.peer(sender[0])
    if holder is None or holder[0] != sender[0]:
        return DropReason.SOURCE_MISMATCH
    return None if holder[1] == sender[1] else DropReason.SOURCE_PORT_MISMATCH


def _answer(reason: DropReason, packet: bytes | None) -> Reply | Drop:
    return _SILENT[reason] if packet is None else Reply(reason, packet)
