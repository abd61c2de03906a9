"""MTU arithmetic: what one overlay packet costs on the underlay.

outer IPv4 header   20
outer UDP header     8
inner packet         n     no header of our own: the payload is the packet
"""

from __future__ import annotations

from typing import Final

from tundp.wire import ip

OUTER_IPV4_LEN: Final = 20
OUTER_UDP_LEN: Final = 8
OVERHEAD: Final = OUTER_IPV4_LEN + OUTER_UDP_LEN
MAX_DATAGRAM_LEN: Final = 0xFFFF - OVERHEAD
"""65507: the most one IPv4 UDP datagram carries (RFC 768, 791)."""


def inner_mtu(outer_mtu: int) -> int:
    """The largest inner packet a path of `outer_mtu` bytes carries unfragmented."""
    return min(outer_mtu - OVERHEAD, MAX_DATAGRAM_LEN)


def tun_mtu(link_mtu: int) -> int | None:
    """The MTU for the TUN over a link; None if IPv4 does not fit (RFC 791)."""
    mtu = inner_mtu(link_mtu)
    return mtu if mtu >= ip.MIN_MTU else None
