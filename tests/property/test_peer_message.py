"""Messages between nodes: what is packed is read again, and no bytes raise but Malformed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packets import ipv4
from tests.peer_packets import PROTO_TALK, cases
from tundp.wire import peer_bodies, peer_message
from tundp.wire.peer_bodies import (
    CAPTURED_MAX,
    Hello,
    PeerRecord,
    ReachEntry,
    Reaches,
    Records,
    TraceStart,
)
from tundp.wire.peer_message import Malformed, Message

u8, u16, u32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
u64 = st.integers(0, 2**64 - 1)
texts = st.text(st.characters(codec="utf-8"), max_size=40)
hellos = st.builds(
    Hello,
    received_ns=u64,
    sent_ns=u64,
    uptime_s=u32,
    mtu=u16,
    port=u16,
    implementation=texts,
    version=texts,
    engine=texts,
)
reaches = st.builds(
    Reaches,
    u32,
    u32,
    st.lists(st.builds(ReachEntry, u32, st.integers(0, 32), u8, u32, u16), max_size=40).map(tuple),
)
records = st.builds(
    PeerRecord,
    sequence=u32,
    time_ns=u64,
    stage=st.integers(1, 4),
    is_dropped=st.booleans(),
    error=u16,
    length=u32,
    packets=u32,
    together=u32,
    gso_size=u16,
    packet_id=u64,
    more_ids=u32,
    worker=u8,
    reason=st.text("abcdefghijklmnopqrstuvwxyz_0123456789", max_size=64),
    packet=st.binary(max_size=CAPTURED_MAX),
)
starts = st.builds(TraceStart, st.integers(1, 60), st.text("a.0(/) ", max_size=900))
PARSERS: list[Callable[[bytes], object]] = [
    peer_bodies.parse_hello,
    peer_bodies.parse_reach,
    peer_bodies.parse_reaches,
    peer_bodies.parse_trace_start,
    peer_bodies.parse_session,
    peer_bodies.parse_trace_next,
    peer_bodies.parse_records,
    peer_bodies.parse_refusal,
]


@given(hellos, reaches, starts, st.lists(records, max_size=5))
def test_what_is_packed_is_read_again(
    hello: Hello, table: Reaches, start: TraceStart, some: list[PeerRecord]
) -> None:
    assert peer_bodies.parse_hello(peer_bodies.pack_hello(hello)) == hello
    assert peer_bodies.parse_reaches(peer_bodies.pack_reaches(table)) == table
    assert peer_bodies.parse_trace_start(peer_bodies.pack_trace_start(start)) == start
    body = peer_bodies.pack_records(7, list(map(peer_bodies.pack_record, some)), more=False)
    assert peer_bodies.parse_records(body) == Records(7, False, tuple(some))


@given(u64, u8, st.integers(0, 127), st.booleans(), st.binary(max_size=1000), st.integers(0, 1500))
def test_a_message_is_read_again_whatever_its_padding(
    nonce: int, version: int, kind: int, is_answer: bool, body: bytes, packet_len: int
) -> None:
    message = Message(nonce, version, kind, is_answer, body)
    packet = peer_message.build(message, source=1, destination=2, packet_len=packet_len)
    assert peer_message.read(packet).message == message
    assert len(packet) == max(packet_len, 36 + len(body))


@pytest.mark.parametrize("parse", PARSERS, ids=lambda each: each.__name__)
@given(data=st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_a_body_or_malformed(parse: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(Malformed):
        parse(data)


@given(
    st.one_of(
        hellos.map(peer_bodies.pack_hello),
        reaches.map(peer_bodies.pack_reaches),
        starts.map(peer_bodies.pack_trace_start),
        st.lists(records, max_size=3).map(
            lambda some: peer_bodies.pack_records(
                0, list(map(peer_bodies.pack_record, some)), more=True
            )
        ),
    ),
    st.data(),
)
@settings(max_examples=500)
def test_mutated_bodies_are_read_or_malformed(body: bytes, data: Any) -> None:
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(u8)
    cut = bytes(changed[: data.draw(st.integers(0, len(changed)))])
    for parse in PARSERS:
        for each in (bytes(changed), cut, bytes(changed) + b"\0"):
            with contextlib.suppress(Malformed):
                parse(each)


@given(st.binary(max_size=100), st.booleans())
@settings(max_examples=500)
def test_any_packet_is_read_or_malformed(data: bytes, is_framed: bool) -> None:
    packet = ipv4(data, PROTO_TALK, source=1, destination=2) if is_framed else data
    with contextlib.suppress(Malformed):
        peer_message.read(packet)


@given(st.sampled_from(sorted(cases("10.5.1.0", "10.5.1.9", "10.5.2.0").items())), st.data())
def test_what_engines_hand_over_is_read_or_malformed(case: Any, data: Any) -> None:
    packet = bytearray(case[1].datagram)
    packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(u8)
    with contextlib.suppress(Malformed):
        peer_message.read(bytes(packet[: data.draw(st.integers(0, len(packet)))]))
