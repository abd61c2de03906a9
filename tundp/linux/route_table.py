"""IPv4 routes by the thousand: added, replaced, deleted and listed over a netlink socket.

pyroute2 makes some 3,000 routes a second, each with a round trip of its own. Here many
requests go into one datagram; the kernel carries them out in order while it is sent
(netlink_rcv_skb), and acknowledges each, so that every failure has its route.

Blocking, and not to be called by two threads at once: see Netlink.change_routes.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final, TypeVar

from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.rtnl import (
    Request,
    RtnlSocket,
    aligned,
    attribute,
    attribute_u32,
    attributes,
    decode_error,
)

T = TypeVar("T")

BATCH: Final = 128
"""Requests in one datagram. Their acknowledgements wait in the receive buffer, at most some
800 bytes of it each: far below the least net.core.rmem_default."""
_TRIES: Final = 5
"""Dumps of a table that changes meanwhile, before we give up."""
RTMSG: Final = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags."""
_NEXT_HOP: Final = struct.Struct("=HBBi")
"""struct rtnexthop: length with attributes, flags, hops, interface index."""
_KINDS: Final = {
    "unicast": uapi.RTN_UNICAST,
    "blackhole": uapi.RTN_BLACKHOLE,
    "unreachable": uapi.RTN_UNREACHABLE,
    "prohibit": uapi.RTN_PROHIBIT,
    "throw": uapi.RTN_THROW,
}
KIND_NAMES: Final = {number: name for name, number in _KINDS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One IPv4 route of the main table; several `indexes` for a multipath route."""

    destination: IPv4Network
    indexes: tuple[int, ...]
    gateway: IPv4Address | None
    priority: int
    kind: str
    """`unicast`, or what becomes of packets instead: `blackhole`, `unreachable`, ..."""

    @property
    def is_unicast(self) -> bool:
        """False for blackhole, unreachable and the like."""
        return self.kind == "unicast"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteEntry:
    """One IPv4 route with at most one next hop, as it is added, deleted and listed."""

    destination: IPv4Network
    gateway: IPv4Address | None = None
    """None: the destination is on the link itself."""
    index: int = 0
    """The outgoing link's; 0 for kinds without one, or to let the kernel choose by gateway."""
    kind: str = "unicast"
    """`unicast`, or what becomes of packets: `blackhole`, `unreachable`, `prohibit`, `throw`."""
    is_onlink: bool = False
    """Take `gateway` for a neighbour on `index` although no address there covers it."""
    protocol: int = uapi.RTPROT_BOOT
    """Who made it: rtnetlink.h's RTPROT_, or a number of one's own above 4."""
    metric: int = 0
    table: int = uapi.RT_TABLE_MAIN
    source: IPv4Address | None = None
    """The preferred source address of this host's own packets."""

    def __str__(self) -> str:
        """As `ip route` writes it, more or less."""
        words = [str(self.destination)] if self.kind == "unicast" else [self.kind]
        if self.kind != "unicast":
            words.append(str(self.destination))
        if self.gateway is not None:
            words.append(f"via {self.gateway}")
        if self.index:
            words.append(f"dev {self.index}")
        if self.metric:
            words.append(f"metric {self.metric}")
        return " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFailure:
    """One request the kernel refused; those beside it were carried out."""

    action: str
    """`add`, `replace` or `delete`."""
    route: RouteEntry
    errno: int
    """EEXIST: `add` found one of that prefix, metric and table; ESRCH: `delete` found none."""
    reason: str
    """In words: the kernel's own where it has some (extended acknowledgement)."""

    def __str__(self) -> str:
        """What was attempted, and why it failed."""
        return f"cannot {self.action} route {self.route}: {self.reason}"


_ACTIONS: Final = {
    "delete": (uapi.RTM_DELROUTE, 0),
    "replace": (uapi.RTM_NEWROUTE, uapi.NLM_F_CREATE | uapi.NLM_F_REPLACE),
    "add": (uapi.RTM_NEWROUTE, uapi.NLM_F_CREATE | uapi.NLM_F_EXCL),
}


class RouteTable:
    """Change and list routes over a socket, whose thread's network namespace is meant."""

    def __init__(self, sock: RtnlSocket) -> None:
        self._socket = sock

    def change(
        self,
        *,
        delete: Iterable[RouteEntry] = (),
        replace: Iterable[RouteEntry] = (),
        add: Iterable[RouteEntry] = (),
    ) -> list[RouteFailure]:
        """Carry out the changes in this order; those the kernel refused.

        delete  the route with these very fields; 0 and None match any
        replace the first route of that prefix, metric and table, whoever made it; make it
                if there is none
        add     refused if there is a route of that prefix, metric and table

        PlatformError if the kernel could not be asked: what was done is not known then.
        """
        requests = [
            (action, route)
            for action, routes in (("delete", delete), ("replace", replace), ("add", add))
            for route in routes
        ]
        failures: list[RouteFailure] = []
        for first in range(0, len(requests), BATCH):
            failures += self._send(requests[first : first + BATCH])
        return failures

    def entries(
        self,
        *,
        index: int = 0,
        protocol: int = 0,
        table: int = uapi.RT_TABLE_MAIN,
    ) -> list[RouteEntry]:
        """The routes of one table, in the kernel's order; of a link or a protocol only, if given.

        Routes with several next hops are left out, and so are kinds that RouteEntry has no
        name for. PlatformError if the table changes faster than it can be read.
        """
        for _ in range(_TRIES):
            found, is_consistent = self._dump(index, protocol, table, _decode)
            if is_consistent:
                return [
                    route
                    for route in found
                    # Before Linux 4.20 the kernel gives all there are.
                    if route.table == table
                    and index in (0, route.index)
                    and protocol in (0, route.protocol)
                ]
        raise PlatformError("cannot list routes: they change faster than they can be read")

    def routes(self, table: int = uapi.RT_TABLE_MAIN) -> list[Route]:
        """All routes of one table in the kernel's order, those with several next hops, too.

        If the table changes faster than it can be read, what was read last.
        """
        found: list[tuple[int, Route]] = []
        for _ in range(_TRIES):
            found, is_consistent = self._dump(0, 0, table, _decode_hops)
            if is_consistent:
                break
        # Before Linux 4.20 the kernel gives those of every table.
        return [route for its_table, route in found if its_table == table]

    def prefixes(self, index: int) -> list[IPv4Network]:
        """The destinations of every unicast route over a link, of all tables."""
        body = RTMSG.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
        body += attribute_u32(uapi.RTA_OIF, index)
        request = (uapi.RTM_GETROUTE, body)
        found, _ = self._socket.dump("list routes", request, _decode_hops)
        return list(
            dict.fromkeys(
                route.destination
                for _, route in found
                # Before Linux 4.20 the kernel gives those of every link.
                if index in route.indexes and route.is_unicast
            )
        )

    def _send(self, requests: Sequence[tuple[str, RouteEntry]]) -> list[RouteFailure]:
        messages = []
        for action, route in requests:
            kind, flags = _ACTIONS[action]
            body = _encode(route, is_deletion=action == "delete")
            messages.append(Request(kind, flags | uapi.NLM_F_ACK, body))
        failures: list[RouteFailure] = []
        try:
            for answer in self._socket.exchange(messages):
                code, reason = decode_error(answer.flags, answer.body)
                if code:
                    action, route = requests[answer.number]
                    failures.append(
                        RouteFailure(action=action, route=route, errno=code, reason=reason)
                    )
        except OSError as error:
            raise PlatformError(
                f"cannot change routes: {error.strerror or error}", error.errno
            ) from None
        return failures

    def _dump(
        self, index: int, protocol: int, table: int, decode: Callable[[memoryview], T | None]
    ) -> tuple[list[T], bool]:
        """What `decode` makes of each message; whether the table stayed the same meanwhile."""
        body = RTMSG.pack(socket.AF_INET, 0, 0, 0, table & 0xFF, protocol, 0, 0, 0)
        body += attribute_u32(uapi.RTA_TABLE, table)
        if index:
            body += attribute_u32(uapi.RTA_OIF, index)
        return self._socket.dump("list routes", (uapi.RTM_GETROUTE, body), decode)


def _encode(route: RouteEntry, *, is_deletion: bool) -> bytes:
    """A struct rtmsg and its attributes."""
    if is_deletion:
        scope = uapi.RT_SCOPE_NOWHERE  # any (fib_table_delete in net/ipv4/fib_trie.c)
    elif route.kind == "unicast" and route.gateway is None:
        scope = uapi.RT_SCOPE_LINK
    else:
        scope = uapi.RT_SCOPE_UNIVERSE
    body = RTMSG.pack(
        socket.AF_INET,
        route.destination.prefixlen,
        0,
        0,
        route.table if route.table < 256 else uapi.RT_TABLE_UNSPEC,
        route.protocol,
        scope,
        _KINDS[route.kind],
        uapi.RTNH_F_ONLINK if route.is_onlink else 0,
    )
    body += attribute(uapi.RTA_DST, route.destination.network_address.packed)
    body += attribute_u32(uapi.RTA_TABLE, route.table)
    if route.gateway is not None:
        body += attribute(uapi.RTA_GATEWAY, route.gateway.packed)
    if route.index:
        body += attribute_u32(uapi.RTA_OIF, route.index)
    if route.metric:
        body += attribute_u32(uapi.RTA_PRIORITY, route.metric)
    if route.source is not None:
        body += attribute(uapi.RTA_PREFSRC, route.source.packed)
    return body


def decode_destination(body: memoryview) -> tuple[IPv4Network, tuple[int, ...], int] | None:
    """Destination, links and table of a route message; None if it is not of IPv4."""
    family, prefix_len, _, _, table, _, _, _, _ = RTMSG.unpack_from(body)
    if family != socket.AF_INET:
        return None
    values = dict(attributes(body[RTMSG.size :]))
    destination = values.get(uapi.RTA_DST)
    if (full_table := values.get(uapi.RTA_TABLE)) is not None:
        table = int.from_bytes(full_table, sys.byteorder)
    network = IPv4Network((bytes(destination) if destination else 0, prefix_len))
    return network, indexes_of(values), table


def _decode(body: memoryview) -> RouteEntry | None:
    """The route of a message; None if RouteEntry cannot hold it."""
    _, prefix_len, _, _, table, protocol, _, kind, flags = RTMSG.unpack_from(body)
    values = dict(attributes(body[RTMSG.size :]))
    if kind not in KIND_NAMES or uapi.RTA_MULTIPATH in values:
        return None

    def number(attribute: int, default: int = 0) -> int:
        found = values.get(attribute)
        return default if found is None else int(struct.unpack_from("=I", found)[0])

    def address(attribute: int) -> IPv4Address | None:
        found = values.get(attribute)
        return None if found is None else IPv4Address(bytes(found))

    destination = address(uapi.RTA_DST) or IPv4Address(0)
    return RouteEntry(
        destination=IPv4Network((destination, prefix_len)),
        gateway=address(uapi.RTA_GATEWAY),
        index=number(uapi.RTA_OIF),
        kind=KIND_NAMES[kind],
        is_onlink=bool(flags & uapi.RTNH_F_ONLINK),
        protocol=protocol,
        metric=number(uapi.RTA_PRIORITY),
        table=number(uapi.RTA_TABLE, table),
        source=address(uapi.RTA_PREFSRC),
    )


def _decode_hops(body: memoryview) -> tuple[int, Route]:
    """Table and route of a message, whatever its kind and however many its next hops."""
    _, prefix_len, _, _, table, _, _, kind, _ = RTMSG.unpack_from(body)
    values = dict(attributes(body[RTMSG.size :]))
    destination, gateway = values.get(uapi.RTA_DST), values.get(uapi.RTA_GATEWAY)
    priority = values.get(uapi.RTA_PRIORITY)
    if (full_table := values.get(uapi.RTA_TABLE)) is not None:
        table = int.from_bytes(full_table, sys.byteorder)
    return table, Route(
        destination=IPv4Network((bytes(destination) if destination else 0, prefix_len)),
        indexes=indexes_of(values),
        gateway=IPv4Address(bytes(gateway)) if gateway is not None else None,
        priority=0 if priority is None else int.from_bytes(priority, sys.byteorder),
        kind=KIND_NAMES.get(kind, str(kind)),
    )


def indexes_of(values: Mapping[int, memoryview]) -> tuple[int, ...]:
    """The outgoing links of a route's attributes."""
    if (index := values.get(uapi.RTA_OIF)) is not None:
        return (int.from_bytes(index, sys.byteorder),)
    return tuple(_hop_indexes(values.get(uapi.RTA_MULTIPATH, memoryview(b""))))


def _hop_indexes(multipath: memoryview) -> Iterator[int]:
    """The link of each next hop."""
    while len(multipath) >= _NEXT_HOP.size:
        length, _, _, index = _NEXT_HOP.unpack_from(multipath)
        if not _NEXT_HOP.size <= length <= len(multipath):
            return
        yield index
        multipath = multipath[aligned(length) :]
