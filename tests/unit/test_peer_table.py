"""Who another node is: by TUN address and subnet, through changes of the routes."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

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
    assert list(table.ordered()) == [TWO, THREE]
    (moved,) = peers_of([("10.5.3.0/24", "192.0.2.9")])
    table.install(fib_of(moved), RoutingDelta(gone=(TWO,), moved=((THREE, moved),)))
    assert table.of_tun_address(number("10.5.3.0")) == moved
    assert list(table.ordered()) == [moved]
    table.install(fib_of(TWO), RoutingDelta(come=(TWO,), is_whole=True))
    assert list(table.ordered()) == [TWO]
    assert table.covering(IPv4Network("10.5.3.0/24")) is None
