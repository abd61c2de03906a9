"""Choosing the interface, from hand-made answers of netlink."""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from tundp.errors import ConfigError
from tundp.linux.iface import Host, Interface, select_interface
from tundp.linux.netlink import Address, Link, Route


def link(index: int, name: str, mtu: int = 1500) -> Link:
    return Link(index=index, name=name, mtu=mtu, is_up=True)


def address(index: int, text: str, *, permanent: bool = True, deprecated: bool = False) -> Address:
    return Address(
        index=index,
        interface=IPv4Interface(text),
        is_permanent=permanent,
        is_deprecated=deprecated,
    )


def route(destination: str, *indexes: int, unicast: bool = True) -> Route:
    return Route(
        destination=IPv4Network(destination),
        indexes=indexes,
        gateway=None,
        priority=0,
        is_unicast=unicast,
    )


LO = link(1, "lo", 65536)
ETH0 = link(2, "eth0")
ETH1 = link(3, "eth1", 9000)
LOOPBACK = address(1, "127.0.0.1/8")
DEFAULT = route("0.0.0.0/0", 2)


def host(*addresses: Address, routes=(DEFAULT,), links=(LO, ETH0, ETH1)) -> Host:
    return Host(links=links, addresses=(LOOPBACK, *addresses), routes=routes)


USUAL = host(address(2, "192.0.2.1/24"), address(3, "198.51.100.1/24"))


def choose(given: Host, *wanted: str, public_ip: str | None = None) -> Interface:
    return select_interface(
        given, wanted=wanted, public_ip=None if public_ip is None else IPv4Address(public_ip)
    )


def refusal(given: Host, *wanted: str, public_ip: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        choose(given, *wanted, public_ip=public_ip)
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
def test_choice(wanted, public_ip, name, bound, advertised, breaks):
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
    ],
)
def test_which_address_of_a_link(addresses, expected, breaks):
    given = host(*(address(2, text) for text in addresses))
    assert str(choose(given, "eth0").address) == expected, breaks
    assert str(choose(given).address) == expected, breaks


def test_permanent_before_dynamic_but_global_before_both():
    dynamic = address(2, "192.0.2.1/24", permanent=False)
    permanent = address(2, "192.0.2.2/24")
    local = address(2, "169.254.1.1/16")
    assert str(choose(host(dynamic, permanent)).address) == "192.0.2.2"
    assert str(choose(host(local, dynamic)).address) == "192.0.2.1"


def test_deprecated_is_not_chosen_but_may_be_named():
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
def test_default_route(routes, name, breaks):
    given = host(address(2, "192.0.2.1/24"), address(3, "198.51.100.1/24"), routes=routes)
    assert choose(given).link.name == name, breaks


def test_no_default_route():
    message = refusal(host(address(2, "192.0.2.1/24"), routes=()))
    assert "unable to find default route" in message
    assert "eth0 192.0.2.1/24" in message, "what there is, to choose from"


def test_no_addresses_at_all():
    bare = Host(links=(LO,), addresses=(), routes=())
    assert "no IPv4 addresses at all" in refusal(bare)


def test_nothing_wanted_fits():
    message = refusal(USUAL, "wlan0", "203.0.113.9", "lo")
    assert (
        "Failed to find interface to use that matches the interfaces and/or regexes provided"
        in message
    )
    assert "no interface is called wlan0" in message
    assert "no interface with given IP found: 203.0.113.9" in message
    assert "failed to find IPv4 address for interface lo" in message
    assert "eth1 198.51.100.1/24" in message


def test_wanted_never_falls_back_to_the_default_route():
    assert "Failed to find interface" in refusal(USUAL, "wlan0")


def test_mtu_0_is_an_error():
    given = host(address(2, "192.0.2.1/24"), links=(LO, link(2, "eth0", 0), ETH1))
    assert "failed to determine MTU for 192.0.2.1 interface eth0" in refusal(given)
    assert "failed to determine MTU" in refusal(given, "eth0")


def test_mtu_0_of_one_wanted_leaves_the_next():
    given = host(
        address(2, "192.0.2.1/24"),
        address(3, "198.51.100.1/24"),
        links=(LO, link(2, "eth0", 0), ETH1),
    )
    assert choose(given, "eth0", "eth1").link.name == "eth1"


def test_mtu_0_where_the_public_ip_is_is_not_taken_for_a_nat():
    given = host(
        address(2, "192.0.2.1/24"),
        address(3, "198.51.100.1/24"),
        links=(LO, ETH0, link(3, "eth1", 0)),
    )
    assert "failed to determine MTU" in refusal(given, public_ip="198.51.100.1")


def test_why_tells_the_reason_and_the_alternatives():
    assert choose(USUAL).why == "has the default route; also possible: eth1 198.51.100.1"
    assert choose(USUAL, "eth1").why == "--iface eth1; also possible: eth0 192.0.2.1"
    assert choose(USUAL, public_ip="198.51.100.1").why.startswith(
        "carries --public-ip 198.51.100.1"
    )
    assert choose(host(address(2, "192.0.2.1/24"))).why == "has the default route"


@pytest.mark.parametrize(
    ("given", "wanted", "public_ip", "warning"),
    [
        (USUAL, (), "203.0.113.5", "no interface carries --public-ip 203.0.113.5"),
        (USUAL, ("wlan0", "eth0"), None, "no interface is called wlan0"),
        (USUAL, ("127.0.0.1",), None, "told to send to 127.0.0.1, which only this host can reach"),
        (host(address(2, "169.254.1.1/16")), (), None, "told to send to 169.254.1.1"),
        (USUAL, (), "127.0.0.1", "told to send to 127.0.0.1"),
    ],
)
def test_warnings(given, wanted, public_ip, warning):
    assert any(warning in one for one in choose(given, *wanted, public_ip=public_ip).warnings)


def test_no_warning_without_a_reason():
    assert choose(USUAL).warnings == ()
    assert choose(USUAL, "eth1").warnings == ()
    assert choose(USUAL, public_ip="198.51.100.1").warnings == ()


def test_an_address_of_a_link_that_came_after_the_links_were_listed():
    # netlink is asked three times; a container starting in between adds a veth.
    given = host(address(2, "192.0.2.1/24"), address(99, "198.51.100.9/24"))
    assert choose(given).link.name == "eth0"
    assert choose(given, "eth0").link.name == "eth0"
    refusal(given, "198.51.100.9")
    refusal(given, "wlan0")


def test_a_default_route_over_such_a_link():
    refusal(host(address(2, "192.0.2.1/24"), routes=(route("0.0.0.0/0", 99),)))
