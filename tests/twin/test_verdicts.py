"""C and Python give one verdict: same kind, same drop reason, same bytes, for any packet."""

from __future__ import annotations

import random
import struct
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import echo_replies, peer_packets
from tests.echo_replies import ECHO_ID
from tests.packets import icmp_echo, internet_checksum, ipv4
from tests.routes import PORT, fib_of
from tundp.engine.native import library
from tundp.engine.native.fib import NativeFib, policy_values
from tundp.lease.fib import Fib, NextHop
from tundp.wire import checksum, fragment, ip
from tundp.wire.drop import DropReason
from tundp.wire.encap import (
    Deliver,
    Drop,
    Forward,
    Reply,
    SourceCheck,
    decapsulate,
    encapsulate,
    narrow,
)
from tundp.wire.policy import Policy, Prefix
from tundp.wire.ratelimit import ICMP_BURST, ICMP_RATE_PER_S, ICMP_WIRE_RATE_PER_S, TokenBucket

TUNNEL = int(IPv4Address("10.5.3.0"))
PEER = int(IPv4Address("192.0.2.2"))
NARROW_PEER = int(IPv4Address("192.0.2.3"))
NARROW = 576
ADDRESSES = [
    int(IPv4Address(text))
    for text in (
        "10.5.1.9",  # routed to PEER
        "10.5.2.9",  # routed over a narrow path
        "10.5.3.9",  # our own subnet
        "10.5.3.0",
        "10.5.77.1",  # no route
        "192.0.2.1",  # our underlay address
        "192.0.2.9",
        "192.0.2.2",  # a peer's underlay address
        "192.0.2.255",  # a broadcast address
        "203.0.113.7",  # admitted
        "0.0.0.0",
        "127.0.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.5.2.7",
        "255.255.255.254",
        "255.255.255.255",
    )
]

_native = library.require()
ffi, lib = _native.ffi, _native.lib


def make_fib() -> Fib:
    return fib_of(
        ("10.5.1.0/24", IPv4Address(PEER)),
        ("10.5.2.0/24", IPv4Address(NARROW_PEER)),
        own="10.5.3.0/24",
        own_addresses=["192.0.2.1", "198.51.100.1"],
        broadcasts=["192.0.2.255", "198.51.100.255"],
    )


FIB = make_fib()
PATHS = np.zeros(len(FIB.hop_array), [("inner_mtu", "u2"), ("limit", "u2"), ("no_gso", "u4")])
PATHS["inner_mtu"][FIB.hop_array["address"] == NARROW_PEER] = NARROW
NATIVE_FIB = NativeFib(FIB, PATHS)
VERDICT = ffi.new("struct tundp_verdict *")


ADMITTED = (Prefix(0xCB007100, 0xFFFFFF00), Prefix(0xC6336402, 0xFFFFFFFF))


def policy(check: SourceCheck, admitted: tuple[Prefix, ...] = ADMITTED) -> Policy:
    return Policy(
        tun_address=TUNNEL, source_check=check, port=PORT, admitted=admitted, echo_id=ECHO_ID
    )


def native_policy(of: Policy) -> Any:
    return ffi.new("struct tundp_policy *", policy_values(of))


def assert_same_encap(packet: bytes) -> None:
    mine, theirs = bytearray(packet), bytearray(packet)
    expected = encapsulate(
        memoryview(mine),
        lookup=FIB.lookup,
        path_mtu=lambda hop: NARROW if hop.address == NARROW_PEER else 0xFFFF,
        tun_address=TUNNEL,
    )
    lib.tundp_encapsulate(
        NATIVE_FIB.struct,
        native_policy(policy(SourceCheck.OFF)),
        ffi.from_buffer("uint8_t[]", theirs),
        len(theirs),
        VERDICT,
    )
    assert_same(expected, mine, theirs)
    if isinstance(expected, Forward):
        assert FIB.hops[VERDICT.hop] is expected.hop
        assert sent_by_c(theirs) == [bytes(each) for each in expected.packets]


