"""The FIB: lookups, admission, and what must never change once it is built."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np
import pytest

from tests.routes import fib_of, peers_of
from tundp.lease.fib import (
    CHUNK,
    FIRST_HOP_ID,
    HOP_DTYPE,
    HOP_LOCAL,
    Fib,
    NextHop,
    assemble_fib,
    build_fib,
    row_of,
)

OWN = IPv4Network("10.5.1.0/24")
PORT = 8285


def number(address: str) -> int:
    return int(IPv4Address(address))


def fib(*routes: tuple[str, str], own: IPv4Network | None = OWN, generation: int = 3) -> Fib:
    return fib_of(*routes, own=own, generation=generation)


def found(made: Fib, address: str) -> str | None:
    hop = made.lookup(number(address))
    if hop is None:
        return None
    return "local" if hop.is_local else str(IPv4Address(hop.address))


USUAL = (("10.5.2.0/24", "192.0.2.2"), ("10.5.3.0/24", "192.0.2.3"))


@pytest.mark.parametrize(
    ("routes", "address", "expected", "breaks"),
    [
        (USUAL, "10.5.2.0", "192.0.2.2", "the first address"),
        (USUAL, "10.5.2.255", "192.0.2.2", "the last address"),
        (USUAL, "10.5.3.77", "192.0.2.3", "the neighbour"),
        (USUAL, "10.5.1.5", "local", "our own subnet"),
        (USUAL, "10.5.0.255", None, "below all"),
        (USUAL, "10.5.4.0", None, "above all"),
        (USUAL, "0.0.0.0", None, "far below"),
        (USUAL, "255.255.255.255", None, "far above"),
        (USUAL, "11.5.2.1", None, "the same low bits elsewhere"),
        ((), "10.5.1.5", "local", "alone"),
        ((), "10.5.2.5", None, "alone"),
        ((("10.5.0.0/16", "192.0.2.9"), *USUAL), "10.5.9.9", "192.0.2.9", "a wide lease"),
        ((("10.5.0.0/16", "192.0.2.9"), *USUAL), "10.5.2.9", "192.0.2.2", "and a longer one"),
        ((("10.5.0.0/16", "192.0.2.9"), *USUAL), "10.5.1.9", "local", "ours is longer too"),
        ((("10.5.1.8/31", "192.0.2.9"),), "10.5.1.9", "192.0.2.9", "a longer one inside ours"),
        ((("10.5.1.8/31", "192.0.2.9"),), "10.5.1.10", "local", "and beside it"),
        ((("0.0.0.0/0", "192.0.2.9"),), "203.0.113.1", "192.0.2.9", "a default route"),
        ((("0.0.0.0/0", "192.0.2.9"),), "10.5.1.1", "local", "under a default route"),
        ((("10.5.1.1/32", "192.0.2.9"),), "10.5.1.1", "192.0.2.9", "a host route"),
        ((("10.5.1.1/32", "192.0.2.9"),), "10.5.1.0", "local", "beside a host route"),
        (
            (("0.0.0.0/1", "192.0.2.8"), ("128.0.0.0/1", "192.0.2.9")),
            "128.0.0.0",
            "192.0.2.9",
            "halves",
        ),
        (
            (("0.0.0.0/1", "192.0.2.8"), ("128.0.0.0/1", "192.0.2.9")),
            "127.255.255.255",
            "192.0.2.8",
            "halves",
        ),
    ],
)
def test_lookup(routes: tuple[Any, ...], address: str, expected: str | None, breaks: str) -> None:
    assert found(fib(*routes), address) == expected, breaks
    assert found(fib(*reversed(routes)), address) == expected, "the order of peers is no matter"


def test_no_routes_at_all() -> None:
    made = fib(own=None)
    for address in ("0.0.0.0", "10.5.1.1", "255.255.255.255"):
        assert made.lookup(number(address)) is None
        assert made.index(number(address)) == 0
    assert made.hops == (None, None)


@pytest.mark.parametrize("prefix", range(33))
def test_a_single_route_of_every_length(prefix: int) -> None:
    subnet = IPv4Network((number("203.0.113.91"), prefix), strict=False)
    made = fib((str(subnet), "192.0.2.2"), own=None)
    first, last = int(subnet.network_address), int(subnet.broadcast_address)
    for address in (first, last, number("203.0.113.91")):
        hop = made.lookup(address)
        assert hop is not None
        assert hop.address == number("192.0.2.2")
    for address in (first - 1, last + 1):
        if 0 <= address < 2**32:
            assert made.lookup(address) is None


def test_next_hop_is_what_sendto_takes() -> None:
    hop = fib(*USUAL).lookup(number("10.5.2.1"))
    assert hop == NextHop(number("192.0.2.2"), ("192.0.2.2", PORT))
    assert not hop.is_local


def test_local_hop() -> None:
    hop = fib().lookup(number("10.5.1.1"))
    assert hop is not None
    assert hop.is_local


def test_subnets_of_one_peer_share_a_hop() -> None:
    made = fib(("10.5.2.0/24", "192.0.2.2"), ("10.5.3.0/24", "192.0.2.2"))
    assert made.lookup(number("10.5.2.1")) is made.lookup(number("10.5.3.1"))
    assert len(made.hops) == 3


@pytest.mark.parametrize(
    ("inner", "holder"),
    [
        ("10.5.2.9", "192.0.2.2"),
        ("10.5.3.9", "192.0.2.3"),
        ("192.0.2.2", "192.0.2.2"),
        ("192.0.2.3", "192.0.2.3"),
        ("10.5.1.9", "0.0.0.0"),
        ("198.51.100.7", None),
        ("10.5.99.7", None),
        ("0.0.0.0", None),
    ],
)
def test_holder(inner: str, holder: str | None) -> None:
    port = 0 if holder == "0.0.0.0" else 8285
    assert fib(*USUAL).holder(number(inner)) == (holder and (number(holder), port))


def test_a_peer_inside_another_peers_subnet_is_held_by_the_lease() -> None:
    made = fib(("10.5.2.0/24", "192.0.2.2"), ("10.5.3.0/24", "10.5.2.9"))
    assert made.holder(number("10.5.2.9")) == (number("192.0.2.2"), 8285)
    assert made.peer(number("10.5.2.9")) == (number("10.5.2.9"), 8285)


def test_nodes_and_broadcasts() -> None:
    made = fib_of(
        *USUAL, own="10.5.1.0/24", own_addresses=["192.0.2.1"], broadcasts=["192.0.2.255"]
    )
    nodes = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    others = ["192.0.2.255", "10.5.1.0", "10.5.2.0", "0.0.0.0"]
    assert [made.is_node(number(each)) for each in nodes + others] == [True] * 3 + [False] * 4
    assert made.peer(number("192.0.2.1")) is None
    assert made.is_broadcast(number("192.0.2.255"))
    assert not any(made.is_broadcast(number(each)) for each in ["10.5.1.255", *nodes])


@pytest.mark.parametrize(
    ("address", "own"),
    [("10.5.1.0", True), ("10.5.1.255", True), ("10.5.2.1", False), ("198.51.100.1", False)],
)
def test_is_own(address: str, own: bool) -> None:
    assert fib(*USUAL).is_own(number(address)) is own
    assert not fib(*USUAL, own=None).is_own(number(address))


def test_peer_addresses_are_those_of_peers_only() -> None:
    assert fib(*USUAL).peers.keys() == {number("192.0.2.2"), number("192.0.2.3")}


def test_arrays_are_read_only() -> None:
    made = fib(*USUAL)
    with pytest.raises(ValueError, match="read-only"):
        made.table[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        made.hop_array[1] = (1, 2, 3)
    assert isinstance(made.hops, tuple)


def test_hop_array_mirrors_hops_for_the_native_engine() -> None:
    made = fib(*USUAL)
    assert made.hop_array.dtype == HOP_DTYPE
    assert HOP_DTYPE.itemsize == 8
    assert made.hop_array.tolist() == [
        (0, 0, 0),
        (0, 0, HOP_LOCAL),
        (number("192.0.2.2"), PORT, 0),
        (number("192.0.2.3"), PORT, 0),
    ]
    assert made.table.dtype == np.uint32
    assert CHUNK == 1 << 31


@pytest.mark.parametrize("generation", [0, 1, 2**40])
def test_generation(generation: int) -> None:
    assert fib(generation=generation).generation == generation


@pytest.mark.parametrize(
    ("routes", "base", "base_len", "strides", "breaks"),
    [
        (USUAL, "10.5.0.0", 22, (2,), "four /24 side by side: one load"),
        ((("10.5.255.0/24", "192.0.2.2"),), "10.5.0.0", 16, (8,), "a /16 of /24: one load"),
        (
            (("0.0.0.0/0", "192.0.2.2"), ("10.5.1.1/32", "192.0.2.3")),
            "0.0.0.0",
            0,
            (16, 8, 8),
            "the worst: three loads",
        ),
    ],
)
def test_shape_of_the_table(
    routes: tuple[Any, ...], base: str, base_len: int, strides: tuple[Any, ...], breaks: str
) -> None:
    made = fib(*routes)
    assert (made.base, made.base_len, made.strides) == (number(base), base_len, strides), breaks
    assert len(made.strides) <= 3


def test_a_later_build_leaves_the_earlier_one_alone() -> None:
    first = fib(*USUAL)
    table = first.table.tobytes()
    fib(("10.5.2.0/24", "198.51.100.9"), generation=4)
    assert first.table.tobytes() == table
    assert found(first, "10.5.2.1") == "192.0.2.2"
    assert first.generation == 3


def test_hops_are_made_when_asked_for_and_are_what_the_array_says() -> None:
    """The C engine reads the array alone; making 65,000 objects would be for nothing."""
    made = fib(*USUAL, ("10.5.9.0/24", "192.0.2.2"))
    assert made._hops is None
    assert made.index(number("10.5.9.1")) == made.index(number("10.5.2.1")) != 0
    assert made._hops is None, "index needs none"
    assert len(made.hops) == len(made.hop_array) == 4
    for hop, (address, port, flags) in zip(made.hops, made.hop_array.tolist(), strict=True):
        if not (address or flags):
            assert hop is None
            continue
        assert hop == NextHop(
            address, (str(IPv4Address(address)), port), is_local=bool(flags & HOP_LOCAL)
        )
    assert made.hops is made.hops
    assert made.peer_array.tolist() == sorted(made.peers)


def test_no_peers_but_ourselves() -> None:
    made = fib()
    assert not made.peers
    assert made.peer_array.tolist() == []
    assert found(made, "10.5.1.0") == found(made, "10.5.1.255") == "local"
    assert found(made, "10.5.0.255") is found(made, "10.5.2.0") is None
    assert made.holder(number("198.51.100.7")) is made.peer(number("192.0.2.2")) is None


def test_peers_but_no_subnet_of_our_own() -> None:
    made = fib(*USUAL, own=None)
    assert found(made, "10.5.2.1") == "192.0.2.2"
    assert found(made, "10.5.1.1") is None
    assert not any(hop is not None and hop.is_local for hop in made.hops)
    assert made.peers.keys() == {number("192.0.2.2"), number("192.0.2.3")}


def test_our_other_addresses_are_ours_wherever_they_lie() -> None:
    made = fib_of(("10.5.2.0/24", "192.0.2.2"), own=OWN, own_addresses=["192.0.2.1", "10.5.2.9"])
    for address, own in (
        ("192.0.2.1", True),
        ("10.5.2.9", True),
        ("10.5.2.8", False),
        ("10.5.1.77", True),
        ("192.0.2.2", False),
    ):
        assert made.is_own(number(address)) is own, address
    assert found(made, "192.0.2.1") is None, "an address of ours is no route"
    assert found(made, "10.5.2.9") == "192.0.2.2"


@pytest.mark.parametrize(
    ("lengths", "base", "own", "breaks"),
    [
        ([24], "10.0.0.0/8", "10.5.1.0/24", "the usual leases, many of them"),
        ([16, 20, 24, 25, 28, 31, 32], "10.5.0.0/16", "10.5.1.0/24", "prefixes inside prefixes"),
        ([8, 9, 12, 30, 32], "0.0.0.0/0", None, "all over"),
        ([30], "10.5.0.0/18", "10.5.1.4/30", "neighbours"),
        ([0, 1, 2, 32], "0.0.0.0/0", "128.0.0.0/1", "the widest and the narrowest"),
    ],
)
def test_many_prefixes_are_a_linear_scan(
    lengths: list[int], base: str, own: str | None, breaks: str
) -> None:
    rng = np.random.default_rng(7)
    network = IPv4Network(base)
    start, size = int(network.network_address), network.num_addresses
    own_subnet = None if own is None else IPv4Network(own)
    routes: dict[IPv4Network, IPv4Address] = {}
    for _ in range(1500):
        length = int(rng.choice(lengths))
        address = start + int(rng.integers(size))
        subnet = IPv4Network((address >> (32 - length) << (32 - length), length))
        if subnet != own_subnet:
            routes[subnet] = IPv4Address(number("192.0.2.0") + int(rng.integers(1, 200)))
    peers = peers_of(routes.items())
    rows = np.array([row_of(peer) for peer in peers], np.int64)
    hops = np.zeros(FIRST_HOP_ID + 200, HOP_DTYPE)
    for peer in peers:
        hops[peer.hop_id] = (int(peer.endpoint.address), peer.endpoint.port, 0)
    fibs = [
        build_fib(peers, own_subnet=own_subnet, generation=1),
        assemble_fib(rows, hops, own_subnet=own_subnet, own_addresses=(), generation=1),
    ]
    spans = np.array(
        [(int(s.network_address), int(s.broadcast_address), s.prefixlen) for s in routes]
        + ([(int(own_subnet[0]), int(own_subnet[-1]), own_subnet.prefixlen)] if own_subnet else []),
        np.int64,
    )
    targets = [str(address) for address in routes.values()] + ["local"]
    edges = rng.choice(spans[:, :2].ravel(), 300)
    probes = [*edges.tolist(), *(edges - 1).tolist(), *(edges + 1).tolist()]
    probes += rng.integers(start, start + size, 300).tolist()
    for probe in probes:
        if not 0 <= probe < 2**32:
            continue
        covers = (spans[:, 0] <= probe) & (probe <= spans[:, 1])
        expected = None
        if covers.any():
            expected = targets[int(np.where(covers, spans[:, 2], -1).argmax())]
        for made in fibs:
            assert found(made, str(IPv4Address(probe))) == expected, breaks
