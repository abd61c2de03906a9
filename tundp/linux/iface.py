"""Which interface, and so which address, the overlay uses, and why not another.

`select_interface` is pure and works on netlink's answers; `look` and `relook` get them.
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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Final

from tundp.errors import ConfigError, PlatformError
from tundp.linux.goregex import compile_go_regex
from tundp.linux.netlink import Address, Link, Netlink, Route, RouteLookup
from tundp.linux.uapi import RT_SCOPE_HOST

_DEFAULT: Final = IPv4Network("0.0.0.0/0")
_BROADCAST: Final = IPv4Address("255.255.255.255")
_VIRTUALBOX: Final = IPv4Address("10.0.2.15")
"""What VirtualBox's NAT gives to each virtual machine, on every host."""
_CONTAINER_BRIDGES: Final = frozenset({"docker0", "cni0"})
_OVERLAY_KINDS: Final = frozenset(
    {"tun", "vxlan", "geneve", "wireguard", "ipip", "sit", "gre", "gretap"}
)
_NO_DEFAULT_ROUTE: Final = "has no default route"
_REMEDY: Final = "name the interface the other nodes reach with --iface or --iface-can-reach"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the kernel has."""

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
    public_ipv6: IPv6Address | None = None
    """Kept, and looked at by nobody: the overlay carries IPv4."""

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
    others: tuple[str, ...] = ()
    """Each other usable address and what spoke against it: "eth1 192.0.2.9: is down"."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Everything the choice depends on."""

    host: Host
    selection: Selection
    reached: RouteLookup | None
    can_reach_error: str | None
    network: IPv4Network | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
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


async def look(netlink: Netlink, selection: Selection, network: IPv4Network | None) -> Interface:
    """Ask the kernel and choose. ConfigError if nothing fits, PlatformError from netlink."""
    case = await _ask(netlink, selection, network)
    return _finish(case, _choose(case))


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
    if link is not None and _carries(case.host, link, chosen.address):
        return _finish(case, _keep(case, link, chosen))
    if link is not None:
        try:
            return _finish(case, replace(_choose(_only(case, link)), failures=()))
        except ConfigError:
            pass  # nothing on this link fits any more: all others are asked
    return _finish(case, _choose(case))


def select_interface(
    host: Host,
    *,
    wanted: Sequence[str],
    regexes: Sequence[str] = (),
    can_reach: IPv4Address | None = None,
    reached: RouteLookup | None = None,
    can_reach_error: str | None = None,
    public_ip: IPv4Address | None,
    network: IPv4Network | None = None,
) -> Interface:
    """Choose by the rules above. ConfigError says what failed, and lists what is there.

    wanted, regexes, can_reach: the selectors, tried in this order.
    reached: the kernel's way to `can_reach`; without one, `can_reach_error` says why.
    network: the overlay's, if it is known yet.
    """
    case = _Case(
        host=host,
        selection=Selection(
            iface=tuple(wanted),
            iface_regex=tuple(regexes),
            iface_can_reach=can_reach,
            public_ip=public_ip,
        ),
        reached=reached,
        can_reach_error=can_reach_error,
        network=network,
    )
    return _finish(case, _choose(case))