def assert_same_decap(
    datagram: bytes,
    outer: int,
    check: SourceCheck,
    port: int = PORT,
    admitted: tuple[Prefix, ...] = ADMITTED,
) -> Deliver | Reply | Drop:
    mine, theirs = bytearray(datagram), bytearray(datagram)
    rules = policy(check, admitted)
    expected = decapsulate(memoryview(mine), sender=(outer, port), table=FIB, policy=rules)
    lib.tundp_decapsulate(
        NATIVE_FIB.struct,
        native_policy(rules),
        ffi.from_buffer("uint8_t[]", theirs),
        len(theirs),
        outer,
        port,
        VERDICT,
    )
    assert_same(expected, mine, theirs)
    if isinstance(expected, Deliver):
        assert VERDICT.len == len(expected.packet)
        assert bool(VERDICT.source_matches) is expected.source_matches
        assert bool(VERDICT.destination_matches) is expected.destination_matches
    return expected


def assert_same(
    expected: Deliver | Drop | Forward[NextHop] | Reply, mine: bytearray, theirs: bytearray
) -> None:
    assert mine == theirs
    match expected:
        case Forward():
            assert VERDICT.kind == lib.TUNDP_FORWARD
        case Deliver():
            assert VERDICT.kind == lib.TUNDP_DELIVER
            assert VERDICT.echo_len == expected.echo_len
            assert VERDICT.peer_len == expected.peer_len
        case Reply(reason, packet):
            assert (VERDICT.kind, VERDICT.reason) == (lib.TUNDP_REPLY, reason)
            assert ffi.buffer(VERDICT.reply, VERDICT.reply_len)[:] == packet
        case Drop(reason):
            assert (VERDICT.kind, VERDICT.reason) == (lib.TUNDP_DROP, reason)


def sent_by_c(packet: bytearray) -> list[bytes]:
    """The datagrams the engine would send for the forward verdict at hand."""
    if not VERDICT.fragment_mtu:
        return [bytes(packet[: VERDICT.len])]
    out = ffi.new("uint8_t[]", VERDICT.fragment_mtu)
    out_len = ffi.new("size_t *")
    sent, taken = [], 0
    while piece := lib.tundp_fragment(
        ffi.from_buffer("uint8_t[]", packet), VERDICT.fragment_mtu, taken, out, out_len
    ):
        sent.append(ffi.buffer(out, out_len[0])[:])
        taken += piece
    return sent


def build(
    rng: random.Random,
    *,
    payload_len: int,
    options: bytes = b"",
    fix_checksum: bool = True,
    trailing: int = 0,
) -> bytes:
    payload = rng.randbytes(payload_len)
    if rng.random() < 0.3:
        payload = (rng.randbytes(2) + PORT.to_bytes(2, "big") + payload)[:payload_len]
    packet = bytearray(
        ipv4(
            payload,
            rng.choice((1, 6, 17, 253)),
            source=rng.choice(ADDRESSES),
            destination=rng.choice(ADDRESSES),
            ttl=rng.choice((0, 1, 2, 64, 255)),
            tos=rng.randrange(256),
            ident=rng.getrandbits(16),
            frag=rng.choice((0, 0x4000, 0x2000, 0x2001, 0x0005, 0x8000, 0xFFFF)),
            ip_options=options,
        )
        + rng.randbytes(trailing)
    )
    if not fix_checksum:
        packet[10] ^= 1 << rng.randrange(8)
    return bytes(packet)


def test_tables_are_one() -> None:
    for reason in DropReason:
        assert getattr(lib, f"TUNDP_DROP_{reason.name}") == reason
    assert len(DropReason) == lib.TUNDP_DROP_COUNT
    assert [check.value for check in SourceCheck] == ["off", "count", "enforce"]
    assert (lib.TUNDP_SOURCE_OFF, lib.TUNDP_SOURCE_COUNT, lib.TUNDP_SOURCE_ENFORCE) == (0, 1, 2)


