"""The lease table as commands read it: of a ledger, of a file, and what it says of addresses."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import pytest

from tundp.backend.choose import parse_network_config
from tundp.lease.model import Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.routing import Routing
from tundp.observe.codec import Malformed
from tundp.observe.ledger import OWN, PEER, REFUSED, Ledger, LedgerRow, LedgerRows, from_mapping

CONFIG = parse_network_config('{"Network": "10.5.0.0/16"}', "a test")


def lease(key: str, public_ip: str, backend_type: str = "udp") -> Lease:
    return Lease(
        key=LeaseKey(IPv4Interface(key)),
        attributes=LeaseAttributes(public_ip=IPv4Address(public_ip), backend_type=backend_type),
        revision=7,
        lease_ttl_s=None,
    )


def routing() -> Routing:
    found = Routing(
        network=CONFIG.network,
        backend=CONFIG.backend,
        own_key=LeaseKey(IPv4Interface("10.5.1.0/24")),
        own_addresses=[IPv4Address("192.0.2.1")],
        public_ip=IPv4Address("192.0.2.1"),
    )
    leases = (
        lease("10.5.1.0/24", "192.0.2.1"),
        lease("10.5.3.0/24", "192.0.2.3"),
        lease("10.5.3.64/26", "192.0.2.4"),
        lease("10.5.2.0/24", "192.0.2.2"),
        lease("10.5.8.0/24", "192.0.2.8", "vxlan"),
        lease("10.5.2.128/25", "0.0.0.0"),
    )
    found.apply(Snapshot(leases=leases, revision=42))
    return found


def table() -> Ledger:
    return Ledger(
        network=CONFIG.network,
        subnet=IPv4Network("10.5.1.0/24"),
        public_ip=IPv4Address("192.0.2.1"),
        port=8285,
        own_addresses=(IPv4Address("192.0.2.1"),),
        revision=42,
        leases=LedgerRows.of(routing()).made(),
    )


def test_rows_of_a_ledger() -> None:
    rows = [(str(each.subnet), each.endpoint, each.state, each.reason) for each in table().leases]
    assert rows == [
        ("10.5.1.0/24", "192.0.2.1", OWN, ""),
        ("10.5.2.0/24", "192.0.2.2:8285", PEER, ""),
        ("10.5.2.128/25", "0.0.0.0", REFUSED, "no_public_ip"),
        ("10.5.3.0/24", "192.0.2.3:8285", PEER, ""),
        ("10.5.3.64/26", "192.0.2.4:8285", PEER, ""),
        ("10.5.8.0/24", "192.0.2.8", REFUSED, "other_backend"),
    ]


@pytest.mark.parametrize(
    ("address", "subnet"),
    [
        ("10.5.1.7", "10.5.1.0/24"),
        ("10.5.3.1", "10.5.3.0/24"),
        ("10.5.3.65", "10.5.3.64/26"),
        # A refused lease hides no wider one that is a peer.
        ("10.5.2.200", "10.5.2.0/24"),
        ("10.5.8.1", "10.5.8.0/24"),
        ("10.5.9.1", None),
    ],
)
def test_which_lease_decides(address: str, subnet: str | None) -> None:
    found = table().holding(IPv4Address(address))
    assert (None if found is None else str(found.subnet)) == subnet
    # What the engines look up is the same.
    hop = table().fib().lookup(int(IPv4Address(address)))
    is_peer = found is not None and found.state == PEER
    assert (hop is not None and not hop.is_local) == is_peer


def test_what_the_ledger_says_is_what_the_table_says() -> None:
    ledger, listed = routing(), table()
    for number in range(int(IPv4Address("10.5.0.0")), int(IPv4Address("10.5.10.0")), 31):
        address = IPv4Address(number)
        answer, row = ledger.why(address), listed.holding(address)
        assert (None if row is None else row.key) == (
            None if answer.lease is None else str(answer.lease.key)
        )
        assert (row is not None and row.state == PEER) == (answer.peer is not None)


def test_the_nearest_are_named() -> None:
    near = table().nearest(IPv4Address("10.5.7.1"))
    assert [str(each.subnet) for each in near] == ["10.5.8.0/24", "10.5.3.0/24"]
    assert Ledger().nearest(IPv4Address("10.5.7.1")) == []


def test_a_part_of_the_table_says_the_same_of_what_it_is_about() -> None:
    whole = table()
    for number in range(int(IPv4Address("10.5.0.0")), int(IPv4Address("10.5.10.0")), 61):
        source, destination = IPv4Address(number), IPv4Address(number ^ 0x300)
        part = whole.about((source, destination))
        assert (part.count, whole.count) == (6, 6)
        for address in (source, destination):
            assert part.holding(address) == whole.holding(address)
            assert part.nearest(address) == whole.nearest(address)
            ends = [each.fib().holder(int(address)) for each in (part, whole)]
            assert ends[0] == ends[1]
    peer = whole.about([IPv4Address("192.0.2.3")])
    assert peer.peer_at(IPv4Address("192.0.2.3")) == whole.peer_at(IPv4Address("192.0.2.3"))
    assert len(peer.leases) < 6, "it is a part"


def test_a_document_is_read_back() -> None:
    assert Ledger.from_json(json.loads(json.dumps(table().to_json()))) == table()


def test_a_plain_mapping_is_a_table_of_peers() -> None:
    found = Ledger.from_json({"10.5.2.0/24": "192.0.2.2", "10.5.3.0/24": "192.0.2.3"})
    assert [each.endpoint for each in found.peers] == ["192.0.2.2:8285", "192.0.2.3:8285"]
    assert Ledger.from_json({}).leases == ()


def test_what_tundp_leases_prints_is_a_table() -> None:
    document = {
        "schema": 1,
        "revision": 42,
        "own_key": "10.5.1.0-24",
        "next_number": 7,
        "leases": [
            {
                "key": "10.5.1.0-24",
                "subnet": "10.5.1.0/24",
                "public_ip": "192.0.2.1",
                "state": "own",
            },
            {
                "key": "10.5.2.0-24",
                "subnet": "10.5.2.0/24",
                "public_ip": "192.0.2.2",
                "state": "peer",
            },
        ],
    }
    found = Ledger.from_json(document)
    assert (str(found.subnet), str(found.public_ip)) == ("10.5.1.0/24", "192.0.2.1")
    hop = found.fib().lookup(int(IPv4Address("10.5.2.9")))
    assert hop is not None
    assert hop.sockaddr == ("192.0.2.2", 8285)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "leases is no object"),
        ({"schema": 99, "leases": []}, "has schema 99"),
        ({"schema": 1, "leases": 5}, "leases is not an array"),
        ({"10.5.2.0/24": 5}, "10.5.2.0/24: 5 is no address"),
        ({"10.5.2.1/24": "192.0.2.2"}, "10.5.2.1/24: 10.5.2.1/24 has host bits set"),
        ({"10.5.2.0/24": "here"}, "10.5.2.0/24: Expected 4 octets"),
        ({"schema": 1, "leases": [{"subnet": "10.5.2.0/24"}]}, r"leases\[0\].public_ip is missing"),
    ],
)
def test_a_wrong_document_is_refused_by_name(document: Any, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        Ledger.from_json(document)


def test_a_peer_sees_our_lease_as_that_of_a_peer() -> None:
    row = table().holding(IPv4Address("10.5.2.1"))
    assert row is not None
    view = table().seen_from(row, IPv4Address("10.5.1.2"))
    fib = view.fib()
    assert fib.is_own(int(IPv4Address("10.5.2.9")))
    assert fib.holder(int(IPv4Address("10.5.1.2"))) == (int(IPv4Address("192.0.2.1")), 8285)
    assert fib.holder(int(IPv4Address("203.0.113.7"))) is None
    # A packet of ours from a third node's subnet is that node's to send.
    view = table().seen_from(row, IPv4Address("10.5.3.1"))
    assert view.fib().holder(int(IPv4Address("10.5.3.1"))) == (int(IPv4Address("192.0.2.3")), 8285)


def test_ports_of_a_mapping_may_be_others() -> None:
    one = from_mapping({"10.5.2.0/24": "192.0.2.2"})
    assert one.port == 8285
    assert (
        LedgerRow(subnet=IPv4Network("10.5.2.0/24"), public_ip=IPv4Address(7)).endpoint == "0.0.0.7"
    )
