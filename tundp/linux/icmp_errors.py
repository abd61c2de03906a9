"""The raw socket that receives ICMP errors about our datagrams (RFC 792 type 3), and nothing else.

What they say is shown to operators and decides nothing: anybody can forge one. The sockets that
carry packets are not concerned; an error queue (IP_RECVERR) would make them refuse sends.

It needs CAP_NET_RAW to be opened, and none to be used.
"""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.echo import attach_filter

UNREACHABLE: Final = {
    0: "network unreachable",
    1: "host unreachable",
    2: "protocol unreachable",
    3: "port unreachable",
    9: "network prohibited",
    10: "host prohibited",
    13: "prohibited by a filter",
}
"""ICMP type 3 by code (RFC 792, RFC 1122 3.2.2.1, RFC 1812 5.2.7.1). Too big (4) is no refusal."""
_TYPE: Final = 3
_ICMP_LEN: Final = 8
_MIN_QUOTE_LEN: Final = 28
_RECEIVES: Final = 256
_RECEIVE_BUFFER_LEN: Final = 128 << 10
_LEN: Final = 128
"""Bytes of a message that are read: two IPv4 headers with options and the ports."""


class IcmpError(NamedTuple):
    """One message."""

    text: str
    said_by: IPv4Address
    about: IPv4Address
    """Where the datagram it quotes was sent."""


class IcmpErrorSocket:
    """Receives errors about datagrams from and to one UDP port."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def confine(self, port: int) -> None:
        """Receive what quotes a datagram from `port` to `port`; before this, nothing."""
        attach_filter(self.sock, _about_port(port))

    def receive(self) -> list[IcmpError]:
        """What has come, 256 at most; never waits. What the buffer had no room for is lost."""
        found = []
        for _ in range(_RECEIVES):
            try:
                message = self.sock.recv(_LEN)
            except OSError:
                break
            if (error := read(message)) is not None:
                found.append(error)
        return found

    def close(self) -> None:
        """Close the socket; harmless when repeated."""
        self.sock.close()


def open_icmp_error_socket() -> IcmpErrorSocket:
    """A non-blocking one that receives nothing yet. PlatformError, EPERM without CAP_NET_RAW."""
    try:
        sock = socket.socket(
            socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP
        )
    except OSError as error:
        hint = "; this needs CAP_NET_RAW at the start" if error.errno == errno.EPERM else ""
        raise PlatformError(
            f"cannot open an ICMP socket: {error.strerror}{hint}", error.errno
        ) from None
    try:
        wanted = ~(1 << _TYPE) & 0xFFFFFFFF
        sock.setsockopt(uapi.SOL_RAW, uapi.ICMP_FILTER, struct.pack("=I", wanted))
        attach_filter(sock, [(0x06, 0, 0, 0)])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_LEN)
    except OSError as error:
        sock.close()
        raise PlatformError(
            f"cannot filter an ICMP socket: {error.strerror}", error.errno
        ) from None
    return IcmpErrorSocket(sock)


def read(message: bytes) -> IcmpError | None:
    """Decode an IPv4 packet as a raw ICMP socket receives it; None if it is none of these."""
    start = (message[0] & 0x0F) * 4 if message else 0
    quote = start + _ICMP_LEN
    if start < 20 or len(message) < quote + _MIN_QUOTE_LEN or message[start] != _TYPE:
        return None
    text = UNREACHABLE.get(message[start + 1])
    if text is None:
        return None
    return IcmpError(
        text, IPv4Address(message[12:16]), IPv4Address(message[quote + 16 : quote + 20])
    )


def _about_port(port: int) -> list[tuple[int, int, int, int]]:
    """Pass ICMP messages that quote UDP from `port` to `port` (classic BPF, linux/filter.h)."""
    return [
        (0xB1, 0, 0, 0),  # ldxb 4 * ([0] & 0xf): the outer IPv4 header's length
        (0x50, 0, 0, 8),  # ldb [x + 8]: version and header length of the quoted packet
        (0x15, 0, 5, 0x45),  # without options, as we send
        (0x50, 0, 0, 17),  # ldb [x + 17]: its protocol
        (0x15, 0, 3, socket.IPPROTO_UDP),
        (0x40, 0, 0, 28),  # ld [x + 28]: both ports
        (0x15, 0, 1, port << 16 | port),
        (0x06, 0, 0, 0xFFFF),  # ret: all of it
        (0x06, 0, 0, 0),  # ret: nothing
    ]
