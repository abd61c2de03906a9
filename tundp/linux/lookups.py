"""Lookups of routes by address: what the kernel would do with a datagram (RTM_GETROUTE)."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.route_table import KIND_NAMES, RTMSG, indexes_of
from tundp.linux.rtnl import (
    Answer,
    Request,
    RtnlSocket,
    attribute,
    attribute_u32,
    attributes,
    decode_error,
)

_ALL_KIND_NAMES: Final = KIND_NAMES | {
    uapi.RTN_LOCAL: "local",
    uapi.RTN_BROADCAST: "broadcast",
    uapi.RTN_ANYCAST: "anycast",
    uapi.RTN_MULTICAST: "multicast",
}
_CACHE_INFO: Final = struct.Struct("=3I")
"""linux/rtnetlink.h: struct rta_cacheinfo, its beginning: clntref, lastuse, expires."""
_LOOKUPS: Final = 32
"""Lookups in one datagram: an answer takes up to 2 KB of the receive buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteLookup:
    """The kernel's routing decision for one destination."""

    index: int
    """The outgoing link; loopback's if the address is this host's own."""
    source: IPv4Address | None
    """The source address chosen; None if the host has none for it."""
    gateway: IPv4Address | None = None
    """The neighbour it goes to; None if that is the destination itself."""
    kind: str = "unicast"
    """`unicast`, `local` for an address of this host, `broadcast`, `multicast`, ..."""
    prefix_len: int = 32
    """Of the route found, if the lookup was one `of_routes`; else 32."""
    table: int = uapi.RT_TABLE_MAIN
    """Of the route found."""
    mtu: int | None = None
    """The MTU the route names (`ip route ... mtu`), bytes. Never what an ICMP error said: the
    kernel keeps that with a time at which it expires."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoute:
    """There is no route to a destination, and why: the errno of the lookup."""

    errno: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What a datagram is, besides its destination, that policy rules may route by."""

    source: IPv4Address | None
    """One of this host's, unless it comes in by a device; the kernel refuses others (EINVAL)."""
    port: int = 0
    """Source and destination port, of UDP; 0 if not known."""
    is_udp: bool = True
    proto: int = 0
    """The protocol, if it is not UDP; 0 if not known. The kernel takes TCP and ICMP."""
    destination_port: int = 0
    """The destination port alone, if the source's is not known; 0 if neither is."""
    iif: int = 0
    """The index of the device it comes in by; 0 for one of this host's own."""
    mark: int = 0


def look_up(
    sock: RtnlSocket,
    addresses: Sequence[IPv4Address],
    flow: Flow | None = None,
    *,
    of_routes: bool = False,
) -> list[RouteLookup | NoRoute]:
    """Return the kernel's routing decision for each address, as for a datagram of `flow`.

    of_routes: the routes found (Linux 4.13; `source` and `gateway` are as the route names
    them) rather than the result. PlatformError if the kernel could not be asked.
    """
    found: list[RouteLookup | NoRoute] = []
    for first in range(0, len(addresses), _LOOKUPS):
        requests = [
            Request(uapi.RTM_GETROUTE, 0, _encode_lookup(address, flow, of_routes=of_routes))
            for address in addresses[first : first + _LOOKUPS]
        ]
        try:
            found.extend(map(_decode_lookup, sock.exchange(requests)))
        except OSError as error:
            raise PlatformError(
                f"cannot look up routes: {error.strerror or error}", error.errno
            ) from None
    return found


def _encode_lookup(address: IPv4Address, flow: Flow | None, *, of_routes: bool) -> bytes:
    flags = uapi.RTM_F_LOOKUP_TABLE | (uapi.RTM_F_FIB_MATCH if of_routes else 0)
    source_len = 0 if flow is None or flow.source is None else 32
    body = RTMSG.pack(socket.AF_INET, 32, source_len, 0, 0, 0, 0, 0, flags)
    body += attribute(uapi.RTA_DST, address.packed)
    if flow is not None:
        if flow.source is not None:
            body += attribute(uapi.RTA_SRC, flow.source.packed)
        if flow.iif:
            body += attribute_u32(uapi.RTA_IIF, flow.iif)
        if flow.mark:
            body += attribute_u32(uapi.RTA_MARK, flow.mark)
        proto = flow.proto or (socket.IPPROTO_UDP if flow.is_udp else 0)
        if proto:
            body += attribute(uapi.RTA_IP_PROTO, bytes((proto,)))
        if flow.destination_port:
            body += attribute(uapi.RTA_DPORT, flow.destination_port.to_bytes(2, "big"))
        elif flow.port:
            port = flow.port.to_bytes(2, "big")
            body += attribute(uapi.RTA_SPORT, port) + attribute(uapi.RTA_DPORT, port)
    return body


def _decode_lookup(answer: Answer) -> RouteLookup | NoRoute:
    if answer.kind == uapi.NLMSG_ERROR:
        return NoRoute(errno=decode_error(answer.flags, answer.body)[0])
    _, prefix_len, _, _, table, _, _, kind, _ = RTMSG.unpack_from(answer.body)
    values = dict(attributes(answer.body[RTMSG.size :]))
    source, gateway = values.get(uapi.RTA_PREFSRC), values.get(uapi.RTA_GATEWAY)
    if (full_table := values.get(uapi.RTA_TABLE)) is not None:
        table = int.from_bytes(full_table, sys.byteorder)
    return RouteLookup(
        index=next(iter(indexes_of(values)), 0),
        source=None if source is None else IPv4Address(bytes(source)),
        gateway=None if gateway is None else IPv4Address(bytes(gateway)),
        kind=_ALL_KIND_NAMES.get(kind, str(kind)),
        prefix_len=prefix_len,
        table=table,
        mtu=_decode_mtu(values),
    )


def _decode_mtu(values: Mapping[int, memoryview]) -> int | None:
    expiry = values.get(uapi.RTA_CACHEINFO)
    if expiry is not None and _CACHE_INFO.unpack_from(expiry)[2]:
        return None
    metrics = dict(attributes(values.get(uapi.RTA_METRICS, memoryview(b""))))
    mtu = metrics.get(uapi.RTAX_MTU)
    return int.from_bytes(mtu, sys.byteorder) or None if mtu is not None else None
