"""The kernel's links, addresses and routes, what is asked of them, and what was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.errors import ConfigError
from tundp.linux.netlink import Address, Link, Route, RouteLookup

DEFAULT_ROUTE: Final = IPv4Network("0.0.0.0/0")
BROADCAST: Final = IPv4Address("255.255.255.255")
_CONTAINER_BRIDGES: Final = frozenset({"docker0", "cni0"})
_OVERLAY_KINDS: Final = frozenset(
    {"tun", "vxlan", "geneve", "wireguard", "ipip", "sit", "gre", "gretap"}
)
CARRIED: Final = "; packets from "
"""Begins what `Interface.why` says of a link that carries what another one has the address of."""
NO_DEFAULT_ROUTE: Final = "has no default route"
REMEDY: Final = "name the interface the other nodes reach with --iface or --iface-can-reach"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the kernel has: one dump of each, shared by all who look in one round."""

    links: Sequence[Link]
    addresses: Sequence[Address]
    routes: Sequence[Route]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the operator asked for: the flags of these names."""

    iface: tuple[str, ...] = ()
    """Addresses or names, in order."""
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: IPv4Address | None = None
    public_ip: IPv4Address | None = None

    @property
    def has_selector(self) -> bool:
        """Whether the interface itself was asked for."""
        return bool(self.iface or self.iface_regex or self.iface_can_reach)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """The chosen interface. `public_ip` is what the lease advertises, `address` what we bind."""

    link: Link
    address: IPv4Address
    public_ip: IPv4Address
    why: str
    """What spoke for it when it was chosen."""
    holder: int = 0
    """Index of the link that has `address`, if that is not `link`, which carries the packets."""
    others: tuple[str, ...] = ()
    """Each other usable address and what spoke against it: "eth1 192.0.2.9: is down"."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything the choice depends on."""

    host: Host
    selection: Selection
    reached: RouteLookup | None
    can_reach_error: str | None
    network: IPv4Network | None
    ways: Sequence[RouteLookup] = ()
    """Where the kernel sends what is for the other nodes, or for far away if none is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer of one selector."""

    link: Link
    address: IPv4Address
    why: str
    objection: str
    """What speaks against every other interface."""
    is_exact: bool
    """The address itself was found, rather than picked from the link's by `_rank`."""
    failures: tuple[str, ...] = ()
    """What the selectors before this one said."""


def link_at(host: Host, index: int) -> Link:
    """The link of that index; ConfigError if it is gone."""
    for link in host.links:
        if link.index == index:
            return link
    raise ConfigError(f"interface {index} vanished while it was being looked at: try again")


def holder_of(host: Host, wanted: IPv4Address) -> Address | None:
    """The address itself, on the first interface that has it."""
    found = [address for address in host.addresses if address.interface.ip == wanted]
    return min(found, key=lambda address: address.index, default=None)


def default_indexes(host: Host) -> Iterator[int]:
    """Links with a default route; the kernel lists low metrics first."""
    for route in host.routes:
        if route.destination == DEFAULT_ROUTE and route.is_unicast:
            yield from route.indexes


def usable(addresses: Iterable[Address]) -> list[Address]:
    """Global or link-local unicast, and not deprecated."""
    return [
        address
        for address in addresses
        if not (
            address.interface.ip.is_loopback
            or address.interface.ip.is_multicast
            or address.interface.ip.is_unspecified
            or address.interface.ip == BROADCAST
            or address.is_deprecated
        )
    ]


def usable_of(host: Host, link: Link) -> list[Address]:
    """The usable addresses of one link, best first."""
    return sorted(usable(a for a in host.addresses if a.index == link.index), key=_rank)


def _rank(address: Address) -> tuple[bool, bool, bool]:
    """Global first, then permanent, then not temporary; sorting keeps the kernel's order."""
    return address.interface.ip.is_link_local, not address.is_permanent, address.is_temporary


def is_overlays_own(case: Case, link: Link, ip: IPv4Address) -> bool:
    """Ours or a pod bridge's: an address of the Network on a device no underlay comes over."""
    if case.network is None or ip not in case.network:
        return False
    return is_inner_bridge(case, link) or is_overlay_device(link)


def has_routes(host: Host, link: Link) -> bool:
    """Whether the kernel sends anything over a link: nothing over loopback or to a lone /32."""
    return any(link.index in route.indexes and route.is_unicast for route in host.routes)


def is_overlay_device(link: Link) -> bool:
    """Whether it is a tunnel, or called as flannel calls its devices."""
    return link.kind in _OVERLAY_KINDS or link.name.startswith("flannel")


def is_inner_bridge(case: Case, link: Link) -> bool:
    """Whether a bridge joins what is inside this host; many an uplink is a bridge too."""
    if link.name in _CONTAINER_BRIDGES:
        return True
    ways = case.ways if case.reached is None else (case.reached, *case.ways)
    is_the_way = any(way.index == link.index for way in ways)
    leads_out = is_the_way or any(
        link.index in route.indexes and (route.gateway or route.destination == DEFAULT_ROUTE)
        for route in case.host.routes
    )
    return link.kind == "bridge" and not leads_out


def inventory(host: Host) -> str:
    """All addresses, for error messages."""
    names = {link.index: link.name for link in host.links}
    listed = [f"{names.get(a.index, f'interface {a.index}')} {a.interface}" for a in host.addresses]
    return ", ".join(listed) or "no IPv4 addresses at all"
