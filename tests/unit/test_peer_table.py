"""Who another node is: by TUN address and subnet, through changes of the routes."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.routes import peers_of
from tundp.backend.udp.peer_table import PeerTable
from tundp.lease.fib import Fib, build_fib
from tundp.lease.model import Peer
from tundp.lease.routing import RoutingDelta

OWN = IPv4Network("10.5.1.0/24")
TWO, NESTED, ALSO_TWO, THREE = peers_of(
    [
        ("10.5.2.0/24", "192.0.2.2"),
        ("10.5.2.0/25", "192.0.2.3"),
        ("10.5.7.0/24", "192.0.2.2"),
        ("10.5.3.0/24", "192.0.2.3"),
    ]
)


def number(address: str) -> int:
    return int(IPv4Address(address))


def fib_of(*peers: Peer) -> Fib:
    return build_fib(peers, own_subnet=OWN, generation=1)


def table_of(*peers: Peer) -> PeerTable:
    return PeerTable(fib_of(*peers), {peer.subnet: peer for peer in peers})


def ordered(table: PeerTable) -> list[Peer]:
    return list(table.page(0, len(table)))


def test_only_the_first_address_of_a_subnet_speaks_for_a_node() -> None:
    table = table_of(TWO, THREE)
    assert table.of_tun_address(number("10.5.2.0")) == TWO
    assert table.of_tun_address(number("10.5.3.0")) == THREE
    for other in ("10.5.2.1", "10.5.1.0", "10.5.9.0", "192.0.2.2", "0.0.0.0"):
        assert table.of_tun_address(number(other)) is None, other


def test_of_nested_subnets_the_longer_one_has_the_address() -> None:
    table = table_of(TWO, NESTED)
    assert table.of_tun_address(number("10.5.2.0")) == NESTED
    assert table.covering(IPv4Network("10.5.2.200/32")) == TWO
    assert table.covering(IPv4Network("10.5.2.0/24")) == TWO
    assert table.covering(IPv4Network("10.5.2.3/32")) == NESTED
    assert table.covering(IPv4Network("10.5.0.0/16")) is None


def test_a_table_follows_the_routes() -> None:
    table = table_of(TWO, ALSO_TWO, NESTED)
    assert set(table.subnets_of(TWO.hop_id)) == {TWO.subnet, ALSO_TWO.subnet}
    table.install(fib_of(TWO, THREE), RoutingDelta(gone=(ALSO_TWO, NESTED), come=(THREE,)))
    assert table.of_tun_address(number("10.5.2.0")) == TWO
    assert table.of_tun_address(number("10.5.7.0")) is None
    assert table.subnets_of(TWO.hop_id) == (TWO.subnet,)
    assert ordered(table) == [TWO, THREE]
    (moved,) = peers_of([("10.5.3.0/24", "192.0.2.9")])
    table.install(fib_of(moved), RoutingDelta(gone=(TWO,), moved=((THREE, moved),)))
    assert table.of_tun_address(number("10.5.3.0")) == moved
    assert ordered(table) == [moved]
    table.install(fib_of(TWO), RoutingDelta(come=(TWO,), is_whole=True))
    assert ordered(table) == [TWO]
    assert table.covering(IPv4Network("10.5.3.0/24")) is None


def test_pages_are_in_the_order_of_networks_through_any_changes() -> None:
    draw = random.Random(7)
    every = peers_of(
        (f"10.{number // 200}.{number % 200}.0/{draw.choice((24, 25, 26))}", "192.0.2.2")
        for number in range(600)
    )
    table, held = table_of(), set[Peer]()
    for count in (1, 300, 2, 200, 70, 5, 64, 65):
        gone = draw.sample(sorted(held, key=str), min(len(held), count // 2))
        come = draw.sample(sorted(set(every) - held, key=str), min(count, 600 - len(held)))
        # Gone twice, or come again: the order holds it once.
        table.install(fib_of(*come), RoutingDelta(gone=tuple(gone), come=(*come, *come[:1])))
        held = held - set(gone) | set(come)
        expected = sorted(held, key=lambda peer: peer.subnet)
        assert ordered(table) == expected
        assert len(table) == len(expected)
        assert list(table.page(3, 20)) == expected[3:23]
        assert list(table.page(len(held), 20)) == []


def test_a_question_after_a_change_compares_no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes half a second for 65,000, on the event loop, and any peer may have it done."""
    table = table_of(TWO, NESTED, ALSO_TWO)
    compared = []

    def comparing(one: IPv4Network, other: IPv4Network) -> bool:
        compared.append(one)
        return int(one.network_address) < int(other.network_address)

    monkeypatch.setattr(IPv4Network, "__lt__", comparing)
    table.install(fib_of(TWO, NESTED, ALSO_TWO, THREE), RoutingDelta(come=(THREE,)))
    assert ordered(table) == [TWO, NESTED, THREE, ALSO_TWO]
    assert compared == []
