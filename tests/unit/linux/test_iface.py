"""Choosing the interface, from hand-made answers of netlink."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import pytest

from tundp.errors import ConfigError
from tundp.linux.goregex import compile_go_regex
from tundp.linux.iface import Host, Interface, Selection
from tundp.linux.iface import choose as selectors
from tundp.linux.iface.explain import finish
from tundp.linux.iface.model import Case
from tundp.linux.netlink import Address, Link, Route, RouteLookup
from tundp.linux.uapi import RT_SCOPE_HOST


def link(
    index: int, name: str, mtu: int = 1500, *, kind: str | None = None, up: bool = True
) -> Link:
    return Link(
        index=index, name=name, mtu=mtu, is_up=up, is_loopback=name.startswith("lo"), kind=kind
    )


def address(
    index: int,
    text: str,
    *,
    permanent: bool = True,
    deprecated: bool = False,
    temporary: bool = False,
    scope: int = 0,
) -> Address:
    return Address(
        index=index,
        interface=IPv4Interface(text),
        is_permanent=permanent,
        is_deprecated=deprecated,
        is_temporary=temporary,
        scope=scope,
    )


def route(
    destination: str, *indexes: int, unicast: bool = True, gateway: str | None = None
) -> Route:
    return Route(
        destination=IPv4Network(destination),
        indexes=indexes,
        gateway=None if gateway is None else IPv4Address(gateway),
        priority=0,
        kind="unicast" if unicast else "blackhole",
    )


LO = link(1, "lo", 65536)
ETH0 = link(2, "eth0")
ETH1 = link(3, "eth1", 9000)
LOOPBACK = address(1, "127.0.0.1/8")
DEFAULT = route("0.0.0.0/0", 2)


def host(
    *addresses: Address,
    routes: tuple[Any, ...] = (DEFAULT,),
    links: tuple[Any, ...] = (LO, ETH0, ETH1),
) -> Host:
    return Host(links=links, addresses=(LOOPBACK, *addresses), routes=routes)


USUAL = host(address(2, "192.0.2.1/24"), address(3, "198.51.100.1/24"))


TARGET = IPv4Address("203.0.113.5")


def choose(
    given: Host,
    *wanted: str,
    public_ip: str | None = None,
    regexes: list[str] | tuple[Any, ...] = (),
    can_reach: IPv4Address | None = None,
    reached: RouteLookup | None = None,
    can_reach_error: str | None = None,
    network: IPv4Network | None = None,
) -> Interface:
    """What `look` would choose with these flags if the kernel said all this."""
    case = Case(
        host=given,
        selection=Selection(
            iface=wanted,
            iface_regex=tuple(regexes),
            iface_can_reach=can_reach,
            public_ip=None if public_ip is None else IPv4Address(public_ip),
        ),
        reached=reached,
        can_reach_error=can_reach_error,
        network=network,
    )
    return finish(case, selectors.choose(case))


def reach(index: int, source: str | None) -> dict[str, Any]:
    """--iface-can-reach, and what the kernel answered."""
    lookup = RouteLookup(index=index, source=None if source is None else IPv4Address(source))
    return {"can_reach": TARGET, "reached": lookup}


def refusal(given: Host, *wanted: str, public_ip: str | None = None, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        choose(given, *wanted, public_ip=public_ip, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "public_ip", "name", "bound", "advertised", "breaks"),
    [
        ((), None, "eth0", "192.0.2.1", "192.0.2.1", "the default route's"),
        (("eth1",), None, "eth1", "198.51.100.1", "198.51.100.1", "by name"),
        (("198.51.100.1",), None, "eth1", "198.51.100.1", "198.51.100.1", "by address"),
        (("nope", "eth1"), None, "eth1", "198.51.100.1", "198.51.100.1", "the first that fits"),
        (("eth1", "eth0"), None, "eth1", "198.51.100.1", "198.51.100.1", "in the order given"),
        (("203.0.113.5", "eth0"), None, "eth0", "192.0.2.1", "192.0.2.1", "addresses too"),
        ((), "198.51.100.1", "eth1", "198.51.100.1", "198.51.100.1", "who carries the public IP"),
        ((), "203.0.113.5", "eth0", "192.0.2.1", "203.0.113.5", "a NAT: bind ours, tell theirs"),
        (("eth1",), "203.0.113.5", "eth1", "198.51.100.1", "203.0.113.5", "--iface beats it"),
        (("eth1",), "192.0.2.1", "eth1", "198.51.100.1", "192.0.2.1", "even when it is here"),
        (("lo", "eth1"), None, "eth1", "198.51.100.1", "198.51.100.1", "lo has nothing usable"),
    ],
)
def test_choice(
    wanted: tuple[Any, ...],
    public_ip: str | None,
    name: str,
    bound: str,
    advertised: str,
    breaks: str,
) -> None:
    chosen = choose(USUAL, *wanted, public_ip=public_ip)
    assert (chosen.link.name, str(chosen.address), str(chosen.public_ip)) == (
        name,
        bound,
        advertised,
    ), breaks


@pytest.mark.parametrize(
    ("addresses", "expected", "breaks"),
    [
        (["192.0.2.1/24", "192.0.2.2/24"], "192.0.2.1", "the kernel's order"),
        (["169.254.1.1/16", "192.0.2.2/24"], "192.0.2.2", "global before link-local"),
        (["169.254.1.1/16"], "169.254.1.1", "link-local when there is no other"),
        (["127.0.0.2/8", "224.0.0.5/32", "192.0.2.2/24"], "192.0.2.2", "unicast only"),
        (["10.5.0.1/32"], "10.5.0.1", "private is global here"),
        (["0.0.0.0/8", "255.255.255.255/32", "192.0.2.2/24"], "192.0.2.2", "neither is a host's"),
    ],
)
def test_which_address_of_a_link(addresses: list[str], expected: str, breaks: str) -> None:
    given = host(*(address(2, text) for text in addresses))
    assert str(choose(given, "eth0").address) == expected, breaks
    assert str(choose(given).address) == expected, breaks


def test_permanent_before_dynamic_but_global_before_both() -> None:
    dynamic = address(2, "192.0.2.1/24", permanent=False)
    permanent = address(2, "192.0.2.2/24")
    local = address(2, "169.254.1.1/16")
    assert str(choose(host(dynamic, permanent)).address) == "192.0.2.2"
    assert str(choose(host(local, dynamic)).address) == "192.0.2.1"


def test_temporary_last_but_after_what_matters_more() -> None:
    temporary = address(2, "192.0.2.1/24", temporary=True)
    plain = address(2, "192.0.2.2/24")
    dynamic = address(2, "192.0.2.3/24", permanent=False)
    assert str(choose(host(temporary, plain)).address) == "192.0.2.2"
    assert str(choose(host(dynamic, temporary)).address) == "192.0.2.1"


def test_deprecated_is_not_chosen_but_may_be_named() -> None:
    old = address(2, "192.0.2.1/24", deprecated=True)
    new = address(2, "192.0.2.2/24")
    assert str(choose(host(old, new)).address) == "192.0.2.2"
    assert str(choose(host(old, new), "192.0.2.1").address) == "192.0.2.1"
    assert "failed to find IPv4 address for interface eth0" in refusal(host(old))


@pytest.mark.parametrize(
    ("routes", "name", "breaks"),
    [
        ((DEFAULT, route("0.0.0.0/0", 3)), "eth0", "the first: the kernel lists low metrics first"),
        ((route("10.5.0.0/16", 2), route("0.0.0.0/0", 3)), "eth1", "only a default route counts"),
        ((route("0.0.0.0/1", 2), route("0.0.0.0/0", 3)), "eth1", "half a default is none"),
        ((route("0.0.0.0/0", 3, 2),), "eth1", "multipath: any next hop will do"),
        ((route("0.0.0.0/0"), route("0.0.0.0/0", 3)), "eth1", "one without a link is passed over"),
        (
            (route("0.0.0.0/0", 2, unicast=False), route("0.0.0.0/0", 3)),
            "eth1",
            "a blackhole leads nowhere",
        ),
    ],
)
def test_default_route(routes: tuple[Any, ...], name: str, breaks: str) -> None:
    given = host(address(2, "192.0.2.1/24"), address(3, "198.51.100.1/24"), routes=routes)
    assert choose(given).link.name == name, breaks


def test_no_default_route() -> None:
    message = refusal(host(address(2, "192.0.2.1/24"), routes=()))
    assert "unable to find default route" in message
    assert "eth0 192.0.2.1/24" in message, "what there is, to choose from"


def test_no_addresses_at_all() -> None:
    bare = Host(links=(LO,), addresses=(), routes=())
    assert "no IPv4 addresses at all" in refusal(bare)


def test_nothing_wanted_fits() -> None:
    message = refusal(USUAL, "wlan0", "203.0.113.9", "lo")
    assert (
        "Failed to find interface to use that matches the interfaces and/or regexes provided"
        in message
    )
    assert "no interface is called wlan0" in message
    assert "no interface with given IP found: 203.0.113.9" in message
    assert "failed to find IPv4 address for interface lo" in message
    assert "eth1 198.51.100.1/24" in message


def test_wanted_never_falls_back_to_the_default_route() -> None:
    assert "Failed to find interface" in refusal(USUAL, "wlan0")


def test_mtu_0_is_an_error() -> None:
    given = host(address(2, "192.0.2.1/24"), links=(LO, link(2, "eth0", 0), ETH1))
    assert "failed to determine MTU for 192.0.2.1 interface eth0" in refusal(given)
    assert "failed to determine MTU" in refusal(given, "eth0")


def test_mtu_0_of_one_wanted_leaves_the_next() -> None:
    given = host(
        address(2, "192.0.2.1/24"),
        address(3, "198.51.100.1/24"),
        links=(LO, link(2, "eth0", 0), ETH1),
    )
    assert choose(given, "eth0", "eth1").link.name == "eth1"


def test_mtu_0_where_the_public_ip_is_is_not_taken_for_a_nat() -> None:
    given = host(
        address(2, "192.0.2.1/24"),
        address(3, "198.51.100.1/24"),
        links=(LO, ETH0, link(3, "eth1", 0)),
    )
    assert "failed to determine MTU" in refusal(given, public_ip="198.51.100.1")


@pytest.mark.parametrize("routes", [(route("0.0.0.0/0"),), (route("0.0.0.0/0", unicast=False),)])
def test_a_default_route_to_no_interface(routes: tuple[Route]) -> None:
    message = refusal(host(address(2, "192.0.2.1/24"), routes=routes))
    assert "found default route but could not determine interface" in message
    assert "eth0 192.0.2.1/24" in message


def test_the_default_routes_interface_has_no_address() -> None:
    given = host(address(3, "198.51.100.1/24"))
    assert "failed to find IPv4 address for interface eth0" in refusal(given)


def test_an_address_two_interfaces_have_is_the_first_ones() -> None:
    given = host(address(3, "192.0.2.1/24"), address(2, "192.0.2.1/24"))
    assert choose(given, "192.0.2.1").link.name == "eth0"


@pytest.mark.parametrize("public_ip", ["0.0.0.0", "224.0.0.5", "255.255.255.255"])
def test_a_public_ip_no_host_can_have(public_ip: str) -> None:
    for wanted in ((), ("eth1",)):
        message = refusal(USUAL, *wanted, public_ip=public_ip)
        assert f"invalid public IP address: {public_ip}" in message


# Regexes

TWO_EACH = host(
    address(2, "169.254.7.1/16"),
    address(2, "192.0.2.1/24"),
    address(3, "198.51.100.9/24"),
    address(3, "198.51.100.1/24"),
)


@pytest.mark.parametrize(
    ("regex", "name", "bound", "breaks"),
    [
        (r"^198\.51", "eth1", "198.51.100.9", "the kernel's order among equals"),
        (r"100\.1$", "eth1", "198.51.100.1", "any usable address, not only the preferred one"),
        (r"\.1", "eth0", "192.0.2.1", "unanchored; interfaces by index, their best address first"),
        (r"^169", "eth0", "169.254.7.1", "link-local too"),
        (r"eth1", "eth1", "198.51.100.9", "by name, and then by the address rule"),
        (r"eth", "eth0", "192.0.2.1", "the first name by index"),
        (r"1$", "eth0", "192.0.2.1", "an address before any name: eth1 matches as well"),
        (r"127|198", "eth1", "198.51.100.9", "loopback's address is not usable"),
        (r"^[[:alpha:]]+1\z", "eth1", "198.51.100.9", "Go's own writing"),
    ],
)
def test_regex(regex: str, name: str, bound: str, breaks: str) -> None:
    for links in ((LO, ETH0, ETH1), (ETH1, ETH0, LO)):
        chosen = choose(Host(links=links, addresses=TWO_EACH.addresses, routes=()), regexes=[regex])
        assert (chosen.link.name, str(chosen.address)) == (name, bound), breaks


def test_regex_matches_nothing() -> None:
    message = refusal(TWO_EACH, regexes=["wlan|^10"])
    assert "Failed to find interface to use that matches the interfaces and/or regexes" in message
    assert (
        "Could not match pattern wlan|^10 to any of the available network interfaces"
        " (lo:[], eth0:[192.0.2.1 169.254.7.1], eth1:[198.51.100.9 198.51.100.1])"
    ) in message


def test_regex_matches_a_name_without_address() -> None:
    message = refusal(host(address(2, "192.0.2.1/24")), regexes=["eth1"])
    assert "failed to find IPv4 address for interface eth1" in message


def test_regex_passes_over_the_overlays_own_devices() -> None:
    given = host(
        address(4, "10.5.1.1/24"),
        address(5, "10.5.1.0/32"),
        address(6, "10.9.0.1/24"),
        address(7, "10.5.0.7/24"),
        links=(
            LO,
            link(4, "cni0", kind="bridge"),
            link(5, "tundp0", kind="tun"),
            link(6, "br0", kind="bridge"),
            link(7, "eth7"),
        ),
    )
    network = IPv4Network("10.5.0.0/16")
    assert choose(given, regexes=["^10"]).link.name == "cni0", "the Network is not known"
    assert choose(given, regexes=["^10"], network=network).link.name == "br0"
    assert choose(given, regexes=[r"^10\.5"], network=network).link.name == "eth7"
    assert choose(given, "cni0", network=network).link.name == "cni0", "asked for by name"


@pytest.mark.parametrize(
    ("regex", "reason"),
    [
        ("eth[", "unterminated"),
        ("(eth", "missing )"),
        ("*", "nothing to repeat"),
        (r"(e)\1", "backreferences"),
        (r"[\1]", "backreferences"),
        ("eth(?=0)", "no such group"),
        ("(?!lo)", "no such group"),
        ("(?<=e)t", "no such group"),
        ("(?<!e)t", "no such group"),
        ("(?>e)", "no such group"),
        ("(?P<n>e)(?P=n)", "no such group"),
        ("(?#eth)", "no such group"),
        ("(?x)e", "no such group"),
        ("e*+", "invalid nested repetition operator"),
        ("e{1,2}+", "invalid nested repetition operator"),
        (r"eth0\Z", "no such escape"),
        (r"\u0065", "no such escape"),
        (r"[e\b]", "no such escape in a set"),
        ("[[:cntrl:]]", "is not supported"),
        (r"\pL", "bad escape"),
        (r"\Qeth0\E", "bad escape"),
        ("\\", "bad escape"),
        ("e(?i)t", "global flags"),
        ("e{99999999999}", "repetition number"),
    ],
)
def test_bad_regex_is_named(regex: str, reason: str) -> None:
    message = refusal(USUAL, regexes=[regex])
    assert f"could not compile the IP address regex '{regex}': " in message
    assert reason in message


@pytest.mark.parametrize(
    ("regex", "subject", "is_match"),
    [
        ("[[:digit:]]", "eth0", True),
        ("[[:digit:]]", "eth", False),
        ("[^[:alpha:]]", "eth", False),
        ("[x[:digit:]-]h", "3h", True),
        ("[[e]", "e", True),
        ("[a&&e]", "e", True),
        ("[]e]", "]", True),
        ("^[][:digit:]]$", "3", True),
        ("^[[:digit:][:upper:]]$", "E", True),
        ("[a*+]", "+", True),
        (r"\*+", "**", True),
        (r"\[:digit:\]", "[:digit:]", True),
        ("e{,3}", "e{,3}", True),
        ("e{,3}$", "e", False),
        (r"eth\d\z", "eth0", True),
        (r"\d", "\N{ARABIC-INDIC DIGIT ONE}", False),
        ("(?i)ETH", "eth0", True),
        ("(?i:E)th", "eth0", True),
        ("(?P<n>e)t", "eth0", True),
        ("e+?t", "eth0", True),
    ],
)
def test_regexes_mean_what_they_mean_in_go(regex: str, subject: str, is_match: bool) -> None:
    assert bool(compile_go_regex(regex).search(subject)) == is_match


# Can-reach


def test_can_reach() -> None:
    chosen = choose(USUAL, **reach(3, "198.51.100.1"))
    assert (chosen.link.name, str(chosen.address)) == ("eth1", "198.51.100.1")
    assert chosen.why == "--iface-can-reach 203.0.113.5 leads over it"


def test_can_reach_takes_the_source_the_kernel_prefers() -> None:
    assert str(choose(TWO_EACH, **reach(3, "198.51.100.1")).address) == "198.51.100.1"
    assert str(choose(TWO_EACH, **reach(3, None)).address) == "198.51.100.9", "or the best"


def test_can_reach_over_an_interface_without_address() -> None:
    # Unnumbered: the host's address is on loopback, the MTU that counts is the wire's.
    chosen = choose(host(address(1, "192.0.2.7/32")), **reach(3, "192.0.2.7"))
    assert (chosen.link.name, chosen.link.mtu, str(chosen.address)) == ("eth1", 9000, "192.0.2.7")
    message = refusal(host(), **reach(3, None))
    assert "failed to find IPv4 address for interface eth1" in message


def test_can_reach_an_address_of_our_own_is_not_loopback() -> None:
    chosen = choose(USUAL, **reach(1, "198.51.100.1"))
    assert (chosen.link.name, chosen.link.mtu) == ("eth1", 9000)


def test_can_reach_nowhere() -> None:
    message = refusal(USUAL, can_reach=TARGET, can_reach_error="cannot find the route: no way")
    assert "Failed to find interface to use" in message
    assert "failed to get ifcanreach based interface: cannot find the route: no way" in message
    assert "no route to 203.0.113.5" in refusal(USUAL, can_reach=TARGET)
    assert "interface 99 vanished" in refusal(USUAL, **reach(99, "192.0.2.1"))


@pytest.mark.parametrize(
    ("wanted", "regexes", "name", "failed"),
    [
        (["eth1"], ["eth0"], "eth1", []),
        (["wlan0"], ["eth0"], "eth0", ["wlan0"]),
        (["wlan0", "192.0.2.1"], ["eth1"], "eth0", ["wlan0"]),
        (["wlan0"], ["wlan1", "eth1"], "eth1", ["wlan0", "wlan1"]),
        (["wlan0"], ["(", "wlan1"], "eth1", ["wlan0", "'('", "wlan1"]),
    ],
)
def test_each_iface_then_each_regex_then_can_reach(
    wanted: list[str], regexes: list[str], name: str, failed: list[Any | str]
) -> None:
    chosen = choose(USUAL, *wanted, regexes=regexes, **reach(3, "198.51.100.1"))
    assert chosen.link.name == name
    assert len(chosen.warnings) == len(failed)
    for text, warning in zip(failed, chosen.warnings, strict=True):
        assert text in warning


def test_all_failures_are_named_at_the_end() -> None:
    message = refusal(USUAL, "wlan0", regexes=["wlan1", "("], can_reach=TARGET)
    places = [message.index(text) for text in ("wlan0", "wlan1", "'('", "ifcanreach", "There are")]
    assert places == sorted(places)


def test_an_empty_selector_is_the_default_route() -> None:
    assert choose(USUAL, "").link.name == "eth0"
    assert choose(USUAL, regexes=[""]).link.name == "eth0"
    assert "unable to find default route" in refusal(host(routes=()), "")


def test_a_selector_beats_public_ip_which_is_advertised() -> None:
    more: dict[str, Any] = {"public_ip": "192.0.2.1"}
    for chosen in (
        choose(USUAL, regexes=["eth1"], **more),
        choose(USUAL, **reach(3, "198.51.100.1"), **more),
    ):
        assert (str(chosen.address), str(chosen.public_ip)) == ("198.51.100.1", "192.0.2.1")
        assert chosen.warnings == ()


# What is said


def test_why() -> None:
    assert choose(USUAL).why == "has the default route"
    assert choose(USUAL, "eth1").why == "--iface eth1"
    assert choose(USUAL, regexes=["^198"]).why == "--iface-regex ^198 matches 198.51.100.1"
    assert choose(USUAL, regexes=["th1"]).why == "--iface-regex th1 matches its name"
    assert choose(USUAL, public_ip="198.51.100.1").why == "carries --public-ip 198.51.100.1"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "eth1 198.51.100.1: has no default route"),
        ({"regexes": ["eth0"]}, "eth1 198.51.100.1: --iface-regex eth0 found eth0 first"),
        ({"regexes": ["^1"]}, "eth1 198.51.100.1: --iface-regex ^1 found eth0 192.0.2.1 first"),
        (reach(2, "192.0.2.1"), "eth1 198.51.100.1: not the way to 203.0.113.5"),
        ({"public_ip": "192.0.2.1"}, "eth1 198.51.100.1: does not carry --public-ip 192.0.2.1"),
    ],
)
def test_what_spoke_against_the_other(more: dict[str, Any], expected: str) -> None:
    assert choose(USUAL, **more).others == (expected,)


def test_what_spoke_against_those_not_named() -> None:
    expected = ("eth0 192.0.2.1: --iface eth1 names another",)
    assert choose(USUAL, "eth1").others == expected
    assert choose(host(address(2, "192.0.2.1/24"))).others == ()


def test_a_default_route_that_comes_later() -> None:
    given = Host(links=USUAL.links, addresses=USUAL.addresses, routes=(route("0.0.0.0/0", 2, 3),))
    expected = ("eth1 198.51.100.1: its default route comes after that of eth0",)
    assert choose(given).others == expected
    assert choose(given, "eth0").others == ("eth1 198.51.100.1: --iface eth0 names another",)


def test_what_spoke_against_others_of_the_same_link() -> None:
    given = host(
        address(2, "192.0.2.1/24"),
        address(2, "192.0.2.2/25"),
        address(2, "192.0.2.3/24", temporary=True),
        address(2, "192.0.2.4/24", permanent=False, temporary=True),
        address(2, "169.254.1.1/16"),
        address(2, "192.0.2.5/24", deprecated=True),
    )
    assert choose(given).others == (
        "eth0 192.0.2.2: the kernel lists 192.0.2.1 first",
        "eth0 192.0.2.3: a secondary address",
        "eth0 192.0.2.4: dynamic",
        "eth0 169.254.1.1: link-local",
    )
    assert choose(given, "192.0.2.2").others[0] == "eth0 192.0.2.1: --iface 192.0.2.2 names another"


def test_what_spoke_against_a_device_of_another_sort() -> None:
    given = host(
        address(2, "192.0.2.1/24"),
        address(1, "192.0.2.8/32"),
        address(3, "192.0.2.9/32", scope=RT_SCOPE_HOST),
        address(4, "172.17.0.1/16"),
        address(5, "10.5.1.0/32"),
        address(6, "10.6.1.0/32"),
        address(7, "198.51.100.7/24"),
        links=(
            LO,
            ETH0,
            ETH1,
            link(4, "docker0", kind="bridge"),
            link(5, "flannel.1", kind="vxlan"),
            link(6, "flannel0"),
            link(7, "eth7", up=False),
        ),
    )
    assert choose(given).others == (
        "lo 192.0.2.8: only for this host",
        "eth1 192.0.2.9: only for this host",
        "docker0 172.17.0.1: a bridge",
        "flannel.1 10.5.1.0: a device of another overlay or tunnel (vxlan)",
        "flannel0 10.6.1.0: a device of another overlay or tunnel (flannel0)",
        "eth7 198.51.100.7: is down",
    )


@pytest.mark.parametrize(
    ("given", "wanted", "public_ip", "warning"),
    [
        (USUAL, (), "203.0.113.5", "no interface carries --public-ip 203.0.113.5"),
        (USUAL, ("wlan0", "eth0"), None, "no interface is called wlan0"),
        (USUAL, ("127.0.0.1",), None, "told to send to 127.0.0.1, which only this host can reach"),
        (host(address(2, "169.254.1.1/16")), (), None, "told to send to 169.254.1.1, a link-local"),
        (USUAL, (), "127.0.0.1", "told to send to 127.0.0.1"),
        (USUAL, ("eth1",), "169.254.9.9", "told to send to 169.254.9.9, a link-local"),
    ],
)
def test_warnings(
    given: Host, wanted: tuple[Any, ...], public_ip: str | None, warning: str
) -> None:
    assert any(warning in one for one in choose(given, *wanted, public_ip=public_ip).warnings)


@pytest.mark.parametrize("more", [{}, {"public_ip": "10.0.2.15"}])
def test_the_address_virtualbox_gives_to_everybody(more: dict[str, Any]) -> None:
    mine = "10.0.2.15/24" if not more else "192.0.2.1/24"
    (warning, *_) = choose(host(address(2, mine)), **more).warnings
    assert "told to send to 10.0.2.15, the address VirtualBox's NAT gives" in warning
    assert "--iface or --iface-can-reach" in warning


def test_no_virtualbox_where_the_public_ip_says_otherwise() -> None:
    chosen = choose(host(address(2, "10.0.2.15/24")), "eth0", public_ip="192.0.2.1")
    assert chosen.warnings == ()


def test_an_address_inside_the_overlay() -> None:
    network = IPv4Network("10.5.0.0/16")
    for text in ("10.5.7.1/32", "10.5.7.1/16"):
        given = host(address(2, text))
        (warning,) = choose(given, network=network).warnings
        assert "told to send to 10.5.7.1, which is inside the overlay's Network 10.5" in warning
    # Nodes on the same link have a longer route to it, as we have to them.
    assert choose(host(address(2, "10.5.7.1/24")), network=network).warnings == ()
    assert choose(given, network=IPv4Network("10.6.0.0/16")).warnings == ()
    assert choose(given).warnings == ()


@pytest.mark.parametrize(
    ("name", "kind", "routes", "warning"),
    [
        ("docker0", "bridge", (), "docker0 is a bridge"),
        ("cni0", "bridge", (route("10.6.0.0/16", 4, gateway="192.0.2.9"),), "cni0 is a bridge"),
        ("br-0a1b2c3d4e5f", "bridge", (route("192.0.2.0/24", 4),), "is a bridge that leads to no"),
        ("flannel.1", "vxlan", (), "flannel.1 is a device of another overlay or tunnel (vxlan)"),
        ("flannel0", None, (), "flannel0 is a device of another overlay or tunnel: ours"),
        ("tun0", "tun", (), "tun0 is a device of another overlay or tunnel (tun)"),
        ("wg0", "wireguard", (), "(wireguard)"),
    ],
)
def test_a_device_that_leads_nowhere(
    name: str, kind: str | None, routes: tuple[Any, ...], warning: str
) -> None:
    given = host(
        address(4, "192.0.2.1/24"), routes=routes, links=(LO, ETH0, link(4, name, kind=kind))
    )
    (said,) = choose(given, name).warnings
    assert warning in said
    assert "--iface or --iface-can-reach" in said


def test_a_bridge_may_well_be_the_uplink() -> None:
    links = (LO, link(2, "br0", kind="bridge"))
    ours = address(2, "192.0.2.1/24")
    assert choose(host(ours, links=links)).warnings == ()
    routes = (route("203.0.113.0/24", 2, gateway="192.0.2.254"),)
    assert choose(host(ours, links=links, routes=routes), "br0").warnings == ()
    given = host(ours, links=links, routes=())
    assert choose(given, **reach(2, "192.0.2.1")).warnings == ()
    assert len(choose(given, "br0").warnings) == 1


def test_an_interface_that_is_down() -> None:
    given = host(address(2, "192.0.2.1/24"), links=(LO, link(2, "eth0", up=False)))
    assert choose(given).warnings == (
        "eth0 is down, and nothing comes or goes: ip link set eth0 up",
    )


def test_no_warning_without_a_reason() -> None:
    assert choose(USUAL).warnings == ()
    assert choose(USUAL, "eth1").warnings == ()
    assert choose(USUAL, public_ip="198.51.100.1").warnings == ()


def test_an_address_of_a_link_that_came_after_the_links_were_listed() -> None:
    # netlink is asked three times; a container starting in between adds a veth.
    given = host(address(2, "192.0.2.1/24"), address(99, "198.51.100.9/24"))
    assert choose(given).link.name == "eth0"
    assert choose(given, "eth0").link.name == "eth0"
    refusal(given, "198.51.100.9")
    refusal(given, "wlan0")


def test_a_default_route_over_an_unknown_link_is_refused() -> None:
    refusal(host(address(2, "192.0.2.1/24"), routes=(route("0.0.0.0/0", 99),)))


def test_an_address_of_an_unknown_link_is_named_among_the_others() -> None:
    given = host(address(2, "192.0.2.1/24"), address(99, "198.51.100.9/24"))
    (said,) = choose(given).others
    assert said.startswith("interface 99 198.51.100.9: ")
