"""What is told of a choice: warnings, and what speaks against every other address."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

from tundp.errors import ConfigError
from tundp.linux.iface.model import (
    CARRIED,
    NO_DEFAULT_ROUTE,
    REMEDY,
    Case,
    Choice,
    Interface,
    default_indexes,
    holder_of,
    is_inner_bridge,
    is_overlay_device,
    usable,
)
from tundp.linux.netlink import Address, Link
from tundp.linux.uapi import RT_SCOPE_HOST

_VIRTUALBOX: Final = IPv4Address("10.0.2.15")
"""What VirtualBox's NAT gives to each virtual machine, on every host."""


def finish(case: Case, choice: Choice, carrier: Link | None = None) -> Interface:
    """The choice as the daemon takes it, with its warnings and its rivals.

    carrier: the link its packets go over, if that is not the one chosen: MTU, state and warnings
    are that link's.
    """
    check_mtu(choice)
    public_ip = case.selection.public_ip or choice.address
    link = choice.link if carrier is None else carrier
    holder = _holder(case, choice)
    why = choice.why
    if holder is not None and holder.index != link.index:
        why += f"{CARRIED}{choice.address} on {holder.name} go over {link.name}"
    return Interface(
        link=link,
        address=choice.address,
        public_ip=public_ip,
        why=why,
        holder=0 if holder is None or holder.index == link.index else holder.index,
        others=tuple(_others(case, choice)),
        warnings=(
            *choice.failures,
            *_address_warnings(case, public_ip),
            *_link_warnings(case, link, holder or link),
        ),
    )


def _holder(case: Case, choice: Choice) -> Link | None:
    """The link that has the chosen address: the one chosen if it does, else the first."""
    indexes = {a.index for a in case.host.addresses if a.interface.ip == choice.address}
    if choice.link.index in indexes:
        return choice.link
    return next((link for link in case.host.links if link.index in indexes), None)


def check_mtu(choice: Choice) -> None:
    """ConfigError for a link without an MTU: what fits into a datagram cannot be computed."""
    if choice.link.mtu == 0:
        raise ConfigError(
            f"failed to determine MTU for {choice.address} interface {choice.link.name}"
        )


def _address_warnings(case: Case, public_ip: IPv4Address) -> Iterator[str]:
    told = f"peers are told to send to {public_ip}"
    if public_ip.is_loopback:
        yield f"{told}, which only this host can reach: {REMEDY}"
    if public_ip.is_link_local:
        yield f"{told}, a link-local address, which only hosts on the same wire can reach"
    if public_ip == _VIRTUALBOX:
        yield (
            f"{told}, the address VirtualBox's NAT gives every virtual machine: they cannot"
            f" reach it, and nodes that share it share one lease; {REMEDY}"
        )
    if case.network is not None and public_ip in case.network and not _is_on_link(case, public_ip):
        yield (
            f"{told}, which is inside the overlay's Network {case.network}: their packets may"
            f" go into the overlay instead of to us; {REMEDY}, or choose another Network"
        )
    if not case.selection.has_selector and holder_of(case.host, public_ip) is None:
        yield (
            f"no interface carries --public-ip {public_ip} (a NAT in front?):"
            " using the default route's; name another with --iface"
        )


def _is_on_link(case: Case, public_ip: IPv4Address) -> bool:
    """Whether other nodes have a route to our address that is longer than the overlay's.

    Those on the same link have one as we do; of others we know nothing.
    """
    holder = holder_of(case.host, public_ip)
    if holder is None or case.network is None:
        return False
    return case.network.prefixlen < holder.interface.network.prefixlen < 31


def _link_warnings(case: Case, link: Link, holder: Link) -> Iterator[str]:
    """What speaks against the link that carries the packets, or the one that has the address."""
    if is_overlay_device(holder):
        yield (
            f"{holder.name} is a device of another overlay or tunnel"
            f"{f' ({holder.kind})' if holder.kind else ''}: ours would run inside it; {REMEDY}"
        )
    elif is_inner_bridge(case, link):
        yield (
            f"{link.name} is a bridge that leads to no gateway: if it joins containers,"
            f" other nodes cannot reach it; {REMEDY}"
        )
    if not link.is_up:
        yield f"{link.name} is down, and nothing comes or goes: ip link set {link.name} up"


def _others(case: Case, choice: Choice) -> Iterator[str]:
    links = {link.index: link for link in case.host.links}
    for address in usable(case.host.addresses):
        ip, link = address.interface.ip, links.get(address.index)
        if link is None:
            # Addresses and links come from two looks at the kernel.
            yield f"interface {address.index} {ip}: came or went while it was being looked at"
        elif ip != choice.address:
            yield f"{link.name} {ip}: {_objection(case, choice, link, address)}"


def _objection(case: Case, choice: Choice, link: Link, address: Address) -> str:
    """What speaks against `address`: its device if that does, else what the choice went by."""
    if link.index == choice.link.index:
        return choice.objection if choice.is_exact else _lower_rank(choice, address)
    if link.is_loopback or address.scope == RT_SCOPE_HOST:
        return "only for this host"
    if not link.is_up:
        return "is down"
    if is_overlay_device(link):
        return f"a device of another overlay or tunnel ({link.kind or link.name})"
    if link.kind == "bridge":
        return "a bridge"
    if choice.objection == NO_DEFAULT_ROUTE and link.index in default_indexes(case.host):
        return f"its default route comes after that of {choice.link.name}"
    return choice.objection


def _lower_rank(choice: Choice, address: Address) -> str:
    if address.interface.ip.is_link_local:
        return "link-local"
    if not address.is_permanent:
        return "dynamic"
    if address.is_temporary:
        return "a secondary address"
    return f"the kernel lists {choice.address} first"
