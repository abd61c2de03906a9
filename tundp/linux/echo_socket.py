"""The raw socket that receives answers to our echo requests, and nothing else.

For commands, which root runs: it needs CAP_NET_RAW to be opened. The daemon has none, and
hears replies by its engine (linux/echo.py). The kernel hands a raw ICMP socket a copy of each ICMP
message of the host; a filter leaves the echo replies with our identifier.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.socket_filter import attach_filter

_RECEIVE_BUFFER_LEN: Final = 1 << 20
_ECHO_REPLY: Final = 0


class EchoSocket:
    """Receives echo replies whose identifier is `identifier`, a random number."""

    def __init__(self, sock: socket.socket, identifier: int) -> None:
        self.sock = sock
        self.identifier = identifier

    def confine(self, address: str) -> None:
        """Receive what is addressed to `address` only. PlatformError."""
        try:
            self.sock.setsockopt(socket.IPPROTO_IP, uapi.IP_FREEBIND, 1)
            self.sock.bind((address, 0))
        except OSError as error:
            raise PlatformError(
                f"cannot bind the ICMP socket to {address}: {error.strerror}", error.errno
            ) from None

    def close(self) -> None:
        """Close the socket; harmless when repeated."""
        self.sock.close()


def open_echo_socket() -> EchoSocket:
    """A non-blocking one. PlatformError with EPERM without CAP_NET_RAW."""
    identifier = random.SystemRandom().getrandbits(16)
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
        wanted = ~(1 << _ECHO_REPLY) & 0xFFFFFFFF
        sock.setsockopt(uapi.SOL_RAW, uapi.ICMP_FILTER, struct.pack("=I", wanted))
        _pass_identifier(sock, identifier)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_LEN)
    except OSError as error:
        sock.close()
        raise PlatformError(
            f"cannot filter an ICMP socket: {error.strerror}", error.errno
        ) from None
    return EchoSocket(sock, identifier)


def _pass_identifier(sock: socket.socket, identifier: int) -> None:
    """Pass ICMP messages with this identifier."""
    attach_filter(
        sock,
        [
            (0xB1, 0, 0, 0),  # ldxb 4 * ([0] & 0xf): the IPv4 header's length
            (0x48, 0, 0, 4),  # ldh [x + 4]: the identifier
            (0x15, 0, 1, identifier),  # jeq identifier, next, the one after
            (0x06, 0, 0, 0xFFFF),  # ret: all of it
            (0x06, 0, 0, 0),  # ret: nothing
        ],
    )
