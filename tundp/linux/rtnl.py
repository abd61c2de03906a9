"""A blocking rtnetlink socket, and the parts its messages are made of (linux/netlink.h).

pyroute2 decodes every attribute of a message: a millisecond for a link, a second for a dump of
800. Here only what is asked for is read, and many requests go into one datagram; the kernel
carries them out in order while it is sent (netlink_rcv_skb).

Not to be called by two threads at once.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from tundp.errors import PlatformError
from tundp.linux import uapi

T = TypeVar("T")

_RECEIVE_LEN: Final = 1 << 16
_TIMEOUT_S: Final = 10.0
_HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port; host byte order."""
_ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK: Final = 0x3FFF
"""NLA_TYPE_MASK: without the bits for nested attributes and network byte order."""


class Request(NamedTuple):
    """One message to the kernel: RTM_ type, NLM_F_ flags besides NLM_F_REQUEST, body."""

    kind: int
    flags: int
    body: bytes


class Answer(NamedTuple):
    """One message of the kernel: which request it answers (from 0), type, flags, body."""

    number: int
    kind: int
    flags: int
    body: memoryview


class RtnlSocket:
    """A socket of the calling thread's network namespace; `requests` and `dumps` count."""

    def __init__(self, protocol: int = uapi.NETLINK_ROUTE) -> None:
        self.requests = 0
        """Messages sent, dumps apart."""
        self.dumps = 0
        """Lists asked for, filtered by the kernel or not."""
        self._sequence = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        try:
            self._socket.settimeout(_TIMEOUT_S)
            for option in (
                uapi.NETLINK_CAP_ACK,
                uapi.NETLINK_EXT_ACK,
                uapi.NETLINK_GET_STRICT_CHK,
            ):
                try:
                    self._socket.setsockopt(uapi.SOL_NETLINK, option, 1)
                except OSError as error:
                    if error.errno != errno.ENOPROTOOPT:
                        raise
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def exchange(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Send the requests in one datagram; exactly one answer to each, in order.

        A request without NLM_F_ACK must be one that the kernel answers. OSError from the socket.
        """
        first = self._sequence + 1
        datagram = bytearray()
        for request in requests:
            self._sequence += 1
            datagram += self._message(request.kind, request.flags, request.body)
        self.requests += len(requests)
        left = len(requests)
        self._socket.send(datagram)
        while left:
            for kind, flags, sequence, body in self._receive():
                if first <= sequence <= self._sequence:  # else of a request that was given up
                    left -= 1
                    yield Answer(sequence - first, kind, flags, body)

    def dump(
        self, what: str, request: tuple[int, bytes], decode: Callable[[memoryview], T | None]
    ) -> tuple[list[T], bool]:
        """List what `decode` makes of each message; whether all stayed the same meanwhile.

        what: for the error. request: RTM_GET type and body. PlatformError if the kernel refuses,
        or if `decode` fails at a message: the list would be shorter than the truth.
        """
        self._sequence += 1
        self.dumps += 1
        kind_asked, body = request
        found: list[T] = []
        is_consistent = True
        odd: Exception | None = None
        try:
            self._socket.send(self._message(kind_asked, uapi.NLM_F_DUMP, body))
            while True:
                for kind, flags, sequence, payload in self._receive():
                    if sequence != self._sequence:
                        continue
                    is_consistent &= not flags & uapi.NLM_F_DUMP_INTR
                    if kind == uapi.NLMSG_ERROR:
                        code, reason = decode_error(flags, payload)
                        if code in (errno.ENOENT, errno.ENODEV):
                            return [], True  # no such table, no such link
                        raise PlatformError(f"cannot {what}: {reason}", code)
                    if kind == uapi.NLMSG_DONE:
                        if odd is not None:
                            raise PlatformError(
                                f"cannot {what}: an answer of the kernel has an unknown form"
                                f" ({odd!r})",
                                errno.EBADMSG,
                            )
                        return found, is_consistent
                    try:
                        if (value := decode(payload)) is not None:
                            found.append(value)
                    except (struct.error, ValueError, IndexError) as error:
                        odd = error  # read on: the kernel takes no request before its last answer
        except OSError as error:
            if isinstance(error, PlatformError):
                raise
            raise PlatformError(f"cannot {what}: {error.strerror or error}", error.errno) from None

    def _message(self, kind: int, flags: int, body: bytes) -> bytes:
        return (
            _HEADER.pack(
                _HEADER.size + len(body), kind, flags | uapi.NLM_F_REQUEST, self._sequence, 0
            )
            + body
        )

    def _receive(self) -> Iterator[tuple[int, int, int, memoryview]]:
        return messages(memoryview(self._socket.recv(_RECEIVE_LEN)))


def messages(datagram: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield each message of one datagram: type, flags, sequence number, body."""
    while len(datagram) >= _HEADER.size:
        length, kind, flags, sequence, _ = _HEADER.unpack_from(datagram)
        if not _HEADER.size <= length <= len(datagram):
            return
        yield kind, flags, sequence, datagram[_HEADER.size : length]
        datagram = datagram[aligned(length) :]


def attribute(kind: int, value: bytes) -> bytes:
    """Pack a struct rtattr, padded to four bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def attribute_u32(kind: int, value: int) -> bytes:
    """Pack a struct rtattr of a number in host byte order."""
    return attribute(kind, struct.pack("=I", value))


def attributes(buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield type and value of each attribute."""
    while len(buffer) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(buffer)
        if not _ATTRIBUTE.size <= length <= len(buffer):
            return
        yield kind & _TYPE_MASK, buffer[_ATTRIBUTE.size : length]
        buffer = buffer[aligned(length) :]


def decode_error(flags: int, body: memoryview) -> tuple[int, str]:
    """Decode an NLMSG_ERROR: its errno and the reason in words; errno 0 if it is none."""
    code = -int(struct.unpack_from("=i", body)[0])
    reason = os.strerror(code)
    if code and flags & uapi.NLM_F_ACK_TLVS:
        length = int(struct.unpack_from("=I", body, 4)[0])
        start = 4 + (_HEADER.size if flags & uapi.NLM_F_CAPPED else aligned(length))
        values = dict(attributes(body[start:]))
        if text := values.get(uapi.NLMSGERR_ATTR_MSG):
            words = bytes(text).rstrip(b"\0").decode(errors="replace").rstrip(".")
            reason = f"{words} ({reason})"
    if code == errno.EPERM:
        reason += "; this needs CAP_NET_ADMIN: run as root"
    return code, reason


def aligned(length: int) -> int:
    """Round up to a multiple of four (NLMSG_ALIGN, RTA_ALIGN)."""
    return (length + 3) & ~3
