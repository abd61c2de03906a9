"""Which interface, and so which address, the overlay uses. Pure: works on netlink's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.errors import ConfigError
from tundp.linux.netlink import Address, Link, Route

_DEFAULT: Final = IPv4Network("0.0.0.0/0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Everything the choice depends on."""

    links: Sequence[Link]
    addresses: Sequence[Address]
    routes: Sequence[Route]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """The chosen interface. `public_ip` is what the lease advertises, `address` what we bind."""

    link: Link
    address: IPv4Address
    public_ip: IPv4Address
    why: str
    warnings: tuple[str, ...] = ()


def select_interface(
    host: Host, *, wanted: Sequence[str], public_ip: IPv4Address | None
) -> Interface:
    """The first of `wanted` (addresses or names) that fits, else the default route's interface.

    With only a public IP, the interface that carries it; where none does (a NAT in
    front), the default route's with a warning, though flannel >= 0.12 refuses.
    ConfigError lists what is there when nothing fits.
    """
    warnings: list[str] = []
    failures: list[str] = []
    for text in wanted:
        try:
            link, address = _lookup(host, text)
            return _finish(host, link, address, public_ip, f"--iface {text}", failures)
        except ConfigError as error:
            failures.append(str(error))
    if wanted:
        raise ConfigError(
            "Failed to find interface to use that matches the interfaces and/or regexes"
            f" provided: {'; '.join(failures)}. There are: {_inventory(host)}"
        )
    if public_ip is not None:
        try:
            link, address = _by_address(host, public_ip)
        except ConfigError:
            warnings.append(
                f"no interface carries --public-ip {public_ip} (a NAT in front?):"
                " using the default route's; name another with --iface"
            )
        else:
            return _finish(host, link, address, public_ip, f"carries --public-ip {public_ip}", [])
    link, address = _by_default_route(host)
    return _finish(host, link, address, public_ip, "has the default route", warnings)


def _lookup(host: Host, text: str) -> tuple[Link, IPv4Address]:
    try:
        wanted = IPv4Address(text)
    except ValueError:
        for link in host.links:
            if link.name == text:
                return link, _best_address(host, link)
        raise ConfigError(f"no interface is called {text}") from None
    return _by_address(host, wanted)


def _by_address(host: Host, wanted: IPv4Address) -> tuple[Link, IPv4Address]:
    for address in host.addresses:
        if address.interface.ip == wanted:
            return _link(host, address.index), wanted
    raise ConfigError(f"no interface with given IP found: {wanted}")


def _by_default_route(host: Host) -> tuple[Link, IPv4Address]:
    for route in host.routes:
        if route.destination == _DEFAULT and route.is_unicast and route.indexes:
            # Of a multipath route any next hop will do; flannel gives up here.
            link = _link(host, route.indexes[0])
            return link, _best_address(host, link)
    raise ConfigError(
        "unable to find default route, and no --iface given:"
        f" name the interface the other nodes reach. There are: {_inventory(host)}"
    )


def _link(host: Host, index: int) -> Link:
    for link in host.links:
        if link.index == index:
            return link
    raise ConfigError(f"interface {index} vanished while it was being looked at: try again")


def _name(host: Host, index: int) -> str:
    """A link's name for people; addresses and links come from two looks at the kernel."""
    names = {link.index: link.name for link in host.links}
    return names.get(index, f"interface {index}")


def _best_address(host: Host, link: Link) -> IPv4Address:
    """Global before link-local, permanent before dynamic, else the kernel's order."""
    usable = [address for address in _usable(host) if address.index == link.index]
    if not usable:
        raise ConfigError(f"failed to find IPv4 address for interface {link.name}")
    best = min(usable, key=lambda a: (a.interface.ip.is_link_local, not a.is_permanent))
    return best.interface.ip


def _usable(host: Host) -> list[Address]:
    return [
        address
        for address in host.addresses
        if not (
            address.interface.ip.is_loopback
            or address.interface.ip.is_multicast
            or address.is_deprecated
        )
    ]


def _finish(
    host: Host,
    link: Link,
    address: IPv4Address,
    public_ip: IPv4Address | None,
    why: str,
    warnings: list[str],
) -> Interface:
    warnings = list(warnings)
    if link.mtu == 0:
        raise ConfigError(f"failed to determine MTU for {address} interface {link.name}")
    advertised = public_ip or address
    if advertised.is_loopback or advertised.is_link_local:
        warnings.append(f"peers are told to send to {advertised}, which only this host can reach")
    others = [
        f"{_name(host, other.index)} {other.interface.ip}"
        for other in _usable(host)
        if other.interface.ip != address
    ]
    if others:
        why += f"; also possible: {', '.join(others)}"
    return Interface(
        link=link, address=address, public_ip=advertised, why=why, warnings=tuple(warnings)
    )


def _inventory(host: Host) -> str:
    listed = [f"{_name(host, a.index)} {a.interface}" for a in host.addresses]
    return ", ".join(listed) or "no IPv4 addresses at all"
