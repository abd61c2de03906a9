"""Messages between nodes, byte by byte, and how long an answer may be."""

from __future__ import annotations

import pytest

from tests.packets import internet_checksum, ipv4
from tests.peer_packets import PROTO_TALK
from tundp.wire import peer_bodies, peer_message
from tundp.wire.peer_bodies import (
    Hello,
    PeerRecord,
    ReachEntry,
    Reaches,
    Records,
    Refusal,
    Refused,
    TraceStart,
)
from tundp.wire.peer_message import Kind, Malformed, Message, answer_max

ONE, TWO = 0x0A050100, 0x0A050200
NONCE = 0x4041424344454647
HELLO = Hello(
    received_ns=0x0102030405060708,
    sent_ns=0x1112131415161718,
    uptime_s=0x21222324,
    mtu=1472,
    port=8285,
    implementation="tundp",
    version="0.2.0",
    engine="gso",
)
HELLO_BYTES = bytes.fromhex(
    "0102030405060708 1112131415161718 21222324 05c0 205d 0005 74756e6470 0005 302e322e30 0003"
    " 67736f"
)
RECORD = PeerRecord(
    sequence=1,
    time_ns=2,
    stage=4,
    is_dropped=True,
    error=22,
    length=84,
    packets=3,
    together=4,
    gso_size=5,
    packet_id=6,
    more_ids=9,
    worker=7,
    reason="tun_rejected",
    packet=b"\x45\x00",
)
RECORD_BYTES = bytes.fromhex(
    "00000001 0000000000000002 04 01 0016 00000054 00000003 00000004 0005"
    " 0000000000000006 00000009 07"
    " 0c 74756e5f72656a6563746564 02 4500"
)


def test_a_question_byte_by_byte() -> None:
    packet = peer_message.build(
        Message(NONCE, 1, Kind.REACH, False, b"\0\0\0\x09"),
        source=ONE,
        destination=TWO,
        packet_len=60,
    )
    head = bytes.fromhex("4500003c 0000 0000 40 fd 0000 0a050100 0a050200".replace(" ", ""))
    checksum = internet_checksum(head).to_bytes(2, "big")
    payload = bytes.fromhex("4041424344454647 74756e64 01 02 0004 00000009") + bytes(20)
    assert packet == head[:10] + checksum + head[12:] + payload
    arrived = peer_message.read(packet)
    assert arrived.message == Message(NONCE, 1, 2, False, b"\0\0\0\x09")
    assert (arrived.source, arrived.destination, arrived.length) == (ONE, TWO, 60)


def test_an_answer_has_the_high_bit_and_no_padding() -> None:
    message = Message(NONCE, 1, Kind.TRACE_NEXT, True, b"abc")
    packet = peer_message.build(message, source=ONE, destination=TWO)
    assert packet[20:] == bytes.fromhex("4041424344454647 74756e64 01 84 0003 616263")
    assert peer_message.read(packet).message == message


def test_a_refusal_of_a_kernel_names_the_question() -> None:
    question = peer_message.build(
        Message(NONCE, 1, Kind.HELLO, False, b""), source=ONE, destination=TWO, packet_len=1200
    )
    error = ipv4(b"\x03\x02" + bytes(6) + question[:28], 1, frag=0, source=TWO, destination=ONE)
    arrived = peer_message.read(error)
    assert (arrived.refused_nonce, arrived.message, arrived.source) == (NONCE, None, TWO)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(15),
        bytes(16),
        bytes.fromhex("4041424344454647 74756e65 01 02 0000"),
        bytes.fromhex("4041424344454647 74756e64 01 02 0005 00000009"),
    ],
)
def test_what_is_no_message(payload: bytes) -> None:
    with pytest.raises(Malformed):
        peer_message.read(ipv4(payload, PROTO_TALK, source=ONE, destination=TWO))


@pytest.mark.parametrize(
    ("question_len", "header_len", "icmp_len"),
    [
        *[(1200, 20, 576), (1500, 20, 576), (548, 20, 576), (547, 20, 575), (120, 20, 148)],
        *[(1200, 60, 576), (500, 60, 568), (60, 60, 128)],
    ],
)
def test_an_answer_leaves_room_for_the_kernels_own(
    question_len: int, header_len: int, icmp_len: int
) -> None:
    """Two datagrams may come of one: with 28 bytes of headers each they are no longer than it."""
    longest = answer_max(question_len, header_len)
    assert (longest + 28) + (icmp_len + 28) == question_len + 28


def test_bodies_byte_by_byte() -> None:
    assert peer_bodies.pack_hello(HELLO) == HELLO_BYTES
    assert peer_bodies.parse_hello(HELLO_BYTES) == HELLO
    reaches = Reaches(300, 5, (ReachEntry(TWO, 24, 1, 250, 1400), ReachEntry(0, 0, 0, 0, 0)))
    data = bytes.fromhex(
        "0000012c 00000005 0a050200 18 01 000000fa 0578 00000000 00 00 00000000 0000"
    )
    assert peer_bodies.pack_reaches(reaches) == data
    assert peer_bodies.parse_reaches(data) == reaches
    assert peer_bodies.pack_trace_start(TraceStart(60, "icmp")) == b"\x00\x3c\x00\x04icmp"
    assert peer_bodies.parse_trace_start(b"\x00\x3c\x00\x04icmp") == TraceStart(60, "icmp")
    assert peer_bodies.pack_trace_next(NONCE, 9) == bytes.fromhex("4041424344454647 00000009")
    assert peer_bodies.pack_record(RECORD) == RECORD_BYTES
    packed = peer_bodies.pack_records(8, [RECORD_BYTES], more=True)
    assert packed == bytes.fromhex("00000008 01") + RECORD_BYTES
    assert peer_bodies.parse_records(packed) == Records(8, True, (RECORD,))
    refusal = Refusal(Refused.UNSUPPORTED, "no")
    assert peer_bodies.pack_refusal(refusal, 100) == b"\x01\x00\x02no"
    assert peer_bodies.parse_refusal(b"\x01\x00\x02no") == refusal


def test_what_is_longer_than_may_be_is_cut_or_refused() -> None:
    long = peer_bodies.pack_refusal(Refusal(2, "\N{SNOWMAN}" * 100), 20)
    assert len(long) <= 20
    assert peer_bodies.parse_refusal(long) == Refusal(2, "\N{SNOWMAN}" * 5)
    with pytest.raises(Malformed, match="a filter of 1001 bytes: at most 1000"):
        peer_bodies.pack_trace_start(TraceStart(60, "a" * 1001))
    for seconds in (0, 61):
        with pytest.raises(Malformed):
            peer_bodies.parse_trace_start(seconds.to_bytes(2, "big") + b"\0\0")
