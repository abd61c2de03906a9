"""The UDP sockets of the underlay: one for each worker, moved to another address under engines."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address

from tundp.linux.udp import open_udp, rebind


def open_sockets(address: IPv4Address, port: int, count: int) -> list[socket.socket]:
    """Bound sockets, one for each worker; all or none. PlatformError."""
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(
                open_udp(address, port, is_shared=count > 1, is_one_of_many=number > 0)
            )
            for number in range(count)
        ]
        stack.pop_all()
        return socks


def move_sockets(socks: Sequence[socket.socket], fresh: Sequence[socket.socket]) -> None:
    """Put new sockets under the old descriptors, which engines know; the old ones are closed.

    `fresh` belongs to this function and is empty of use afterwards.
    """
    for sock, successor in zip(socks, fresh, strict=True):
        rebind(sock, successor)


def are_bound_to(socks: Sequence[socket.socket], address: IPv4Address, port: int) -> bool:
    """Whether all of them are bound to this address and port."""
    return all(sock.getsockname()[:2] == (str(address), port) for sock in socks)
