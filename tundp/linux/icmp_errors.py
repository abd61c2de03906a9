"""What hosts on the way say of datagrams to a peer: ICMP unreachable (RFC 792 type 3).

By the error queue of a socket of its own (IP_RECVERR), which takes no rights: empty datagrams are
sent from another port than the overlay's, and what is said of them is read. The sockets that carry
packets have no error queue: it would make them refuse the next, innocent send. What is said is
shown to operators and decides nothing, since anybody on the way can forge it. Linux hosts answer
once a second (net.ipv4.icmp_ratelimit), so not everything that is sent is answered.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from tundp.errors import PlatformError
from tundp.linux import uapi

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
_EXTENDED_ERROR: Final = struct.Struct("=IBBBxII")
"""linux/errqueue.h: struct sock_extended_err: errno, origin, type, code, info, data."""
_OFFENDER: Final = struct.Struct("=H2x4s")
"""After it struct sockaddr_in: family and address of who said it."""
_SPACE: Final = socket.CMSG_SPACE(_EXTENDED_ERROR.size + 16)
_RECEIVES: Final = 256
_ORIGIN_ICMP: Final = 2
"""SO_EE_ORIGIN_ICMP"""


class IcmpError(NamedTuple):
    """One message."""

    text: str
    said_by: IPv4Address
    about: IPv4Address
    """Where the datagram was sent."""


class IcmpErrors:
    """Provokes and receives them; harmless while it is not open."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None

    def open(self, source: IPv4Address) -> None:
        """Send from `source` from now on, from a port of the kernel's choice. PlatformError."""
        self.close()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.IPPROTO_IP, uapi.IP_MTU_DISCOVER, uapi.IP_PMTUDISC_INTERFACE)
            sock.setsockopt(socket.IPPROTO_IP, uapi.IP_RECVERR, 1)
            sock.bind((str(source), 0))
        except OSError as error:
            sock.close()
            raise PlatformError(
                f"cannot open a socket for ICMP errors: {error.strerror}", error.errno
            ) from None
        self._sock = sock

    def provoke(self, address: IPv4Address, port: int) -> int:
        """Send an empty datagram, which no daemon takes for a packet; the errno of a refusal or 0.

        A refusal is this kernel's, or what a host said of an earlier datagram.
        """
        refusal = 0
        if self._sock is None:
            return refusal
        for _ in range(2):  # what was said of another one fails the first
            try:
                self._sock.sendto(b"", (str(address), port))
            except OSError as error:
                refusal = error.errno or 0
            else:
                return 0
        return refusal

    def receive(self) -> list[IcmpError]:
        """What has come, 256 at most; never waits."""
        found: list[IcmpError] = []
        if self._sock is None:
            return found
        for _ in range(_RECEIVES):
            try:
                _, messages, _, destination = self._sock.recvmsg(0, _SPACE, socket.MSG_ERRQUEUE)
            except OSError:
                break
            if (error := decode(messages, destination[0])) is not None:
                found.append(error)
        return found

    def close(self) -> None:
        """Close the socket; harmless when repeated."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def decode(messages: Iterable[tuple[int, int, bytes]], destination: str) -> IcmpError | None:
    """Read the control messages of an error queue; None if no host said it, or something else."""
    for level, kind, data in messages:
        if (level, kind) != (socket.IPPROTO_IP, uapi.IP_RECVERR):
            continue
        if len(data) < _EXTENDED_ERROR.size + _OFFENDER.size:
            continue
        _, origin, icmp_type, code, _, _ = _EXTENDED_ERROR.unpack_from(data)
        family, said_by = _OFFENDER.unpack_from(data, _EXTENDED_ERROR.size)
        text = UNREACHABLE.get(code)
        if (origin, icmp_type, family) == (_ORIGIN_ICMP, _TYPE, socket.AF_INET) and text:
            return IcmpError(text, IPv4Address(said_by), IPv4Address(destination))
    return None
