"""The selectors: which interface, by name, address, pattern, way to somewhere or default route."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

from tundp.errors import ConfigError
from tundp.linux.goregex import compile_go_regex
from tundp.linux.iface.explain import check_mtu
from tundp.linux.iface.model import (
    BROADCAST,
    CARRIED,
    DEFAULT_ROUTE,
    NO_DEFAULT_ROUTE,
    REMEDY,
    Case,
    Choice,
    Host,
    Interface,
    default_indexes,
    holder_of,
    inventory,
    is_overlays_own,
    link_at,
    usable_of,
)
from tundp.linux.netlink import Link


def choose(case: Case) -> Choice:
    """The first selector's answer that fits. ConfigError says why none does, and what there is."""
    selection, public_ip = case.selection, case.selection.public_ip
    if public_ip is not None and (
        public_ip.is_unspecified or public_ip.is_multicast or public_ip == BROADCAST
    ):
        raise ConfigError(f"invalid public IP address: {public_ip}: it is no single host's")
    if selection.has_selector:
        return _first_that_fits(case)
    if public_ip is not None and holder_of(case.host, public_ip) is not None:
        return _by_address(
            case,
            public_ip,
            why=f"carries --public-ip {public_ip}",
            objection=f"does not carry --public-ip {public_ip}",
        )
    return _by_default_route(case)


def _first_that_fits(case: Case) -> Choice:
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
            check_mtu(choice)
            return replace(choice, failures=tuple(failures))
        except ConfigError as error:
            failures.append(str(error))
    raise ConfigError(
        "Failed to find interface to use that matches the interfaces and/or regexes"
        f" provided: {'; '.join(failures)}. There are: {inventory(case.host)}"
    )


def _by_iface(case: Case, text: str) -> Choice:
    why, objection = f"--iface {text}", f"--iface {text} names another"
    try:
        wanted = IPv4Address(text)
    except ValueError:
        link = next((link for link in case.host.links if link.name == text), None)
        if link is None:
            raise ConfigError(f"no interface is called {text}") from None
        return _best_of(case, link, why, objection)
    return _by_address(case, wanted, why, objection)


def _by_regex(case: Case, text: str) -> Choice:
    pattern = compile_go_regex(text)
    links = sorted(case.host.links, key=lambda link: link.index)
    for link in links:
        for address in usable_of(case.host, link):
            ip = address.interface.ip
            if pattern.search(str(ip)) and not is_overlays_own(case, link, ip):
                return Choice(
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
        f"{link.name}:[{' '.join(str(a.interface.ip) for a in usable_of(case.host, link))}]"
        for link in links
    )
    raise ConfigError(
        f"Could not match pattern {text} to any of the available network interfaces ({available})"
    )


def _by_reach(case: Case, text: str) -> Choice:
    why, objection = f"--iface-can-reach {text} leads over it", f"not the way to {text}"
    if case.reached is None:
        reason = case.can_reach_error or f"no route to {text}"
        raise ConfigError(f"failed to get ifcanreach based interface: {reason}")
    link, source = link_at(case.host, case.reached.index), case.reached.source
    if source is None:
        return _best_of(case, link, why, objection)
    if link.is_loopback:
        # The address is ours, and what is sent to ourselves turns around on lo.
        return _by_address(case, source, f"carries {text} of --iface-can-reach", objection)
    return Choice(link=link, address=source, why=why, objection=objection, is_exact=True)


def _by_address(case: Case, wanted: IPv4Address, why: str, objection: str) -> Choice:
    carrier = holder_of(case.host, wanted)
    if carrier is None:
        raise ConfigError(f"no interface with given IP found: {wanted}")
    link = link_at(case.host, carrier.index)
    return Choice(link=link, address=wanted, why=why, objection=objection, is_exact=True)


def _by_default_route(case: Case) -> Choice:
    # Of a multipath route the first next hop, of several the first whose link has an address;
    # flannel gives up here. Of other tables than main the kernel knows.
    indexes = list(default_indexes(case.host)) or [way.index for way in case.ways]
    refusal: ConfigError | None = None
    for index in dict.fromkeys(indexes):
        try:
            link = link_at(case.host, index)
            return _best_of(case, link, "has the default route", NO_DEFAULT_ROUTE)
        except ConfigError as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    remedy = f"{REMEDY}. There are: {inventory(case.host)}"
    if any(route.destination == DEFAULT_ROUTE for route in case.host.routes):
        raise ConfigError(f"found default route but could not determine interface: {remedy}")
    raise ConfigError(f"unable to find default route, and no --iface given: {remedy}")


def _best_of(case: Case, link: Link, why: str, objection: str) -> Choice:
    usable = usable_of(case.host, link)
    if usable:
        ip = usable[0].interface.ip
    elif (source := _source_over(case, link)) is not None:
        ip = source
    else:
        raise ConfigError(f"failed to find IPv4 address for interface {link.name}")
    return Choice(link=link, address=ip, why=why, objection=objection, is_exact=False)


def _source_over(case: Case, link: Link) -> IPv4Address | None:
    """The address the kernel sends from over a link without one: loopback's or a dummy's."""
    for way in case.ways:
        if way.index == link.index and way.source is not None:
            return way.source
    return None


def keep(case: Case, link: Link, chosen: Interface) -> Choice:
    """The same again: as chosen today if it would be, so that unchanged means equal."""
    try:
        today = choose(case)
    except ConfigError:
        pass  # the default route went, say; what we have serves all the same
    else:
        if (today.link.index, today.address) == (link.index, chosen.address):
            return today
    return Choice(
        link=link,
        address=chosen.address,
        why=chosen.why.partition(CARRIED)[0],
        objection=f"{link.name} {chosen.address} is in use and still there",
        is_exact=True,
    )


def carries(host: Host, link: Link, chosen: Interface) -> bool:
    """Whether the link has the address, or sends from it while the one that had it still does."""
    silent = {one.index for one in host.links if one.is_loopback} | {chosen.holder}
    return any(
        address.interface.ip == chosen.address
        and (address.index == link.index or address.index in silent)
        for address in host.addresses
    )


def only(case: Case, link: Link) -> Case:
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
