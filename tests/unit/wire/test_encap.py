"""The two verdicts: every drop reason they give, and the order of the checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, IPOption
from scapy.packet import Raw

from tundp.wire.drop import DropReason
from tundp.wire.encap import (
    Deliver,
    Drop,
    Forward,
    Reply,
    SourceCheck,
    decapsulate,
    encapsulate,
)
from tundp.wire.policy import Policy, Prefix

NEIGHBOURS = Prefix(0xCB007100, 0xFFFFFF00)  # 203.0.113.0/24
NOT_THESE = Prefix(0xCB007200, 0xFFFFFF00)
EVERYTHING = Prefix(0, 0)
TUNNEL = 0x0A050100  # 10.5.1.0
PEER = 0xC0000207  # 192.0.2.7
OTHER = 0xC633640D  # 198.51.100.13


@dataclass(frozen=True)
class Hop:
    name: str
    is_local: bool = False


FAR = Hop("10.5.2.0/24")
NEAR = Hop("10.5.1.0/24", is_local=True)


def route(address: int) -> Hop | None:
    return {0x0A0501: NEAR, 0x0A0502: FAR}.get(address >> 8)


def packet(payload: bytes = b"x" * 32, **fields: Any) -> bytearray:
    given: dict[str, Any] = {"src": "10.5.1.2", "dst": "10.5.2.2", "proto": 17} | fields
    return bytearray(bytes(IP(**given) / Raw(payload)))


def encap(
    data: bytearray, mtu: int = 1472, lookup: Callable[[int], Hop | None] = route
) -> Forward[Hop] | Reply | Drop:
    return encapsulate(
        memoryview(data), lookup=lookup, path_mtu=lambda hop: mtu, tun_address=TUNNEL
    )


@dataclass
class Table:
    """What the rules are told, and what they asked: (question, address)."""

    own: set[int] = field(default_factory=set)
    broadcasts: set[int] = field(default_factory=set)
    nodes: set[int] = field(default_factory=set)
    holders: dict[int, tuple[int, int]] = field(default_factory=dict)
    peers: dict[int, tuple[int, int]] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def is_own(self, address: int) -> bool:
        self.asked.append(("own", address))
        return address in self.own

    def is_broadcast(self, address: int) -> bool:
        return address in self.broadcasts

    def is_node(self, address: int) -> bool:
        self.asked.append(("node", address))
        return address in self.nodes

    def holder(self, address: int) -> tuple[int, int] | None:
        self.asked.append(("holder", address))
        return self.holders.get(address)

    def peer(self, address: int) -> tuple[int, int] | None:
        self.asked.append(("peer", address))
        return self.peers.get(address)


PORT = 8285
SENDER = (PEER, PORT)


def fitting(data: bytearray) -> Table:
    """The packet is for us, from who may send it."""
    source, destination = (int.from_bytes(data[at : at + 4], "big") for at in (12, 16))
    return Table(own={destination}, holders={source: SENDER})


def decap(
    data: bytearray,
    table: Table | None = None,
    *,
    check: SourceCheck = SourceCheck.ENFORCE,
    sender: tuple[int, int] = SENDER,
    admitted: tuple[Prefix, ...] = (),
) -> Deliver | Reply | Drop:
    """Without a table everything fits."""
    return decapsulate(
        memoryview(data),
        sender=sender,
        table=fitting(data) if table is None else table,
        policy=Policy(tun_address=TUNNEL, source_check=check, port=PORT, admitted=admitted),
    )


NO_ANSWER = {"src": "0.0.0.0"}  # a source no ICMP error may go to
UNPARSABLE = [
    (bytearray(), DropReason.TOO_SHORT),
    (bytearray(19), DropReason.TOO_SHORT),
    (bytearray(b"\x60" + bytes(39)), DropReason.NOT_IPV4),
    (bytearray(b"\x44" + bytes(39)), DropReason.BAD_HEADER_LENGTH),
    (packet()[:-1], DropReason.BAD_TOTAL_LENGTH),
    (packet(chksum=0x1234), DropReason.BAD_HEADER_CHECKSUM),
]


# TUN -> UDP


@pytest.mark.parametrize(("data", "reason"), UNPARSABLE)
def test_encap_drops_what_cannot_be_parsed_in_silence(data: bytearray, reason: DropReason) -> None:
    before = bytes(data)
    assert encap(data) == Drop(reason)
    assert bytes(data) == before


@pytest.mark.parametrize(
    ("fields", "mtu", "reason", "icmp_type", "code"),
    [
        ({"dst": "10.5.9.9"}, 1472, DropReason.NO_ROUTE, 3, 0),
        ({"dst": "10.5.1.9"}, 1472, DropReason.OWN_SUBNET, 3, 0),
        ({"ttl": 1}, 1472, DropReason.HOP_LIMIT_EXCEEDED, 11, 0),
        ({"ttl": 0}, 1472, DropReason.HOP_LIMIT_EXCEEDED, 11, 0),
        ({"flags": "DF"}, 51, DropReason.TOO_BIG, 3, 4),
    ],
)
def test_encap_answers_what_it_drops(
    fields: dict[str, Any], mtu: int, reason: DropReason, icmp_type: int, code: int
) -> None:
    data = packet(**fields)
    before = bytes(data)
    verdict = encap(data, mtu)
    assert isinstance(verdict, Reply)
    assert verdict.reason is reason
    seen = IP(verdict.packet)
    assert (seen[ICMP].type, seen[ICMP].code) == (icmp_type, code)
    assert (seen.src, seen.dst) == ("10.5.1.0", "10.5.1.2")
    assert bytes(data) == before, "only Forward may change the packet"

    silent = packet(**fields | NO_ANSWER)
    before = bytes(silent)
    assert encap(silent, mtu) == Drop(reason)
    assert bytes(silent) == before


@pytest.mark.parametrize(
    ("fields", "reason", "breaks"),
    [
        (
            {"ttl": 1, "dst": "10.5.9.9"},
            DropReason.NO_ROUTE,
            "lookup before TTL: flannel sends unreachable for TTL 1 without a route",
        ),
        ({"ttl": 0, "dst": "10.5.9.9"}, DropReason.NO_ROUTE, "also for TTL 0"),
        ({"ttl": 1, "dst": "10.5.1.9"}, DropReason.OWN_SUBNET, "own subnet is a route answer"),
        (
            {"flags": "DF", "dst": "10.5.9.9"},
            DropReason.NO_ROUTE,
            "there is no path MTU without a route",
        ),
        (
            {"flags": "DF", "ttl": 1},
            DropReason.HOP_LIMIT_EXCEEDED,
            "TTL before path MTU, as on any router",
        ),
    ],
)
def test_encap_order_of_checks(fields: dict[str, Any], reason: DropReason, breaks: str) -> None:
    verdict = encap(packet(**fields), mtu=51)
    assert isinstance(verdict, Reply)
    assert verdict.reason is reason, breaks


def test_ttl_1_without_route_gets_net_unreachable_quoting_ttl_1() -> None:
    data = packet(ttl=1, dst="10.5.9.9")
    verdict = encap(data)
    assert isinstance(verdict, Reply)
    assert verdict.packet[28:] == bytes(data[:28])


@pytest.mark.parametrize("way", [encap, decap])
def test_ttl_0_never_wraps(way: Callable[..., Any]) -> None:
    # flannel turns 0 into 255 and sends it on.
    data = packet(ttl=0)
    verdict = way(data)
    assert isinstance(verdict, Reply)
    assert verdict.reason is DropReason.HOP_LIMIT_EXCEEDED
    assert data[8] == 0


@pytest.mark.parametrize("ttl", [2, 64, 255])
def test_forward_is_the_same_packet_one_hop_later(ttl: int) -> None:
    data = packet(ttl=ttl)
    verdict = encap(data)
    assert isinstance(verdict, Forward)
    assert verdict.hop is FAR
    (sent,) = verdict.packets
    assert bytes(sent) == bytes(packet(ttl=ttl - 1))
    assert bytes(sent) == bytes(data), "a view of the caller's buffer, not a copy"


def test_lookup_gets_the_destination_and_path_mtu_the_hop() -> None:
    asked = []

    def lookup(address: Any) -> Any:
        asked.append(address)
        return FAR

    def path_mtu(hop: Any) -> Any:
        asked.append(hop)
        return 1472

    encapsulate(
        memoryview(packet(dst="10.5.77.8")),
        lookup=lookup,
        path_mtu=path_mtu,
        tun_address=TUNNEL,
    )
    assert asked == [0x0A054D08, FAR]


def test_encap_trims_what_is_behind_the_packet() -> None:
    data = packet() + bytearray(b"SECRET" * 10)
    verdict = encap(data)
    assert isinstance(verdict, Forward)
    assert bytes(verdict.packets[0]) == bytes(packet(ttl=63))


def test_a_reply_never_quotes_what_is_behind_the_packet() -> None:
    for data in (packet(b"abc", dst="10.5.9.9"), packet(b"abc", ttl=1)):
        verdict = encap(data + bytearray(b"SECRET" * 10))
        assert isinstance(verdict, Reply)
        assert verdict.packet[28:] == bytes(data)


@pytest.mark.parametrize(
    ("mtu", "count", "breaks"),
    [
        (52, 1, "a packet of exactly the path MTU goes whole"),
        (1472, 1, "and one below"),
        (51, 2, "one byte over is fragmented"),
    ],
)
def test_path_mtu_edge(mtu: int, count: int, breaks: str) -> None:
    verdict = encap(packet(), mtu)
    assert isinstance(verdict, Forward)
    assert len(verdict.packets) == count, breaks


def test_df_exactly_at_the_path_mtu_is_forwarded() -> None:
    assert isinstance(encap(packet(flags="DF"), 52), Forward)


def test_the_length_that_counts_is_the_packets_not_the_buffers() -> None:
    assert isinstance(encap(packet(flags="DF") + bytearray(100), 52), Forward)


def test_too_big_names_the_mtu() -> None:
    verdict = encap(packet(b"y" * 1452, flags="DF"), 1400)
    assert isinstance(verdict, Reply)
    assert IP(verdict.packet)[ICMP].nexthopmtu == 1400


def test_fragments_have_the_lowered_ttl_and_right_checksums() -> None:
    payload = bytes(range(256)) * 4
    verdict = encap(packet(payload, id=99, ttl=64), 400)
    assert isinstance(verdict, Forward)
    assert verdict.hop is FAR
    data = b""
    for raw in verdict.packets:
        piece = IP(bytes(raw))
        assert len(raw) <= 400
        assert (piece.ttl, piece.id) == (63, 99)
        assert piece.frag * 8 == len(data)
        data += bytes(piece.payload)
        stored = piece.chksum
        del piece.chksum
        assert IP(bytes(piece)).chksum == stored
    assert data == payload


# UDP -> TUN


@pytest.mark.parametrize("check", SourceCheck)
@pytest.mark.parametrize(("data", "reason"), UNPARSABLE)
def test_decap_drops_what_cannot_be_parsed_in_silence(
    data: bytearray, reason: DropReason, check: SourceCheck
) -> None:
    before = bytes(data)
    assert decap(data, check=check) == Drop(reason)
    assert bytes(data) == before


@pytest.mark.parametrize(
    ("check", "admitted", "expected", "breaks"),
    [
        (SourceCheck.OFF, True, True, "off: everything matches"),
        (SourceCheck.OFF, False, True, "off: nothing is asked, so nothing mismatches"),
        (SourceCheck.COUNT, True, True, "count: a good source is not counted"),
        (SourceCheck.COUNT, False, False, "count: delivered, but told"),
        (SourceCheck.ENFORCE, True, True, "enforce: a good source passes"),
        (SourceCheck.ENFORCE, False, None, "enforce: a bad one is dropped"),
    ],
)
def test_source_check(
    check: SourceCheck, admitted: bool, expected: bool | None, breaks: str
) -> None:
    data = packet()
    before = bytes(data)
    table = fitting(data)
    if not admitted:
        table.holders.clear()
    verdict = decap(data, table, check=check)
    if expected is None:
        assert verdict == Drop(DropReason.SOURCE_MISMATCH), breaks
        assert bytes(data) == before
    else:
        assert isinstance(verdict, Deliver), breaks
        assert verdict.source_matches is expected, breaks
        assert bytes(verdict.packet) == bytes(packet(ttl=63))


@pytest.mark.parametrize(
    ("sender", "holder", "peer", "admitted", "reason", "breaks"),
    [
        (SENDER, SENDER, None, (), None, "the holder of the lease, from the overlay's port"),
        (SENDER, (OTHER, PORT), None, (), "SOURCE_MISMATCH", "another peer's"),
        ((PEER, 40000), SENDER, None, (), "SOURCE_PORT_MISMATCH", "a process on the peer"),
        ((PEER, 40000), (OTHER, PORT), None, (), "SOURCE_MISMATCH", "the address comes first"),
        (SENDER, None, SENDER, (), "SOURCE_MISMATCH", "in no lease, and not admitted"),
        (SENDER, None, SENDER, (NEIGHBOURS,), None, "in no lease, but admitted"),
        (SENDER, None, None, (NEIGHBOURS,), "SOURCE_MISMATCH", "admitted, but from no peer"),
        ((PEER, 1), None, SENDER, (NEIGHBOURS,), "SOURCE_PORT_MISMATCH", "admitted, not the port"),
        (SENDER, (OTHER, PORT), SENDER, (EVERYTHING,), "SOURCE_MISMATCH", "a lease stays a lease"),
        (SENDER, None, SENDER, (NOT_THESE, NEIGHBOURS), None, "any of those admitted"),
        (SENDER, None, SENDER, (NOT_THESE,), "SOURCE_MISMATCH", "none of those admitted"),
    ],
)
@pytest.mark.parametrize("check", SourceCheck)
def test_who_may_send(
    check: SourceCheck,
    sender: tuple[int, int],
    holder: tuple[int, int] | None,
    peer: tuple[int, int] | None,
    admitted: tuple[Prefix, ...],
    reason: str | None,
    breaks: str,
) -> None:
    data = packet(src="203.0.113.9", dst="10.5.1.2")
    table = fitting(data)
    table.holders = {} if holder is None else {0xCB007109: holder}
    table.peers = {} if peer is None else {PEER: peer}
    verdict = decap(data, table, check=check, sender=sender, admitted=admitted)
    if check is SourceCheck.ENFORCE and reason:
        assert verdict == Drop(DropReason[reason]), breaks
    else:
        assert isinstance(verdict, Deliver), breaks
        assert verdict.source_matches is (reason is None or check is SourceCheck.OFF), breaks


def test_off_does_not_even_ask() -> None:
    table = Table()
    data = packet()
    assert isinstance(decap(data, table, check=SourceCheck.OFF), Deliver)
    assert table.asked == [("own", 0x0A050102)]


UDP_TO_8285 = bytes.fromhex("9c40 205d 0008 0000")


@pytest.mark.parametrize(
    ("fields", "payload", "nested", "breaks"),
    [
        ({}, UDP_TO_8285, True, "to the port of a node"),
        ({"dst": "10.5.1.0"}, UDP_TO_8285, True, "to our own tunnel address"),
        ({"flags": "MF"}, UDP_TO_8285, True, "the first fragment has the ports"),
        ({"options": [IPOption(b"\x83\x03\x04")]}, UDP_TO_8285, True, "behind IP options"),
        ({}, UDP_TO_8285[:4], True, "cut off right behind the ports"),
        ({"ttl": 1}, UDP_TO_8285, True, "before the TTL: no answer either"),
        ({}, UDP_TO_8285[:3], False, "cut off inside the port"),
        ({"frag": 1}, UDP_TO_8285, False, "a later fragment has no ports there"),
        ({"proto": 6}, UDP_TO_8285, False, "TCP"),
        ({}, bytes.fromhex("205d 9c40 0008 0000"), False, "from that port"),
        ({"dst": "10.5.1.3"}, UDP_TO_8285, False, "to a pod: its port is its own"),
    ],
)
@pytest.mark.parametrize("check", SourceCheck)
def test_no_tunnel_in_the_tunnel(
    check: SourceCheck, fields: dict[str, Any], payload: bytes, nested: bool, breaks: str
) -> None:
    data = packet(payload, **{"dst": "192.0.2.7", **fields})
    before = bytes(data)
    table = fitting(data)
    table.nodes = {PEER}
    verdict = decap(data, table, check=check)
    if nested:
        assert verdict == Drop(DropReason.TUNNEL_IN_TUNNEL), breaks
        assert bytes(data) == before
    else:
        assert isinstance(verdict, Deliver), breaks


@pytest.mark.parametrize(
    ("check", "is_ours", "expected", "breaks"),
    [
        (SourceCheck.OFF, True, True, "off: everything matches"),
        (SourceCheck.OFF, False, True, "off: nothing is asked, so nothing mismatches"),
        (SourceCheck.COUNT, True, True, "count: our destination is not counted"),
        (SourceCheck.COUNT, False, False, "count: delivered, but told"),
        (SourceCheck.ENFORCE, True, True, "enforce: our destination passes"),
        (SourceCheck.ENFORCE, False, None, "enforce: another one is dropped"),
    ],
)
def test_destination_check(
    check: SourceCheck, is_ours: bool, expected: bool | None, breaks: str
) -> None:
    data = packet(src="10.5.1.2", dst="10.5.2.2")
    before = bytes(data)
    table = fitting(data)
    if not is_ours:
        table.own.clear()
    verdict = decap(data, table, check=check)
    if expected is None:
        assert verdict == Drop(DropReason.DESTINATION_MISMATCH), breaks
        assert bytes(data) == before
    else:
        assert isinstance(verdict, Deliver), breaks
        assert verdict.destination_matches is expected, breaks
        assert verdict.source_matches is True, breaks
        assert bytes(verdict.packet) == bytes(packet(ttl=63))


@pytest.mark.parametrize("check", SourceCheck)
def test_own_is_asked_for_the_source_and_unless_off_for_the_destination(
    check: SourceCheck,
) -> None:
    data = packet()
    table = fitting(data)
    assert isinstance(decap(data, table, check=check), Deliver)
    asked = [address for question, address in table.asked if question == "own"]
    assert asked == [0x0A050102, 0x0A050202][: 1 if check is SourceCheck.OFF else 2]


def test_two_mismatches_are_told_apart() -> None:
    # Both are counted, but a drop has one reason: the first.
    verdict = decap(packet(), Table(), check=SourceCheck.COUNT)
    assert isinstance(verdict, Deliver)
    assert (verdict.source_matches, verdict.destination_matches) == (False, False)
    assert decap(packet(), Table()) == Drop(DropReason.SOURCE_MISMATCH)


def test_destination_before_ttl() -> None:
    # What is not for us must not make us send ICMP either.
    data = packet(ttl=1)
    table = fitting(data)
    table.own.clear()
    assert decap(data, table) == Drop(DropReason.DESTINATION_MISMATCH)


MARTIANS = [
    "0.0.0.0",
    "0.9.9.9",
    "127.0.0.1",
    "127.255.255.254",
    "224.0.0.1",
    "239.255.255.255",
    "255.255.255.255",
]


@pytest.mark.parametrize("check", SourceCheck)
@pytest.mark.parametrize("source", MARTIANS)
def test_a_source_no_host_has_never_comes_from_the_wire(source: str, check: SourceCheck) -> None:
    data = packet(src=source)
    before = bytes(data)
    assert decap(data, check=check) == Drop(DropReason.MARTIAN_SOURCE)
    assert bytes(data) == before


@pytest.mark.parametrize("check", SourceCheck)
@pytest.mark.parametrize("destination", MARTIANS)
def test_what_is_for_no_single_host_is_never_delivered(
    destination: str, check: SourceCheck
) -> None:
    data = packet(dst=destination, ttl=1)
    before = bytes(data)
    assert decap(data, check=check) == Drop(DropReason.MARTIAN_DESTINATION), "and no answer"
    assert bytes(data) == before


@pytest.mark.parametrize("check", SourceCheck)
def test_broadcasts_of_this_hosts_networks(check: SourceCheck) -> None:
    data = packet(dst="192.0.2.255")
    table = fitting(data)
    assert isinstance(decap(bytearray(data), table, check=check), Deliver), "somebody else's"
    table.broadcasts = {0xC00002FF}
    assert decap(data, table, check=check) == Drop(DropReason.MARTIAN_DESTINATION)
    data = packet(src="192.0.2.255")
    table.holders = {0xC00002FF: SENDER}
    assert decap(data, table, check=check) == Drop(DropReason.MARTIAN_SOURCE)


@pytest.mark.parametrize("check", SourceCheck)
def test_our_own_addresses_never_come_from_the_wire(check: SourceCheck) -> None:
    table = Table(own={0x0A05014D, 0x0A050202}, holders={0x0A05014D: SENDER})
    verdict = decap(packet(src="10.5.1.77", ttl=1), table, check=check)
    assert verdict == Drop(DropReason.MARTIAN_SOURCE), "before the TTL, and in silence"
    assert table.asked == [("own", 0x0A05014D)]


def test_martian_source_comes_first() -> None:
    verdict = decap(packet(UDP_TO_8285, src="127.0.0.1", dst="127.0.0.1"), Table())
    assert verdict == Drop(DropReason.MARTIAN_SOURCE)


@pytest.mark.parametrize(
    "source",
    ["1.0.0.1", "126.9.9.9", "128.0.0.1", "223.255.255.255", "240.0.0.1", "255.255.255.254"],
)
def test_the_neighbours_of_martians_pass(source: str) -> None:
    assert isinstance(decap(packet(src=source)), Deliver)


def test_source_before_ttl() -> None:
    # A spoofed packet must not be able to make us send ICMP to a third party.
    assert decap(packet(ttl=1), Table()) == Drop(DropReason.SOURCE_MISMATCH)


@pytest.mark.parametrize("ttl", [0, 1])
def test_decap_ttl_runs_out(ttl: int) -> None:
    data = packet(ttl=ttl, src="10.5.2.9", dst="10.5.1.2")
    before = bytes(data)
    verdict = decap(data)
    assert isinstance(verdict, Reply)
    assert verdict.reason is DropReason.HOP_LIMIT_EXCEEDED
    seen = IP(verdict.packet)
    assert (seen[ICMP].type, seen[ICMP].code) == (11, 0)
    assert (seen.src, seen.dst) == ("10.5.1.0", "10.5.2.9")
    assert verdict.packet[28:] == before
    assert bytes(data) == before
    silent = packet(ttl=ttl, src="10.5.2.9", dst="10.5.1.2", frag=3)
    assert decap(silent) == Drop(DropReason.HOP_LIMIT_EXCEEDED)


def test_decap_delivers_a_view_of_the_callers_buffer_trimmed() -> None:
    data = packet(ttl=9) + bytearray(b"SECRET")
    verdict = decap(data)
    assert isinstance(verdict, Deliver)
    assert verdict.packet.obj is data
    assert bytes(verdict.packet) == bytes(packet(ttl=8))
    assert data.endswith(b"SECRET")


def test_twenty_bytes_are_a_packet() -> None:
    assert isinstance(encap(packet(b"")), Forward)
    assert isinstance(decap(packet(b"")), Deliver)


def test_both_ends_lower_the_ttl_as_flannel_does() -> None:
    data = packet(ttl=64)
    forward = encap(data)
    assert isinstance(forward, Forward)
    received = bytearray(forward.packets[0])
    delivered = decap(received)
    assert isinstance(delivered, Deliver)
    assert bytes(delivered.packet) == bytes(packet(ttl=62))


def test_source_check_names_are_the_flags_values() -> None:
    assert [check.value for check in SourceCheck] == ["off", "count", "enforce"]