@pytest.mark.parametrize("seed", range(40))
def test_well_formed_and_nearly_well_formed_packets(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(150):
        option_len = rng.choice((0, 0, 0, 4, 12, 40))
        packet = build(
            rng,
            payload_len=rng.choice((0, 1, 7, 8, 9, 40, 500, 556, 557, 1452, 5000)),
            options=rng.choice((bytes, rng.randbytes))(option_len),
            fix_checksum=rng.random() < 0.9,
            trailing=rng.choice((0, 0, 1, 30)),
        )
        packet = packet[: rng.choice((len(packet), len(packet), rng.randrange(len(packet) + 1)))]
        assert_same_encap(packet)
        for check in SourceCheck:
            outer = rng.choice((PEER, NARROW_PEER, 0xC0000263))
            admitted = ADMITTED[: rng.randrange(3)]
            assert_same_decap(packet, outer, check, rng.choice((PORT, PORT, 40000)), admitted)


@pytest.mark.parametrize("check", SourceCheck)
def test_answers_to_what_measures_paths(check: SourceCheck) -> None:
    for name, case in echo_replies.cases("10.5.3.0", "10.5.3.9", "10.5.1.9").items():
        verdict = assert_same_decap(case.datagram, PEER, check)
        assert isinstance(verdict, Deliver) is not case.is_dropped, name
        if isinstance(verdict, Deliver):
            handed_over = bytes(verdict.packet[: verdict.echo_len])
            assert handed_over == (case.head if case.is_handed_over else b""), name


@pytest.mark.parametrize("check", SourceCheck)
def test_messages_of_other_nodes(check: SourceCheck) -> None:
    for name, case in peer_packets.cases("10.5.3.0", "10.5.3.9", "10.5.1.9").items():
        for outer, port in ((PEER, PORT), (PEER, 40000), (NARROW_PEER, PORT), (0xC0000263, PORT)):
            verdict = assert_same_decap(case.datagram, outer, check, port)
            if isinstance(verdict, Deliver):
                is_leased = (outer, port) == (PEER, PORT)
                handed_over = bytes(verdict.packet[: verdict.peer_len])
                assert handed_over == (case.copy if is_leased else b""), name
            else:
                assert case.is_dropped or check is SourceCheck.ENFORCE, name


@given(
    st.sampled_from(["a message", "a refusal", "a refusal with both"]),
    st.integers(0, 160),
    st.integers(0, 255),
    st.booleans(),
    st.sampled_from(SourceCheck),
)
@settings(max_examples=500, deadline=None)
def test_what_is_nearly_a_message(
    name: str, at: int, value: int, is_cut: bool, check: SourceCheck
) -> None:
    packet = bytearray(peer_packets.cases("10.5.3.0", "10.5.3.9", "10.5.1.9")[name].datagram)
    packet[at % len(packet)] = value
    if is_cut:
        packet[2:4] = min(len(packet), at).to_bytes(2, "big")
    header_len = (packet[0] & 0xF) * 4
    if 20 <= header_len <= len(packet):
        packet[10:12] = b"\0\0"
        packet[10:12] = internet_checksum(packet[:header_len]).to_bytes(2, "big")
    assert_same_decap(bytes(packet), PEER, check)


@given(st.integers(0, 3), st.integers(0, 1), st.integers(0, 40), st.sampled_from([0, 1, 0x2000]))
def test_what_is_nearly_an_answer(kind: int, off_by: int, payload_len: int, frag: int) -> None:
    packet = icmp_echo(
        bytes(payload_len),
        kind=kind,
        echo_id=ECHO_ID + off_by,
        frag=frag,
        source="10.5.1.9",
        destination="10.5.3.0",
    )
    verdict = assert_same_decap(packet, PEER, SourceCheck.OFF)
    assert isinstance(verdict, Deliver)
    is_one = not kind and not off_by and payload_len >= 16 and frag != 1
    assert verdict.echo_len == (44 if is_one else 0)


def test_without_an_identifier_nothing_is_an_answer() -> None:
    """Native: NO_ECHO_ID, which no 16-bit identifier is equal to."""
    for echo_id in (0, 0xFFFF):
        packet = bytearray(
            icmp_echo(bytes(16), kind=0, echo_id=echo_id, source="10.5.1.9", destination="10.5.3.0")
        )
        rules = Policy(tun_address=TUNNEL, source_check=SourceCheck.OFF, port=PORT)
        again = memoryview(bytearray(packet))
        verdict = decapsulate(again, sender=(PEER, PORT), table=FIB, policy=rules)
        assert isinstance(verdict, Deliver)
        assert verdict.echo_len == 0
        lib.tundp_decapsulate(
            NATIVE_FIB.struct,
            native_policy(rules),
            ffi.from_buffer("uint8_t[]", packet),
            len(packet),
            PEER,
            PORT,
            VERDICT,
        )
        assert (VERDICT.kind, VERDICT.echo_len) == (lib.TUNDP_DELIVER, 0)


@given(st.binary(max_size=120), st.integers(0, 2**32 - 1), st.sampled_from(SourceCheck))
@settings(max_examples=500, deadline=None)
def test_any_bytes(data: bytes, outer: int, check: SourceCheck) -> None:
    assert_same_encap(data)
    assert_same_decap(data, outer, check)


@given(
    st.integers(0, 1480), st.sampled_from([0, 0x4000, 0x2001]), st.integers(68, 1600), st.booleans()
)
@settings(max_examples=400, deadline=None)
def test_a_forwarded_packet_whose_path_is_narrower(
    payload_len: int, flags: int, mtu: int, is_known: bool
) -> None:
    packet = bytearray(
        ipv4(
            random.Random(payload_len).randbytes(payload_len),
            17,
            frag=flags,
            source=ADDRESSES[6],
            destination=ADDRESSES[0],
        )
    )
    original = bytes(packet)
    how: dict[str, Any] = {"lookup": FIB.lookup, "tun_address": TUNNEL}
    forwarded = encapsulate(memoryview(packet), path_mtu=lambda _: 0xFFFF, **how)
    assert isinstance(forwarded, Forward)
    kept = bytes(packet)
    limit = mtu if is_known else None
    expected = narrow(memoryview(packet), hop=forwarded.hop, mtu=limit, tun_address=TUNNEL)
    assert packet == kept
    # The verdict it would have had, had the path been known before.
    again = bytearray(original)
    wanted = encapsulate(memoryview(again), path_mtu=lambda _: limit or 0xFFFF, **how)
    if isinstance(wanted, Forward):
        assert isinstance(expected, Forward)
        assert [*map(bytes, expected.packets)] == [*map(bytes, wanted.packets)]
    else:
        assert expected == wanted
    lib.tundp_narrow(
        native_policy(policy(SourceCheck.OFF)),
        ffi.from_buffer("uint8_t[]", packet),
        FIB.index(ADDRESSES[0]),
        limit or 0,
        VERDICT,
    )
    assert_same(expected, packet, packet)
    if isinstance(expected, Forward):
        assert sent_by_c(packet) == [*map(bytes, expected.packets)]


def test_ttl_restored_for_every_checksum() -> None:
    for value in range(0x10000):
        lowered = checksum.after_ttl_decrement(value)
        restored = checksum.before_ttl_decrement(lowered)
        assert restored == value or (value, restored) == (0xFFFF, 0)
        assert lib.tundp_checksum_before_ttl_decrement(lowered) == restored


OWN_SUBNET = IPv4Network("10.5.3.0/24")
OWN_ADDRESSES = {int(IPv4Address(text)) for text in ("192.0.2.1", "198.51.100.1")}
BROADCASTS = {int(IPv4Address(text)) for text in ("192.0.2.255", "198.51.100.255")}
EDGES = [
    edge + step
    for edge in (
        int(OWN_SUBNET.network_address),
        int(OWN_SUBNET.broadcast_address),
        *OWN_ADDRESSES,
        *BROADCASTS,
        PEER,
        0,
        2**32 - 1,
    )
    for step in (-1, 0, 1)
    if 0 <= edge + step < 2**32
]
anywhere = st.one_of(
    st.integers(int(OWN_SUBNET[0]), int(OWN_SUBNET[-1])),
    st.sampled_from([*EDGES, *ADDRESSES]),
    st.integers(0x0A050000, 0x0A05FFFF),
    st.integers(0, 2**32 - 1),
)


@given(
    destination=anywhere,
    source=st.sampled_from([ADDRESSES[0], ADDRESSES[1], ADDRESSES[4], PEER, 0xCB007107]),
    outer=st.sampled_from([PEER, NARROW_PEER, 0xC0000263]),
    port=st.sampled_from([PORT, PORT, 40000]),
    to_port=st.sampled_from([53, PORT]),
    ttl=st.sampled_from([0, 1, 2, 64]),
    check=st.sampled_from(SourceCheck),
)
@settings(max_examples=1500, deadline=None)
def test_sender_and_destination(
    destination: int, source: int, outer: int, port: int, to_port: int, ttl: int, check: SourceCheck
) -> None:
    payload = struct.pack("!HHHH", 53, to_port, 8, 0)
    datagram = ipv4(payload, 17, source=source, destination=destination, frag=0, ttl=ttl)
    verdict = assert_same_decap(datagram, outer, check, port)
    # Not by asking the FIB: what `own` and the others mean is said here once more.
    is_own = IPv4Address(destination) in OWN_SUBNET or destination in OWN_ADDRESSES
    top = destination >> 24
    is_martian = top in (0, 127) or 224 <= top < 240 or destination == 2**32 - 1
    is_node = destination in {*OWN_ADDRESSES, TUNNEL, PEER, NARROW_PEER}
    senders = {ADDRESSES[0]: {PEER}, ADDRESSES[1]: {NARROW_PEER}, PEER: {PEER}}
    senders[0xCB007107] = {PEER, NARROW_PEER}  # in no lease, but admitted
    is_sender = outer in senders.get(source, set())
    is_admitted = is_sender and port == PORT
    if is_martian or destination in BROADCASTS:
        assert verdict == Drop(DropReason.MARTIAN_DESTINATION)
    elif is_node and to_port == PORT:
        assert verdict == Drop(DropReason.TUNNEL_IN_TUNNEL)
    elif check is SourceCheck.ENFORCE and not is_sender:
        assert verdict == Drop(DropReason.SOURCE_MISMATCH)
    elif check is SourceCheck.ENFORCE and not is_admitted:
        assert verdict == Drop(DropReason.SOURCE_PORT_MISMATCH)
    elif check is SourceCheck.ENFORCE and not is_own:
        assert verdict == Drop(DropReason.DESTINATION_MISMATCH)
    elif ttl <= 1:
        assert not isinstance(verdict, Deliver)
        assert verdict.reason is DropReason.HOP_LIMIT_EXCEEDED
    else:
        assert isinstance(verdict, Deliver)
        is_off = check is SourceCheck.OFF
        assert verdict.source_matches is (is_off or is_admitted)
        assert verdict.destination_matches is (is_off or is_own)


@given(
    st.lists(
        st.sampled_from([b"\x00", b"\x01", b"\x82\x04ab", b"\x07\x03x", b"\x83\x03y", b"\x94\x00"]),
        max_size=8,
    ).map(b"".join),
    st.integers(0, 9000),
    st.integers(68, 1500),
    st.sampled_from([0, 0x2000, 0x00B9, 0x20B9]),
)
@settings(max_examples=400, deadline=None)
def test_fragments_of_anything(
    options: bytes, payload_len: int, mtu: int, flags_offset: int
) -> None:
    options = (options + bytes(-len(options) % 4))[:40]
    packet = bytearray(
        ipv4(
            random.Random(payload_len).randbytes(payload_len),
            17,
            source=ADDRESSES[0],
            destination=ADDRESSES[1],
            ttl=9,
            frag=flags_offset,
            ip_options=options,
        )
    )
    header = ip.parse(memoryview(packet))
    assert not isinstance(header, DropReason)
    VERDICT.fragment_mtu = mtu
    assert sent_by_c(packet) == fragment.fragment(memoryview(packet), header, mtu)


@given(
    st.lists(st.integers(0, 60_000_000), max_size=300),
    st.integers(1, 10**15),
    st.sampled_from([ICMP_RATE_PER_S, ICMP_WIRE_RATE_PER_S]),
)
@settings(max_examples=200, deadline=None)
def test_token_buckets_agree(gaps: list[int], start: int, rate: int) -> None:
    full_at_ns = ffi.new("uint64_t *")
    bucket = TokenBucket(rate_per_s=rate, burst=ICMP_BURST)
    now = start
    for gap in gaps:
        now += gap
        assert bool(lib.tundp_may_reply(full_at_ns, rate, now)) is bucket.take(now)


def test_struct_sizes_are_what_numpy_thinks() -> None:
    assert ffi.sizeof("struct tundp_hop") == FIB.hop_array.dtype.itemsize
    hop = ffi.from_buffer("struct tundp_hop[]", FIB.hop_array)
    for index, mine in enumerate(FIB.hops):
        if mine is not None:
            port = 0 if mine.is_local else 8285
            assert (hop[index].address, hop[index].port) == (mine.address, port)
            assert bool(hop[index].flags & lib.TUNDP_HOP_LOCAL) is mine.is_local
    assert struct.calcsize("=IHH") == 8
