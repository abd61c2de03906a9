"""Any bytes through the wire rules; fragments put together again; header sums by a slow sum."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.packets import MF, header_len, ipv4, slow_sum
from tundp.wire import fragment, ip
from tundp.wire.drop import DropReason
from tundp.wire.encap import Deliver, Drop, Forward, Reply, SourceCheck, decapsulate, encapsulate
from tundp.wire.policy import Policy
from tundp.wire.ratelimit import TokenBucket

SETTINGS = settings(max_examples=200, deadline=None)
TUNNEL = 0x0A050100


@dataclass(frozen=True)
class Hop:
    is_local: bool


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """Valid packets with now and then one field made wild, and bytes behind them."""
    options = draw(st.binary(max_size=40))
    options = options[: len(options) // 4 * 4]
    payload = draw(st.binary(max_size=120))
    if draw(st.booleans()):
        payload = payload[:2] + b"\x20\x5d" + payload[2:]
    data = bytearray(
        struct.pack(
            "!BBHHHBBHII",
            0x45 + len(options) // 4,
            draw(st.integers(0, 255)),
            20 + len(options) + len(payload),
            draw(st.integers(0, 0xFFFF)),
            draw(st.sampled_from([0, 0x4000, 0x2000, 0x0003, 0x2001, 0x8000, 0x1FFF])),
            draw(st.sampled_from([0, 1, 2, 64, 255])),
            draw(st.sampled_from([1, 6, 17, 255])),
            0,
            draw(st.sampled_from([0x0A050102, 0, 0x7F000001, 0xE0000001, 0xFFFFFFFF])),
            draw(st.sampled_from([0x0A050202, 0x0A050101, 0x0A050909, 0xE0000001, 0xFFFFFFFF])),
        )
        + options
        + payload
    )
    if draw(st.integers(0, 4)) == 0:
        data[draw(st.integers(0, 19))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 9)):
        length = min(header_len(data), len(data))
        data[10:12] = b"\x00\x00"
        data[10:12] = (~slow_sum(bytes(data[:length])) & 0xFFFF).to_bytes(2, "big")
    data += draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data)


@dataclass
class Answers:
    """An AddressTable that answers the same whatever the address."""

    own: list[bool]
    """For the destination and the source; asked from its end on."""
    node: bool
    sender: tuple[int, int] | None

    def is_own(self, address: int) -> bool:
        return self.own.pop()

    def is_broadcast(self, address: int) -> bool:
        return False

    def is_node(self, address: int) -> bool:
        return self.node

    def holder(self, address: int) -> tuple[int, int] | None:
        return self.sender

    def peer(self, address: int) -> tuple[int, int] | None:
        return None


ANY = st.one_of(st.binary(max_size=120), packets(), packets())


def is_unicast(address: bytes) -> bool:
    """No multicast and not 255.255.255.255; 240/4 is as good as any, as for the kernel."""
    return not 224 <= address[0] < 240 and address != b"\xff\xff\xff\xff"


def is_for_8285(packet: bytes) -> bool:
    """A datagram, whole or a first fragment, to port 8285."""
    length = header_len(packet)
    is_first = not int.from_bytes(packet[6:8], "big") & 0x1FFF
    end = int.from_bytes(packet[2:4], "big")
    return packet[9] == 17 and is_first and packet[length + 2 : min(end, length + 4)] == b"\x20\x5d"


def check_reply(verdict: Reply, original: bytes) -> None:
    """A reply is a whole IPv4 packet about the real bytes of the offender."""
    reply = verdict.packet
    assert reply[0] == 0x45
    assert int.from_bytes(reply[2:4], "big") == len(reply) <= 576
    assert slow_sum(reply[:20]) == 0xFFFF
    assert slow_sum(reply[20:]) == 0xFFFF
    assert reply[9] == 1
    assert reply[12:16] == TUNNEL.to_bytes(4, "big")
    assert reply[16:20] == original[12:16], "it goes to the inner source"
    assert (reply[20], reply[21]) in ((3, 0), (3, 4), (11, 0))
    total_len = int.from_bytes(original[2:4], "big")
    assert original[:total_len].startswith(reply[28:])
    assert len(reply) - 28 >= min(total_len, header_len(original) + 8)
    assert is_unicast(original[16:20]), "never about multicast"
    assert original[12] not in (0, 127)
    assert is_unicast(original[12:16])
    assert int.from_bytes(original[6:8], "big") & 0x1FFF == 0


def check_lowered(sent: bytes, original: bytes) -> None:
    """One hop later: the TTL one less, the sum still right, all else the same."""
    assert sent[8] == original[8] - 1
    assert slow_sum(sent[: header_len(sent)]) == 0xFFFF
    assert sent[:8] == original[:8]
    assert sent[9] == original[9]
    assert sent[12:] == original[12 : len(sent)]
    assert len(sent) == int.from_bytes(original[2:4], "big")


@SETTINGS
@given(ANY)
def test_parse_never_raises_and_says_what_the_bytes_say(data: bytes) -> None:
    header = ip.parse(memoryview(data))
    if isinstance(header, DropReason):
        assert header <= DropReason.BAD_HEADER_CHECKSUM
        return
    assert data[0] >> 4 == 4
    assert 20 <= header.header_len <= header.total_len <= len(data)
    assert slow_sum(data[: header.header_len]) == 0xFFFF
    assert header.source == int.from_bytes(data[12:16], "big")
    assert header.destination == int.from_bytes(data[16:20], "big")


@SETTINGS
@given(
    data=ANY,
    route=st.sampled_from([None, Hop(is_local=True), Hop(is_local=False), Hop(is_local=False)]),
    mtu=st.sampled_from([68, 76, 100, 1472, 65507]),
)
def test_encapsulate_gives_one_consistent_verdict_for_any_bytes(
    data: bytes, route: Hop | None, mtu: int
) -> None:
    buffer = bytearray(data)
    verdict = encapsulate(
        memoryview(buffer),
        lookup=lambda address: route,
        path_mtu=lambda hop: mtu,
        tun_address=TUNNEL,
    )
    parsed = ip.parse(memoryview(data))
    match verdict:
        case Forward(hop, sent):
            assert hop is route
            assert not hop.is_local
            assert all(len(piece) <= mtu for piece in sent)
            if len(sent) == 1:
                check_lowered(bytes(sent[0]), data)
            for piece in sent:
                assert slow_sum(bytes(piece[: header_len(bytes(piece))])) == 0xFFFF
                assert piece[8] == data[8] - 1
                assert int.from_bytes(piece[2:4], "big") == len(piece)
        case Reply(reason):
            assert reason in (
                DropReason.NO_ROUTE,
                DropReason.OWN_SUBNET,
                DropReason.HOP_LIMIT_EXCEEDED,
                DropReason.TOO_BIG,
            )
            check_reply(verdict, data)
            assert buffer == data
        case Drop(reason):
            assert reason not in (DropReason.SOURCE_MISMATCH, DropReason.MARTIAN_SOURCE)
            assert buffer == data
            if isinstance(parsed, DropReason):
                assert reason is parsed
        case _:
            raise AssertionError(verdict)
    if isinstance(parsed, DropReason):
        assert verdict == Drop(parsed)
    elif route is None or route.is_local:
        expected = DropReason.NO_ROUTE if route is None else DropReason.OWN_SUBNET
        assert isinstance(verdict, Reply | Drop)
        assert verdict.reason is expected
    elif parsed.ttl <= 1:
        assert isinstance(verdict, Reply | Drop)
        assert verdict.reason is DropReason.HOP_LIMIT_EXCEEDED
    else:
        assert isinstance(verdict, Forward) or verdict.reason is DropReason.TOO_BIG


@SETTINGS
@given(
    data=ANY,
    ours=st.sampled_from([False, False, True]),
    for_us=st.booleans(),
    admitted=st.booleans(),
    is_node=st.booleans(),
    check=st.sampled_from(SourceCheck),
)
def test_decapsulate_gives_one_consistent_verdict_for_any_bytes(
    data: bytes, ours: bool, for_us: bool, admitted: bool, is_node: bool, check: SourceCheck
) -> None:
    buffer = bytearray(data)
    sender = (0xC0000207, 8285)
    table = Answers([for_us, ours], node=is_node, sender=sender if admitted else None)
    verdict = decapsulate(
        memoryview(buffer),
        sender=sender,
        table=table,
        policy=Policy(tun_address=TUNNEL, source_check=check, port=8285),
    )
    parsed = ip.parse(memoryview(data))
    if isinstance(parsed, DropReason):
        assert verdict == Drop(parsed)
    elif ours or data[12] in (0, 127) or not is_unicast(data[12:16]):
        assert verdict == Drop(DropReason.MARTIAN_SOURCE)
    elif data[16] in (0, 127) or not is_unicast(data[16:20]):
        assert verdict == Drop(DropReason.MARTIAN_DESTINATION)
    elif is_for_8285(data) and (is_node or parsed.destination == TUNNEL):
        assert verdict == Drop(DropReason.TUNNEL_IN_TUNNEL)
    elif check is SourceCheck.ENFORCE and not admitted:
        assert verdict == Drop(DropReason.SOURCE_MISMATCH)
    elif check is SourceCheck.ENFORCE and not for_us:
        assert verdict == Drop(DropReason.DESTINATION_MISMATCH)
    elif parsed.ttl <= 1:
        assert isinstance(verdict, Reply | Drop)
        assert verdict.reason is DropReason.HOP_LIMIT_EXCEEDED
    else:
        assert isinstance(verdict, Deliver)
        assert verdict.source_matches is (admitted or check is SourceCheck.OFF)
        assert verdict.destination_matches is (for_us or check is SourceCheck.OFF)
        check_lowered(bytes(verdict.packet), data)
    if isinstance(verdict, Reply):
        check_reply(verdict, data)
    if not isinstance(verdict, Deliver):
        assert buffer == data


@SETTINGS
@given(
    payload=st.one_of(
        st.binary(min_size=1, max_size=600), st.integers(1, 9000).map(lambda n: bytes(n))
    ),
    options=st.binary(max_size=40).map(lambda raw: raw[: len(raw) // 4 * 4]),
    mtu=st.one_of(st.integers(68, 200), st.integers(68, 65507)),
    offset=st.integers(0, 6000),
    more=st.booleans(),
)
@example(payload=b"x" * 9, options=b"\x01" * 40, mtu=68, offset=0, more=False)
def test_fragments_reassemble(
    payload: bytes, options: bytes, mtu: int, offset: int, more: bool
) -> None:
    packet = ipv4(
        payload,
        17,
        source=0x0A050102,
        destination=0x0A050202,
        ttl=9,
        ident=77,
        frag=offset | (MF if more else 0),
        ip_options=options,
    )
    header = ip.parse(memoryview(packet))
    assert not isinstance(header, DropReason)
    pieces = fragment.fragment(memoryview(packet), header, mtu)
    assert pieces
    data = b""
    for number, piece in enumerate(pieces):
        parsed = ip.parse(memoryview(piece))
        assert not isinstance(parsed, DropReason)
        assert parsed.total_len == len(piece) <= mtu
        assert parsed.fragment_offset * 8 == offset * 8 + len(data)
        last = number == len(pieces) - 1
        assert bool(parsed.flags_offset & MF) is (more or not last)
        assert last or (len(piece) - parsed.header_len) % 8 == 0
        assert (parsed.source, parsed.destination) == (header.source, header.destination)
        assert (parsed.identification, parsed.ttl, parsed.ip_proto) == (77, 9, 17)
        data += piece[parsed.header_len :]
    assert data == payload
    assert pieces[0][20 : header_len(pieces[0])] == options
    assert not any(len(piece) > len(packet) for piece in pieces)


@SETTINGS
@given(st.binary(max_size=40))
def test_copied_options_are_whole_words_and_no_longer(options: bytes) -> None:
    copied = fragment.copied_options(options)
    assert len(copied) % 4 == 0
    assert len(copied) <= len(options) + 3
    assert fragment.copied_options(copied) == copied


@SETTINGS
@given(
    rate=st.integers(1, 5000),
    burst=st.integers(1, 100),
    steps=st.lists(st.integers(-(10**9), 10**9), max_size=100),
)
def test_bucket_never_grants_more_than_burst_and_rate(
    rate: int, burst: int, steps: list[Any]
) -> None:
    bucket = TokenBucket(rate_per_s=rate, burst=burst)
    cost = 10**9 // rate
    now = forward = granted = 0
    for step in steps:
        now += step
        forward += max(0, step)
        granted += bucket.take(now)
        assert granted * cost <= burst * cost + forward
