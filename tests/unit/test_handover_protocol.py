"""The bytes of a handover: what is sent is read back, and anything else is refused by name."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tundp.daemon.handover.protocol import (
    FDS_MAX,
    MESSAGE_MAX,
    Attached,
    BadMessage,
    Decoder,
    Gone,
    HeldLease,
    Message,
    Node,
    Offer,
    Paused,
    Ready,
    Refuse,
    Withdrawn,
    close_all,
    encode,
    read_counters,
    read_hello,
    receive_with_fds,
    send_offer,
    write_counters,
)
from tundp.engine.counters import Counters

LEASE = HeldLease(
    key="10.5.2.0-24",
    value='{"PublicIP":"192.0.2.2","BackendType":"udp","Other":"\\u0007"}',
    revision=7,
    is_held=True,
    is_reservation=False,
    expires_in_s=3.5,
)
OFFER = Offer(
    version="0.2.0",
    pid=77,
    node=Node(node_id="n", host="h", run="r"),
    network_config='{"Network": "10.5.0.0/16"}\n',
    firewall="iptables",
    firewall_memory="{}",
    lease=LEASE,
    counters=write_counters(Counters()),
    notify_socket="@a",
    watchdog_usec="",
    fd_store="512",
    names=("tun-0", "lock"),
)
MESSAGES: tuple[Message, ...] = (
    OFFER,
    Ready(),
    Refuse(why="no"),
    Paused(counters="", lease=LEASE, since_ns=5),
    Attached(gap_ns=9),
    Gone(),
    Withdrawn(why="so", may_try_again=True),
)


def frame(text: bytes) -> bytes:
    return struct.pack("!I", len(text)) + text


def decoded(data: bytes) -> Message | None:
    decoder = Decoder()
    decoder.feed(data)
    return decoder.next()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: type(each).__name__)
def test_a_message_is_read_back_however_it_is_cut(message: Message) -> None:
    decoder = Decoder()
    data = encode(message) * 2
    found = []
    for byte in data:
        decoder.feed(bytes([byte]))
        while (each := decoder.next()) is not None:
            found.append(each)
    assert found == [message, message]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack("!I", MESSAGE_MAX + 1), f"{MESSAGE_MAX} are the most"),
        (frame(b"\xff\xfe"), "no JSON object"),
        (frame(b"[1]"), "no JSON object"),
        (frame(b"[" * 100_000), "no JSON object"),
        (frame(b"{}"), "unknown type 'None'"),
        (frame(b'{"type": "hail"}'), "unknown type 'hail'"),
        (frame(b'{"type": ["offer"]}'), "unknown type"),
        (frame(b'{"type": "refuse"}'), "why is missing"),
        (frame(b'{"type": "refuse", "why": 3}'), "why is not of type string"),
        (frame(b'{"type": "attached", "gap_ns": true}'), "gap_ns is not of type integer"),
    ],
)
def test_anything_else_is_refused_by_name(data: bytes, why: str) -> None:
    with pytest.raises(BadMessage, match=why):
        decoded(data)


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    decoder = Decoder()
    for part in (data, frame(data)):
        decoder.feed(part)
        try:
            while decoder.next() is not None:
                pass
        except BadMessage:
            return


def test_more_descriptors_than_allowed_are_refused() -> None:
    document = json.loads(encode(OFFER)[4:]) | {"names": ["x"] * (FDS_MAX + 1)}
    with pytest.raises(BadMessage, match=f"{FDS_MAX} are the most"):
        decoded(frame(json.dumps(document).encode()))


def test_a_hello_is_read_or_refused() -> None:
    assert read_hello({"schema": 1, "version": "x", "subnet_file": "/a"}).subnet_file == "/a"
    documents: list[Any] = [None, [], {"schema": "1"}, {"schema": 1, "version": "x"}]
    for document in documents:
        with pytest.raises(BadMessage):
            read_hello(document)


def test_counters_are_read_back() -> None:
    counters = Counters(icmp_to_tun=3, errnos={"ENOBUFS": 4})
    counters.encap.packets_in = 2**63
    counters.decap.drops[1] = 5
    counters.decap.latency[2] = 6
    counters.coalesce_misses[0] = 7
    assert read_counters(write_counters(counters)) == counters


def test_counters_of_another_version_are_read_as_far_as_they_are_known() -> None:
    counters = Counters(wakeups=7)
    counters.encap.packets_in = 5
    document = json.loads(write_counters(counters))
    document["of_the_future"] = 3
    document["encap"]["drops"]["of_the_future"] = 2
    del document["spins"], document["decap"]["reads"]
    assert read_counters(json.dumps(document)) == counters


@pytest.mark.parametrize(
    ("change", "value"),
    [("encap", None), ("wakeups", "x"), ("errnos", []), ("decap", {"drops": 1})],
)
def test_counters_that_are_broken_are_refused(change: str, value: object) -> None:
    document = json.loads(write_counters(Counters())) | {change: value}
    with pytest.raises(BadMessage, match="its counters"):
        read_counters(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_counters_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BadMessage, match="its counters"):
        read_counters(text)


def test_a_lease_that_is_none_is_refused() -> None:
    assert str(LEASE.lease().key) == LEASE.key
    for change in ({"key": "x"}, {"value": "{"}):
        document = json.loads(encode(Paused(counters="", lease=LEASE, since_ns=0))[4:])
        document["lease"] |= change
        message = decoded(frame(json.dumps(document).encode()))
        assert isinstance(message, Paused)
        with pytest.raises(BadMessage, match="its lease"):
            message.lease.lease()


def test_descriptors_come_with_the_offer_and_the_kernel_says_from_whom(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    reading, writing = os.pipe()
    try:
        send_offer(ours, OFFER, [reading, writing])
        received = receive_with_fds(theirs, 1 << 16)
        assert decoded(received.data) == OFFER
        assert received.pid == os.getpid()
        os.write(received.fds[1], b"x")
        assert os.read(reading, 1) == b"x"
        assert not any(map(os.get_inheritable, received.fds))
        close_all([*received.fds, received.fds[0]])
    finally:
        close_all([reading, writing])


def test_too_many_descriptors_are_closed_and_refused(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    before = sorted(os.listdir("/proc/self/fd"))
    socket.send_fds(ours, [b"x"], [0] * (FDS_MAX + 20))
    with pytest.raises(BadMessage, match=f"more than {FDS_MAX} descriptors"):
        receive_with_fds(theirs, 100)
    assert sorted(os.listdir("/proc/self/fd")) == before
