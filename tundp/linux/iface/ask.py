"""Which interface, and so which address, the overlay uses, and why not another.

`choose` is pure and works on netlink's answers; `look` and `relook` get them.
The order is flannel's (pkg/ipmatch): each --iface, each --iface-regex, --iface-can-reach;
with none of them the interface that carries --public-ip, else the default route's.

We differ where flannel gives up, or takes what cannot work:

- a multipath default route: its first next hop;
- --public-ip on no interface (a NAT in front): the default route's, with a warning;
- --iface-can-reach of an address of our own: the interface that carries it, not lo and
  lo's MTU (all nodes are given the same address, and one of them has it);
- a regex is not tried on what is the overlay's own (cni0, flannel0), once its Network is known.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network

from tundp.errors import ConfigError, PlatformError
from tundp.linux.iface.choose import carries, choose, keep, only
from tundp.linux.iface.explain import finish
from tundp.linux.iface.model import (
    Case,
    Host,
    Interface,
    Selection,
)
from tundp.linux.netlink import Netlink


async def look(netlink: Netlink, selection: Selection, network: IPv4Network | None) -> Interface:
    """Ask the kernel and choose. ConfigError if nothing fits, PlatformError from netlink."""
    case = await _ask(netlink, selection, network)
    return finish(case, choose(case))


async def relook(
    netlink: Netlink, selection: Selection, chosen: Interface, network: IPv4Network | None
) -> Interface:
    """`chosen` as it is now: equal to it if nothing changed that concerns it.

    Link and address stay while they are there, whatever else would be chosen today, and
    MTU and state are fresh. If the address is gone, another of the same link that the
    selection allows, else a new choice; ConfigError if there is none. An address that is
    being replaced is gone for a moment: give it a while before believing either.
    """
    case = await _ask(netlink, selection, network)
    link = next((one for one in case.host.links if one.index == chosen.link.index), None)
    if link is not None and carries(case.host, link, chosen.address):
        return finish(case, keep(case, link, chosen))
    if link is not None:
        try:
            return finish(case, replace(choose(only(case, link)), failures=()))
        except ConfigError:
            pass  # nothing on this link fits any more: all others are asked
    return finish(case, choose(case))


async def _ask(netlink: Netlink, selection: Selection, network: IPv4Network | None) -> Case:
    reached, can_reach_error = None, None
    if selection.iface_can_reach is not None:
        try:
            reached = await netlink.route_to(selection.iface_can_reach)
        except PlatformError as error:
            can_reach_error = str(error)
    return Case(
        host=Host(
            links=await netlink.links(),
            addresses=await netlink.addresses(),
            routes=await netlink.routes(),
        ),
        selection=selection,
        reached=reached,
        can_reach_error=can_reach_error,
        network=network,
    )