async def _ask(netlink: Netlink, selection: Selection, network: IPv4Network | None) -> _Case:
    reached, can_reach_error = None, None
    if selection.iface_can_reach is not None:
        try:
            reached = await netlink.route_to(selection.iface_can_reach)
        except PlatformError as error:
            can_reach_error = str(error)
    return _Case(
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


# The selectors


def _choose(case: _Case) -> _Choice:
    selection, public_ip = case.selection, case.selection.public_ip
    if public_ip is not None and (
        public_ip.is_unspecified or public_ip.is_multicast or public_ip == _BROADCAST
    ):
        raise ConfigError(f"invalid public IP address: {public_ip}: it is no single host's")
    if selection.has_selector:
        return _first_that_fits(case)
    if public_ip is not None and _carrier(case.host, public_ip) is not None:
        return _by_address(
            case,
            public_ip,
            why=f"carries --public-ip {public_ip}",
            objection=f"does not carry --public-ip {public_ip}",
        )
    return _by_default_route(case)


def _first_that_fits(case: _Case) -> _Choice:
    failures: list[str] = []
    selection = case.selection
    attempts = [(_by_iface, text) for text in selection.iface]
    attempts += [(_by_regex, text) for text in selection.iface_regex]
    if selection.iface_can_reach is not None:
        attempts.append((_by_reach, str(selection.iface_can_reach)))
    for attempt, text in attempts:
        try:
            # An empty one is flannel's way of saying "the default route's".
            choice = attempt(case, text) if text else _by_default_route(case)
            _check_mtu(choice)
            return replace(choice, failures=tuple(failures))
        except ConfigError as error:
            failures.append(str(error))
    raise ConfigError(
        "Failed to find interface to use that matches the interfaces and/or regexes"
        f" provided: {'; '.join(failures)}. There are: {_inventory(case.host)}"
    )


def _by_iface(case: _Case, text: str) -> _Choice:
    why, objection = f"--iface {text}", f"--iface {text} names another"
    try:
        wanted = IPv4Address(text)
    except ValueError:
        link = next((link for link in case.host.links if link.name == text), None)
        if link is None:
            raise ConfigError(f"no interface is called {text}") from None
        return _best_of(case, link, why, objection)
    return _by_address(case, wanted, why, objection)


def _by_regex(case: _Case, text: str) -> _Choice:
    pattern = compile_go_regex(text)
    links = sorted(case.host.links, key=lambda link: link.index)
    for link in links:
        for address in _usable_of(case.host, link):
            ip = address.interface.ip
            if pattern.search(str(ip)) and not _is_overlays_own(case, link, ip):
                return _Choice(
                    link=link,
                    address=ip,
                    why=f"--iface-regex {text} matches {ip}",
                    objection=f"--iface-regex {text} found {link.name} {ip} first",
                    is_exact=True,
                )
    for link in links:
        if pattern.search(link.name):
            return _best_of(
                case,
                link,
                f"--iface-regex {text} matches its name",
                f"--iface-regex {text} found {link.name} first",
            )
    available = ", ".join(
        f"{link.name}:[{' '.join(str(a.interface.ip) for a in _usable_of(case.host, link))}]"
        for link in links
    )
    raise ConfigError(
        f"Could not match pattern {text} to any of the available network interfaces ({available})"
    )


def _by_reach(case: _Case, text: str) -> _Choice:
    why, objection = f"--iface-can-reach {text} leads over it", f"not the way to {text}"
    if case.reached is None:
        reason = case.can_reach_error or f"no route to {text}"
        raise ConfigError(f"failed to get ifcanreach based interface: {reason}")
    link, source = _link(case.host, case.reached.index), case.reached.source
    if source is None:
        return _best_of(case, link, why, objection)
    if link.is_loopback:
        # The address is ours, and what is sent to ourselves turns around on lo.
        return _by_address(case, source, f"carries {text} of --iface-can-reach", objection)
    return _Choice(link=link, address=source, why=why, objection=objection, is_exact=True)


def _by_address(case: _Case, wanted: IPv4Address, why: str, objection: str) -> _Choice:
    carrier = _carrier(case.host, wanted)
    if carrier is None:
        raise ConfigError(f"no interface with given IP found: {wanted}")
    link = _link(case.host, carrier.index)
    return _Choice(link=link, address=wanted, why=why, objection=objection, is_exact=True)


def _by_default_route(case: _Case) -> _Choice:
    indexes = list(_default_indexes(case.host))
    if indexes:
        # Of a multipath route the first next hop; flannel gives up here.
        link = _link(case.host, indexes[0])
        return _best_of(case, link, "has the default route", _NO_DEFAULT_ROUTE)
    remedy = f"{_REMEDY}. There are: {_inventory(case.host)}"
    if any(route.destination == _DEFAULT for route in case.host.routes):
        raise ConfigError(f"found default route but could not determine interface: {remedy}")
    raise ConfigError(f"unable to find default route, and no --iface given: {remedy}")


def _best_of(case: _Case, link: Link, why: str, objection: str) -> _Choice:
    usable = _usable_of(case.host, link)
    if not usable:
        raise ConfigError(f"failed to find IPv4 address for interface {link.name}")
    ip = usable[0].interface.ip
    return _Choice(link=link, address=ip, why=why, objection=objection, is_exact=False)


# Keeping what was chosen


def _keep(case: _Case, link: Link, chosen: Interface) -> _Choice:
    """The same again: as chosen today if it would be, so that unchanged means equal."""
    try:
        today = _choose(case)
    except ConfigError:
        pass  # the default route went, say; what we have serves all the same
    else:
        if (today.link.index, today.address) == (link.index, chosen.address):
            return today
    return _Choice(
        link=link,
        address=chosen.address,
        why=chosen.why,
        objection=f"{link.name} {chosen.address} is in use and still there",
        is_exact=True,
    )


def _carries(host: Host, link: Link, ip: IPv4Address) -> bool:
    """Whether the link has the address, or sends from it while loopback has it."""
    loopbacks = {one.index for one in host.links if one.is_loopback}
    return any(
        address.interface.ip == ip and (address.index == link.index or address.index in loopbacks)
        for address in host.addresses
    )


def _only(case: _Case, link: Link) -> _Case:
    """The same host with one link, and the routes over it."""
    return replace(
        case,
        host=Host(
            links=(link,),
            addresses=[
                address
                for address in case.host.addresses
                # One to be advertised that has moved is seen, so that it is followed.
                if address.index == link.index or address.interface.ip == case.selection.public_ip
            ],
            routes=[
                replace(route, indexes=(link.index,))
                for route in case.host.routes
                if link.index in route.indexes
            ],
        ),
    )


# What there is


def _link(host: Host, index: int) -> Link:
    for link in host.links:
        if link.index == index:
            return link
    raise ConfigError(f"interface {index} vanished while it was being looked at: try again")


def _carrier(host: Host, wanted: IPv4Address) -> Address | None:
    """The address itself, on the first interface that has it."""
    found = [address for address in host.addresses if address.interface.ip == wanted]
    return min(found, key=lambda address: address.index, default=None)


def _default_indexes(host: Host) -> Iterator[int]:
    """Links with a default route; the kernel lists low metrics first."""
    for route in host.routes:
        if route.destination == _DEFAULT and route.is_unicast:
            yield from route.indexes


def _usable(addresses: Iterable[Address]) -> list[Address]:
    """Global or link-local unicast, and not deprecated."""
    return [
        address
        for address in addresses
        if not (
            address.interface.ip.is_loopback
            or address.interface.ip.is_multicast
            or address.interface.ip.is_unspecified
            or address.interface.ip == _BROADCAST
            or address.is_deprecated
        )
    ]


def _usable_of(host: Host, link: Link) -> list[Address]:
    """The usable addresses of one link, best first."""
    return sorted(_usable(a for a in host.addresses if a.index == link.index), key=_rank)


def _rank(address: Address) -> tuple[bool, bool, bool]:
    """Global first, then permanent, then not temporary; sorting keeps the kernel's order."""
    return address.interface.ip.is_link_local, not address.is_permanent, address.is_temporary


def _is_overlays_own(case: _Case, link: Link, ip: IPv4Address) -> bool:
    """Ours or a pod bridge's: an address of the Network on a device no underlay comes over."""
    if case.network is None or ip not in case.network:
        return False
    return link.kind == "bridge" or _is_overlay_device(link)


def _is_overlay_device(link: Link) -> bool:
    return link.kind in _OVERLAY_KINDS or link.name.startswith("flannel")


def _is_inner_bridge(case: _Case, link: Link) -> bool:
    """Whether a bridge joins what is inside this host; many an uplink is a bridge too."""
    if link.name in _CONTAINER_BRIDGES:
        return True
    is_the_way = case.reached is not None and case.reached.index == link.index
    leads_out = is_the_way or any(
        link.index in route.indexes and (route.gateway or route.destination == _DEFAULT)
        for route in case.host.routes
    )
    return link.kind == "bridge" and not leads_out


def _inventory(host: Host) -> str:
    names = {link.index: link.name for link in host.links}
    listed = [f"{names.get(a.index, f'interface {a.index}')} {a.interface}" for a in host.addresses]
    return ", ".join(listed) or "no IPv4 addresses at all"


# What is said about it


def _finish(case: _Case, choice: _Choice) -> Interface:
    _check_mtu(choice)
    public_ip = case.selection.public_ip or choice.address
    return Interface(
        link=choice.link,
        address=choice.address,
        public_ip=public_ip,
        why=choice.why,
        others=tuple(_others(case, choice)),
        warnings=(
            *choice.failures,
            *_address_warnings(case, public_ip),
            *_link_warnings(case, choice.link),
        ),
    )


def _check_mtu(choice: _Choice) -> None:
    if choice.link.mtu == 0:
        raise ConfigError(
            f"failed to determine MTU for {choice.address} interface {choice.link.name}"
        )


def _address_warnings(case: _Case, public_ip: IPv4Address) -> Iterator[str]:
    told = f"peers are told to send to {public_ip}"
    if public_ip.is_loopback:
        yield f"{told}, which only this host can reach: {_REMEDY}"
    if public_ip.is_link_local:
        yield f"{told}, a link-local address, which only hosts on the same wire can reach"
    if public_ip == _VIRTUALBOX:
        yield (
            f"{told}, the address VirtualBox's NAT gives every virtual machine: they cannot"
            f" reach it, and nodes that share it share one lease; {_REMEDY}"
        )
    if case.network is not None and public_ip in case.network:
        yield (
            f"{told}, which is inside the overlay's Network {case.network}: their packets may"
            f" go into the overlay instead of to us; {_REMEDY}, or choose another Network"
        )
    if not case.selection.has_selector and _carrier(case.host, public_ip) is None:
        yield (
            f"no interface carries --public-ip {public_ip} (a NAT in front?):"
            " using the default route's; name another with --iface"
        )


def _link_warnings(case: _Case, link: Link) -> Iterator[str]:
    if _is_overlay_device(link):
        yield (
            f"{link.name} is a device of another overlay or tunnel"
            f"{f' ({link.kind})' if link.kind else ''}: ours would run inside it; {_REMEDY}"
        )
    elif _is_inner_bridge(case, link):
        yield (
            f"{link.name} is a bridge that leads to no gateway: if it joins containers,"
            f" other nodes cannot reach it; {_REMEDY}"
        )
    if not link.is_up:
        yield f"{link.name} is down, and nothing comes or goes: ip link set {link.name} up"


def _others(case: _Case, choice: _Choice) -> Iterator[str]:
    links = {link.index: link for link in case.host.links}
    for address in _usable(case.host.addresses):
        ip, link = address.interface.ip, links.get(address.index)
        if link is None:
            # Addresses and links come from two looks at the kernel.
            yield f"interface {address.index} {ip}: came or went while it was being looked at"
        elif ip != choice.address:
            yield f"{link.name} {ip}: {_objection(case, choice, link, address)}"


def _objection(case: _Case, choice: _Choice, link: Link, address: Address) -> str:
    """What speaks against `address`: its device if that does, else what the choice went by."""
    if link.index == choice.link.index:
        return choice.objection if choice.is_exact else _lower_rank(choice, address)
    if link.is_loopback or address.scope == RT_SCOPE_HOST:
        return "only for this host"
    if not link.is_up:
        return "is down"
    if _is_overlay_device(link):
        return f"a device of another overlay or tunnel ({link.kind or link.name})"
    if link.kind == "bridge":
        return "a bridge"
    if choice.objection == _NO_DEFAULT_ROUTE and link.index in _default_indexes(case.host):
        return f"its default route comes after that of {choice.link.name}"
    return choice.objection


def _lower_rank(choice: _Choice, address: Address) -> str:
    if address.interface.ip.is_link_local:
        return "link-local"
    if not address.is_permanent:
        return "dynamic"
    if address.is_temporary:
        return "a secondary address"
    return f"the kernel lists {choice.address} first"
