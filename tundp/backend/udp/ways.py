"""What the kernel would do with datagrams to peers: routes, and the neighbours they lead to."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Collection, Mapping
from ipaddress import IPv4Address
from typing import Final

from tundp.engine.reach import Way
from tundp.linux.netlink import Flow, Netlink, NextHop, NoRoute, RouteLookup

_NO_ROUTE: Final[Mapping[int, str]] = {
    errno.ENETUNREACH: "no route",
    errno.EHOSTUNREACH: 'the route is "unreachable"',
    errno.EACCES: 'the route is "prohibit"',
    errno.EINVAL: 'the route is "blackhole", or our address is away',
}
"""What the kernel says of an address without a way, by errno."""


async def find_ways(
    netlink: Netlink, flow: Flow, addresses: Collection[IPv4Address]
) -> dict[IPv4Address, Way]:
    """The way to each address, as for datagrams of `flow`. PlatformError."""
    found = await netlink.lookups(addresses, flow, of_routes=True)
    hops = {
        address: NextHop(answer.index, answer.gateway or address)
        for address, answer in found.items()
        if isinstance(answer, RouteLookup)
    }
    states = await netlink.neighbour_states(dict.fromkeys(hops.values()))
    return {
        address: _way(answer, states[hops[address]] if address in hops else "")
        for address, answer in found.items()
    }


def _way(answer: RouteLookup | NoRoute, neighbour: str) -> Way:
    if isinstance(answer, NoRoute):
        return Way(trouble=_NO_ROUTE.get(answer.errno, f"no route (error {answer.errno})"))
    device = ""
    with contextlib.suppress(OSError):
        device = socket.if_indextoname(answer.index)
    return Way(
        device=device,
        gateway=answer.gateway,
        is_default=answer.prefix_len == 0,
        neighbour=neighbour,
    )
