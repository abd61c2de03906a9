"""Notifications of changed links, IPv4 addresses, routes and rules, over a netlink socket."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.links import Address, Link, decode_address, decode_link
from tundp.linux.route_table import decode_destination
from tundp.linux.rtnl import messages

_GROUPS: Final = (
    uapi.RTMGRP_LINK | uapi.RTMGRP_IPV4_IFADDR | uapi.RTMGRP_IPV4_ROUTE | uapi.RTMGRP_IPV4_RULE
)
_RECEIVE_BUFFER: Final = 8 << 20
"""Bytes, by force where allowed: ten thousand routes change in one go."""
_RECEIVE_LEN: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class LinkChange:
    """A link came, changed or went; as it is now, or was last."""

    link: Link
    is_gone: bool


@dataclass(frozen=True, slots=True)
class AddressChange:
    """An IPv4 address came, changed or went."""

    address: Address
    is_gone: bool


@dataclass(frozen=True, slots=True)
class RouteChange:
    """An IPv4 route came, was replaced or went, of any table.

    The kernel does not report the routes that go with a link that goes down, or with the
    address they name as source: the change of that link or address is all there is.
    """

    destination: IPv4Network
    indexes: tuple[int, ...]
    """The links it leads over; none for a blackhole."""
    table: int
    is_gone: bool


@dataclass(frozen=True, slots=True)
class RuleChange:
    """A routing policy rule came or went: any lookup may have another result."""


Change = LinkChange | AddressChange | RouteChange | RuleChange


class ChangeSocket:
    """A socket the kernel reports changes to, of the calling thread's network namespace."""

    def __init__(self, receive_buffer: int = _RECEIVE_BUFFER) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            uapi.NETLINK_ROUTE,
        )
        try:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, receive_buffer)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self._socket.bind((0, _GROUPS))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor, readable when there is something to `receive`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def receive(self) -> list[Change]:
        """Every change reported since the last call. PlatformError if any were lost."""
        found: list[Change] = []
        while True:
            try:
                datagram = self._socket.recv(_RECEIVE_LEN)
            except BlockingIOError:
                return found
            except OSError as error:
                reason = error.strerror or str(error)
                if error.errno == errno.ENOBUFS:
                    reason = "more came than the receive buffer holds"
                raise PlatformError(f"netlink changes were lost: {reason}", error.errno) from None
            found.extend(_decode(memoryview(datagram)))


def _decode(datagram: memoryview) -> Iterator[Change]:
    for kind, _, _, body in messages(datagram):
        if kind in (uapi.RTM_NEWLINK, uapi.RTM_DELLINK):
            if (link := decode_link(body)) is not None:
                yield LinkChange(link, kind == uapi.RTM_DELLINK)
        elif kind in (uapi.RTM_NEWADDR, uapi.RTM_DELADDR):
            if (address := decode_address(body)) is not None:
                yield AddressChange(address, kind == uapi.RTM_DELADDR)
        elif kind in (uapi.RTM_NEWROUTE, uapi.RTM_DELROUTE):
            if (route := decode_destination(body)) is not None:
                yield RouteChange(*route, is_gone=kind == uapi.RTM_DELROUTE)
        elif kind in (uapi.RTM_NEWRULE, uapi.RTM_DELRULE):
            yield RuleChange()
