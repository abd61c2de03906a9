"""Why a packet was dropped: one enum for both directions, one reason for each drop.

The numbers are stable (the native engine counts into an array indexed by them) and
the names are the ones every output uses: status, logs, metrics, captures. As in the
kernel's skb_drop_reason, a dropped packet counts exactly one reason, the first that
applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, unique


@unique
class DropReason(IntEnum):
    """One exit from the dataplane that is not the far side."""

    # The packet itself, as read from the TUN or the socket.
    TOO_SHORT = 0
    NOT_IPV4 = 1
    BAD_HEADER_LENGTH = 2
    BAD_TOTAL_LENGTH = 3
    BAD_HEADER_CHECKSUM = 4
    # The overlay's rules.
    NO_ROUTE = 5
    OWN_SUBNET = 6
    HOP_LIMIT_EXCEEDED = 7
    TOO_BIG = 8
    SOURCE_MISMATCH = 9
    MARTIAN_SOURCE = 10
    # The kernel, when the packet was handed on.
    SEND_FORBIDDEN = 11
    SEND_UNREACHABLE = 12
    SEND_NO_BUFFER = 13
    SEND_FAILED = 14
    TUN_DOWN = 15
    TUN_GONE = 16
    TUN_REJECTED = 17
    TUN_FAILED = 18
    # The kernel's description of a super-packet.
    BAD_VNET_HEADER = 19
    # A rule of the overlay, behind the others because numbers never move.
    DESTINATION_MISMATCH = 20

    @property
    def label(self) -> str:
        """The name in every output, e.g. ``no_route``."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class DropMeaning:
    """What a reason means to an operator, and what to look at next."""

    means: str
    next_step: str


MEANINGS: dict[DropReason, DropMeaning] = {
    DropReason.TOO_SHORT: DropMeaning(
        means="fewer than the 20 bytes of an IPv4 header",
        next_step="something else sends to our UDP port: tcpdump it on the underlay",
    ),
    DropReason.NOT_IPV4: DropMeaning(
        means="the version nibble is not 4; this overlay carries IPv4 only",
        next_step="IPv6 on the TUN is harmless noise; from the wire it is not a flannel peer",
    ),
    DropReason.BAD_HEADER_LENGTH: DropMeaning(
        means="IHL is below 5 words, or reaches past the packet",
        next_step="a broken or hostile sender: look at the outer source address",
    ),
    DropReason.BAD_TOTAL_LENGTH: DropMeaning(
        means="total length is below the header length, above the bytes that arrived,"
        " or reaches past what fragments can make up",
        next_step="the sender or the path cut the packet: compare the MTU of both nodes",
    ),
    DropReason.BAD_HEADER_CHECKSUM: DropMeaning(
        means="the IPv4 header checksum is wrong",
        next_step="corruption on the path, or a checksum offload that was never finished",
    ),
    DropReason.NO_ROUTE: DropMeaning(
        means="no lease covers the destination",
        next_step="tundp status: is the peer's lease there? did its daemon register?",
    ),
    DropReason.OWN_SUBNET: DropMeaning(
        means="the destination is in this node's own subnet, yet reached the TUN",
        next_step="the bridge (docker0, cni0) is down or has another subnet than subnet.env",
    ),
    DropReason.HOP_LIMIT_EXCEEDED: DropMeaning(
        means="the TTL ran out here",
        next_step="normal for traceroute; otherwise look for a routing loop",
    ),
    DropReason.TOO_BIG: DropMeaning(
        means="larger than the path to the peer carries, and DF is set",
        next_step="normal once per flow (path MTU discovery); else lower the sender's MTU",
    ),
    DropReason.SOURCE_MISMATCH: DropMeaning(
        means="the outer source does not hold the lease of the inner source",
        next_step="a spoofed packet, or a peer behind NAT: then use --source-check=count",
    ),
    DropReason.MARTIAN_SOURCE: DropMeaning(
        means="from the wire with an inner source that is this node's own, or no host's at all",
        next_step="a spoofed packet: look at the outer source; --source-check=enforce drops more",
    ),
    DropReason.SEND_FORBIDDEN: DropMeaning(
        means="EPERM or EACCES: a local firewall rule refused the datagram",
        next_step="look at the OUTPUT chain for the UDP port of the overlay",
    ),
    DropReason.SEND_UNREACHABLE: DropMeaning(
        means="ENETUNREACH, EHOSTUNREACH or ENETDOWN: no way to the peer's public address",
        next_step="ip route get <peer>; is the uplink up?",
    ),
    DropReason.SEND_NO_BUFFER: DropMeaning(
        means="ENOBUFS: the kernel had no room for the datagram",
        next_step="the uplink's queue is full: ip -s link, tc -s qdisc",
    ),
    DropReason.SEND_FAILED: DropMeaning(
        means="another error from sendto",
        next_step="run with -v=1: the errno is logged",
    ),
    DropReason.TUN_DOWN: DropMeaning(
        means="EIO: the TUN device is down",
        next_step="ip link set flannel0 up",
    ),
    DropReason.TUN_GONE: DropMeaning(
        means="EBADFD: the TUN device was deleted",
        next_step="none: it is made again within a second",
    ),
    DropReason.TUN_REJECTED: DropMeaning(
        means="EINVAL: the kernel refused the packet",
        next_step="run with -v=1: the packet's header is logged",
    ),
    DropReason.TUN_FAILED: DropMeaning(
        means="another error from the TUN write",
        next_step="run with -v=1: the errno is logged",
    ),
    DropReason.BAD_VNET_HEADER: DropMeaning(
        means="the TUN handed over a super-packet whose vnet header does not describe it",
        next_step="a kernel defect: --disable-offloads=tun-tso,tun-uso goes round it; report it",
    ),
    DropReason.DESTINATION_MISMATCH: DropMeaning(
        means="from the wire for an inner destination that is neither this node's nor in its"
        " subnet",
        next_step="a forged packet, or a peer that follows an old lease of ours: look at the outer"
        " source, and at tundp status there; --source-check=count lets it in",
    ),
}
