"""Echo requests that measure paths, and the replies to them, against scapy."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP

from tundp.wire import echo

COOKIE = bytes(range(16))
SOURCE, DESTINATION = 0x0A050100, 0x0A050200


def request(size: int) -> bytes:
    return echo.build_request(
        size, source=SOURCE, destination=DESTINATION, identifier=0xBEEF, cookie=COOKIE
    )


@pytest.mark.parametrize("size", [echo.MIN_REQUEST_LEN, 45, 552, 1472, 65507])
def test_a_request_is_what_scapy_would_send(size: int) -> None:
    sent = IP(request(size))
    assert (len(bytes(sent)), sent.len) == (size, size)
    assert (sent.src, sent.dst, sent.proto) == ("10.5.1.0", "10.5.2.0", 1)
    assert (sent[ICMP].type, sent[ICMP].code, sent[ICMP].id) == (8, 0, 0xBEEF)
    assert bytes(sent[ICMP].payload)[:16] == COOKIE
    again = IP(bytes(sent))
    del again.chksum, again[ICMP].chksum
    assert bytes(again) == bytes(sent), "both checksums"


@pytest.mark.parametrize(("size", "cookie"), [(43, COOKIE), (100, b""), (100, COOKIE + b"x")])
def test_a_request_that_cannot_be_is_an_error(size: int, cookie: bytes) -> None:
    with pytest.raises(ValueError, match="echo request"):
        echo.build_request(size, source=1, destination=2, identifier=3, cookie=cookie)


@pytest.mark.parametrize("options", [b"", bytes(8)])
def test_a_reply_is_read(options: bytes) -> None:
    packet = bytes(
        IP(src="10.5.2.0", dst="10.5.1.0", options=options and [b"\x01"] * len(options))
        / ICMP(type=0, id=0xBEEF)
        / (COOKIE + bytes(50))
    )
    head = packet[: 20 + len(options) + 8 + 16]
    for whole_or_head in (packet, head):
        assert echo.read_reply(whole_or_head) == echo.EchoReply(DESTINATION, 0xBEEF, COOKIE)
    assert echo.read_reply(head[:-1]) is None


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        bytes(43),
        bytes(200),
        b"\x45" + bytes(42),
        b"\x4f" + bytes(60),
        request(100),
        bytes(IP() / ICMP(type=3) / (COOKIE + bytes(50))),
        bytes(IP() / ICMP(type=0, code=1) / (COOKIE + bytes(50))),
    ],
    ids=repr,
)
def test_what_is_no_reply(packet: bytes) -> None:
    assert echo.read_reply(packet) is None
