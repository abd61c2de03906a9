"""Which interface, and so which address, the overlay uses, and why not another.

`choose` is pure and works on netlink's answers; `look` and `relook` get them.
The order is flannel's (pkg/ipmatch): each --iface, each --iface-regex, --iface-can-reach;
with none of them the interface that carries --public-ip, else the default route's.

The selectors choose an address. MTU, state and warnings are those of the link that carries the
packets from it: the chosen one, unless the kernel sends them over another (an address on
loopback or a dummy device, as BGP hosts have it; peers that are elsewhere).

We differ where flannel gives up, or takes what cannot work:

- a multipath default route: its first next hop; a default route of another table than main;
- a link without an address (--iface, or the default route's): the address the kernel sends
  from over it;
- --public-ip on no interface (a NAT in front): the default route's, with a warning;
- --iface-can-reach of an address of our own: the interface that carries it, not lo and
  lo's MTU (all nodes are given the same address, and one of them has it);
- a regex is not tried on what is the overlay's own (cni0, flannel0), once its Network is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.errors import ConfigError, PlatformError
from tundp.linux.iface.choose import carries, choose, keep, only
from tundp.linux.iface.explain import finish
from tundp.linux.iface.model import (
    Case,
    Choice,
    Host,
    Interface,
    Selection,
    has_routes,
    is_overlay_device,
    link_at,
)
from tundp.linux.netlink import Flow, Link, Netlink, NoRoute, RouteLookup

FAR: Final = tuple(map(IPv4Address, ("192.88.99.2", "1.1.1.1", "203.0.113.1")))
"""Addresses on the Internet, to ask for the default route; nothing is sent to them."""
_LOOPBACK_MTU: Final = 1500
"""Assumed for an address on loopback while no route says which link carries its packets."""


async def read_host(netlink: Netlink) -> Host:
    """Dump links, addresses and routes. PlatformError."""
    return Host(
        links=await netlink.links(),
        addresses=await netlink.addresses(),
        routes=await netlink.routes(),
    )


async def look(
    netlink: Netlink,
    selection: Selection,
    network: IPv4Network | None,
    *,
    peers: Sequence[IPv4Address] = (),
) -> Interface:
    """Ask the kernel and choose. ConfigError if nothing fits, PlatformError from netlink.

    peers: PublicIPs of other nodes, as far as they are known.
    """
    case = await _ask(netlink, selection, network, peers, None)
    return await _finish(netlink, case, choose(case), peers)


async def relook(
    netlink: Netlink,
    selection: Selection,
    chosen: Interface,
    network: IPv4Network | None,
    *,
    peers: Sequence[IPv4Address] = (),
    host: Host | None = None,
) -> Interface:
    """`chosen` as it is now: equal to it if nothing changed that concerns it.

    Link and address stay while they are there, whatever else would be chosen today, and
    MTU and state are fresh. If the address is gone, another of the same link that the
    selection allows, else a new choice; ConfigError if there is none. An address that is
    being replaced is gone for a moment: give it a while before believing either.
    host: what was dumped just now, if it was.
    """
    case = await _ask(netlink, selection, network, peers, host)
    for index in dict.fromkeys((chosen.link.index, chosen.holder)):
        link = next((one for one in case.host.links if one.index == index), None)
        if link is None:
            continue
        if carries(case.host, link, chosen):
            return await _finish(netlink, case, keep(case, link, chosen), peers)
    for link in case.host.links:
        if link.index == chosen.link.index:
            try:
                choice = replace(choose(only(case, link)), failures=())
                return await _finish(netlink, case, choice, peers)
            except ConfigError:
                pass  # nothing on this link fits any more: all others are asked
    return await _finish(netlink, case, choose(case), peers)


def targets_of(
    selection: Selection, peers: Sequence[IPv4Address]
) -> tuple[Sequence[IPv4Address], bool]:
    """Whom to look up for the way to the other nodes; whether these are nodes."""
    if peers:
        return peers, True
    if selection.iface_can_reach is not None:
        return (selection.iface_can_reach,), False
    return FAR, False


async def ways_to(
    netlink: Netlink, targets: Sequence[IPv4Address], flow: Flow | None = None
) -> list[RouteLookup]:
    """The unicast routes the kernel would take to `targets`; only default routes to FAR."""
    found = await netlink.lookups(targets, flow, of_routes=False)
    if targets == FAR:
        routes = await netlink.lookups(targets, flow, of_routes=True)
        defaults = [
            found[target]
            for target, route in routes.items()
            if isinstance(route, RouteLookup) and route.prefix_len == 0
        ]
        return _unicast(defaults[:1])
    return _unicast(found.values())


def _unicast(found: Iterable[RouteLookup | NoRoute]) -> list[RouteLookup]:
    return [
        each
        for each in found
        if isinstance(each, RouteLookup) and each.kind == "unicast" and each.index
    ]


async def _ask(
    netlink: Netlink,
    selection: Selection,
    network: IPv4Network | None,
    peers: Sequence[IPv4Address],
    host: Host | None,
) -> Case:
    reached, can_reach_error = None, None
    if selection.iface_can_reach is not None:
        try:
            reached = await netlink.route_to(selection.iface_can_reach)
        except PlatformError as error:
            can_reach_error = str(error)
    targets, _ = targets_of(selection, peers)
    return Case(
        host=await read_host(netlink) if host is None else host,
        selection=selection,
        reached=reached,
        can_reach_error=can_reach_error,
        network=network,
        ways=await ways_to(netlink, targets),
    )


async def _finish(
    netlink: Netlink, case: Case, choice: Choice, peers: Sequence[IPv4Address]
) -> Interface:
    return finish(case, choice, await _carrier(netlink, case, choice, peers))


async def _carrier(
    netlink: Netlink, case: Case, choice: Choice, peers: Sequence[IPv4Address]
) -> Link:
    """The link the kernel sends packets from the chosen address over.

    The chosen link if any goes over it, or if nothing is known but a default route elsewhere
    (its own neighbours may be the nodes). Of several others the one with the least MTU.
    """
    link = choice.link
    targets, are_nodes = targets_of(case.selection, peers)
    ways = await ways_to(netlink, targets, Flow(source=choice.address))
    outs: list[Link] = []
    for index in dict.fromkeys(way.index for way in ways):
        one = link_at(case.host, index)
        if not one.is_loopback and not is_overlay_device(one):
            outs.append(one)
    if link in outs:
        return link
    is_holder = any(
        a.index == link.index and a.interface.ip == choice.address for a in case.host.addresses
    )
    # A link that is down has no routes, and may well be the one all the same.
    may_carry = is_holder and (has_routes(case.host, link) or not link.is_up)
    if outs and (are_nodes or not may_carry):
        return min(outs, key=lambda one: one.mtu)
    if link.is_loopback:
        return replace(link, mtu=min(link.mtu, _LOOPBACK_MTU))
    return link
