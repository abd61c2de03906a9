"""Links and IPv4 addresses as rtnetlink reports them: records, requests, decoding."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from tundp.linux import uapi
from tundp.linux.rtnl import Request, attribute_u32, attributes

_IFINFOMSG: Final = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, device type, index, flags, changed flags."""
_IFADDRMSG: Final = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, index."""

_POINT_TO_POINT_LEN: Final = 31
"""Networks of this prefix length and longer have no broadcast address (RFC 3021)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One network interface."""

    index: int
    name: str
    mtu: int
    is_up: bool
    is_loopback: bool = False
    kind: str | None = None
    """The driver's name for it (IFLA_INFO_KIND): "bridge", "tun", "vxlan"; None for hardware."""
    queue_len: int = 0
    """Packets its transmit queue holds (IFLA_TXQLEN); of a TUN, those not read yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One IPv4 address of a link."""

    index: int
    interface: IPv4Interface
    is_permanent: bool
    is_deprecated: bool
    is_temporary: bool = False
    """IFA_F_TEMPORARY, which for IPv4 is the same bit as IFA_F_SECONDARY, and means that."""
    scope: int = 0
    """rtnetlink.h's RT_SCOPE_: 0 universe, 253 link, 254 host."""
    broadcast: IPv4Address | None = None
    """IFA_BROADCAST, as whoever set the address chose it; None: none was given."""

    @property
    def broadcasts(self) -> Iterator[IPv4Address]:
        """The addresses the kernel takes for broadcasts because of this one.

        The given one, and the last of the network whatever was given, unless it has no room for
        one (net/ipv4/fib_frontend.c, fib_add_ifaddr, Linux 6.18).
        """
        if self.broadcast is not None:
            yield self.broadcast
        if self.interface.network.prefixlen < _POINT_TO_POINT_LEN:
            yield self.interface.network.broadcast_address


def links_request() -> tuple[int, bytes]:
    """Type and body of a request for all links, without their counters."""
    body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    return uapi.RTM_GETLINK, body + attribute_u32(uapi.IFLA_EXT_MASK, uapi.RTEXT_FILTER_SKIP_STATS)


def link_request(index: int) -> Request:
    """A request for one link; the kernel answers ENODEV if there is none of this index."""
    body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    body += attribute_u32(uapi.IFLA_EXT_MASK, uapi.RTEXT_FILTER_SKIP_STATS)
    return Request(uapi.RTM_GETLINK, 0, body)


def addresses_request(index: int = 0) -> tuple[int, bytes]:
    """Type and body of a request for the IPv4 addresses, of one link if given."""
    return uapi.RTM_GETADDR, _IFADDRMSG.pack(socket.AF_INET, 0, 0, 0, index)


def decode_link(body: memoryview) -> Link | None:
    """The link of an RTM_NEWLINK or RTM_DELLINK; None for a port of a bridge (AF_BRIDGE)."""
    family, _, index, flags, _ = _IFINFOMSG.unpack_from(body)
    if family != socket.AF_UNSPEC:
        return None
    values = dict(attributes(body[_IFINFOMSG.size :]))
    name, mtu = values.get(uapi.IFLA_IFNAME), values.get(uapi.IFLA_MTU)
    queue_len = values.get(uapi.IFLA_TXQLEN)
    kind = None
    if (info := values.get(uapi.IFLA_LINKINFO)) is not None:
        kind = _text(dict(attributes(info)).get(uapi.IFLA_INFO_KIND))
    return Link(
        index=index,
        name=_text(name) or "",
        mtu=0 if mtu is None else int.from_bytes(mtu, sys.byteorder),
        is_up=bool(flags & uapi.IFF_UP),
        is_loopback=bool(flags & uapi.IFF_LOOPBACK),
        kind=kind,
        queue_len=0 if queue_len is None else int.from_bytes(queue_len, sys.byteorder),
    )


def decode_address(body: memoryview) -> Address | None:
    """The address of an RTM_NEWADDR or RTM_DELADDR; None if it is not of IPv4."""
    family, prefix_len, flags, scope, index = _IFADDRMSG.unpack_from(body)
    if family != socket.AF_INET:
        return None
    values = dict(attributes(body[_IFADDRMSG.size :]))
    # IFA_LOCAL is the address itself; on point-to-point links IFA_ADDRESS is the far end.
    local = values.get(uapi.IFA_LOCAL) or values.get(uapi.IFA_ADDRESS)
    if local is None:
        return None
    broadcast = values.get(uapi.IFA_BROADCAST)
    if (all_flags := values.get(uapi.IFA_FLAGS)) is not None:
        flags = int.from_bytes(all_flags, sys.byteorder)
    return Address(
        index=index,
        interface=IPv4Interface((bytes(local), prefix_len)),
        is_permanent=bool(flags & uapi.IFA_F_PERMANENT),
        is_deprecated=bool(flags & uapi.IFA_F_DEPRECATED),
        is_temporary=bool(flags & uapi.IFA_F_TEMPORARY),
        scope=scope,
        broadcast=None if broadcast is None else IPv4Address(bytes(broadcast)),
    )


def _text(value: memoryview | None) -> str | None:
    return None if value is None else bytes(value).rstrip(b"\0").decode(errors="replace")
