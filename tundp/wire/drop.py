"""Why a packet was dropped: one table for both directions, one reason for each drop.

This is the one place a reason is written: number, name, meaning, next step, and the errnos it
stands for. C reads it through native/include/tundp_tables.h, which native/tables.py generates;
status, metrics and logs read it here. As in the kernel's skb_drop_reason, a dropped packet
counts exactly one reason, the first that applied. Numbers and names never change (engines count
by number, dashboards by name); a new reason comes last.

The texts hold for every engine and name neither flags nor devices: `means` may be followed by
". " and `next_step`.
"""

from __future__ import annotations

import errno
from enum import IntEnum, unique
from typing import Final


@unique
class DropReason(IntEnum):
    """One exit from the dataplane that is not the far side.

    A row: number, meaning, next step; then the errnos, by name, of a send to the underlay and of
    a write to the TUN that this reason stands for.
    """

    means: str
    """What happened, as the end of a sentence, without a stop."""
    next_step: str
    """What an operator looks at next, without a stop."""
    send_errnos: tuple[str, ...]
    """Errnos of a refused send that count as this reason."""
    tun_errnos: tuple[str, ...]
    """Errnos of a refused TUN write that count as this reason."""

    def __new__(
        cls,
        number: int,
        means: str,
        next_step: str,
        send_errnos: tuple[str, ...] = (),
        tun_errnos: tuple[str, ...] = (),
    ) -> DropReason:
        """A member out of its row."""
        self = int.__new__(cls, number)
        self._value_ = number
        self.means = means
        self.next_step = next_step
        self.send_errnos = send_errnos
        self.tun_errnos = tun_errnos
        return self

    # The packet itself, as read from the TUN or the socket.
    TOO_SHORT = (
        0,
        "fewer than the 20 bytes of an IPv4 header",
        "something else sends to our UDP port: tcpdump it on the underlay",
    )
    NOT_IPV4 = (
        1,
        "the version nibble is not 4; this overlay carries IPv4 only",
        "IPv6 on the TUN is harmless noise; from the wire it is not a flannel peer",
    )
    BAD_HEADER_LENGTH = (
        2,
        "IHL is below 5 words, or reaches past the packet",
        "a broken or hostile sender: look at the outer source address",
    )
    BAD_TOTAL_LENGTH = (
        3,
        "total length is below the header length, above the bytes that arrived,"
        " or reaches past what fragments can make up",
        "the sender or the path cut the packet: compare the MTU of both nodes",
    )
    BAD_HEADER_CHECKSUM = (
        4,
        "the IPv4 header checksum is wrong",
        "corruption on the path, or a checksum offload that was never finished",
    )
    # The overlay's rules.
    NO_ROUTE = (
        5,
        "no lease covers the destination",
        "tundp status: is the peer's lease there? did its daemon register?",
    )
    OWN_SUBNET = (
        6,
        "the destination is in this node's own subnet, yet reached the TUN",
        "the bridge (docker0, cni0) is down or has another subnet than subnet.env",
    )
    HOP_LIMIT_EXCEEDED = (
        7,
        "the TTL ran out here",
        "normal for traceroute; otherwise look for a routing loop",
    )
    TOO_BIG = (
        8,
        "larger than the path to the peer carries, and DF is set",
        "normal once per flow (path MTU discovery); else lower the sender's MTU",
        ("EMSGSIZE",),
    )
    SOURCE_MISMATCH = (
        9,
        "the outer source does not hold the lease of the inner source, or is not the node whose"
        " address that is, or the inner source is in no lease and not admitted",
        "a spoofed packet, a host without masquerade (admit its network), or a peer behind NAT:"
        " then let the source check count, not enforce",
    )
    MARTIAN_SOURCE = (
        10,
        "from the wire with an inner source that is this node's own, or no host's at all",
        "a spoofed packet: look at the outer source; a source check that enforces drops more",
    )
    # The kernel, when the packet was handed on.
    SEND_FORBIDDEN = (
        11,
        "EPERM or EACCES: a local firewall rule refused the datagram",
        "look at the OUTPUT chain for the UDP port of the overlay",
        ("EPERM", "EACCES"),
    )
    SEND_UNREACHABLE = (
        12,
        "ENETUNREACH, EHOSTUNREACH, ENETDOWN or EADDRNOTAVAIL: no way to the peer's public address",
        "ip route get <peer>; is the uplink up?",
        ("ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "EADDRNOTAVAIL"),
    )
    SEND_NO_BUFFER = (
        13,
        "ENOBUFS: the kernel had no room for the datagram",
        "the uplink's queue is full: ip -s link, tc -s qdisc",
        ("ENOBUFS", "ENOMEM"),
    )
    SEND_FAILED = (
        14,
        "another error of a send to the peer",
        'the errno is counted: "refused by the kernel" below, or tundp_kernel_refusals',
    )
    TUN_DOWN = (
        15,
        "EIO: the TUN device is down",
        "set the device up: ip link set <the TUN's name, see the top> up",
        (),
        ("EIO",),
    )
    TUN_GONE = (
        16,
        "EBADFD: the TUN device was deleted",
        "none: it is made again within a second",
        (),
        ("EBADFD", "EBADF"),
    )
    TUN_REJECTED = (
        17,
        "EINVAL: the kernel refused to take the packet from the TUN",
        "compare with what its sender sent: tcpdump the overlay's UDP port on both underlays",
        (),
        ("EINVAL",),
    )
    TUN_FAILED = (
        18,
        "another error of the TUN write",
        'the errno is counted: "refused by the kernel" below, or tundp_kernel_refusals',
    )
    # The kernel's description of a super-packet.
    BAD_VNET_HEADER = (
        19,
        "the TUN handed over a super-packet whose vnet header does not describe it, or less than"
        " a vnet header",
        "a kernel defect: do without the offloads tun-tso and tun-uso, and report it",
    )
    # A rule of the overlay, behind the others because numbers never move.
    DESTINATION_MISMATCH = (
        20,
        "from the wire for an inner destination that is neither this node's nor in its subnet",
        "a forged packet, or a peer that follows an old lease of ours: look at the outer source,"
        " and at tundp status there; a source check that counts lets it in",
    )
    HOP_QUEUE_FULL = (
        21,
        "what waits in the kernel for this peer has reached its bound: its address answers no ARP,"
        " or its path is slower than what is sent to it",
        "find the peer in tundp status, then: ip neigh get <peer> dev <uplink>; ip route get"
        " <peer>; tc -s qdisc",
        ("EAGAIN",),
    )
    # Rules of the overlay again.
    MARTIAN_DESTINATION = (
        22,
        "from the wire for an inner destination that is no single host's: 0/8, 127/8, multicast or"
        " a broadcast",
        "a forged packet: look at the outer source; no flannel sends such a packet",
    )
    TUNNEL_IN_TUNNEL = (
        23,
        "from the wire with an inner datagram for the overlay's own UDP port on a node",
        "a forged packet, or a pod that reaches for that port: look at the outer source, and let"
        " no pod send to the overlay's port",
    )
    SOURCE_PORT_MISMATCH = (
        24,
        "from a peer's address that holds the lease of the inner source, but not from the overlay's"
        " UDP port",
        "a process or a masqueraded pod on the peer, or NAT between the nodes: then let the source"
        " check count, not enforce",
    )

    @property
    def label(self) -> str:
        """The name in every output, e.g. ``no_route``."""
        return self.name.lower()


REASONS: Final = tuple(DropReason)
"""By number."""


def send_reason(number: int | None) -> DropReason:
    """The reason for a packet whose send to the underlay was refused with errno `number`."""
    return _SEND_REASONS.get(number or 0, DropReason.SEND_FAILED)


def tun_reason(number: int | None) -> DropReason:
    """The reason for a packet whose write to the TUN was refused with errno `number`."""
    return _TUN_REASONS.get(number or 0, DropReason.TUN_FAILED)


_SEND_REASONS: Final = {
    getattr(errno, name): reason for reason in DropReason for name in reason.send_errnos
}
_TUN_REASONS: Final = {
    getattr(errno, name): reason for reason in DropReason for name in reason.tun_errnos
}
