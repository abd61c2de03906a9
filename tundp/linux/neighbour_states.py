"""State of single entries of the IPv4 neighbour table: who answers ARP (linux/neighbour.h)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.rtnl import Answer, Request, RtnlSocket, attribute

_NDMSG: Final = struct.Struct("=BxxxiHBB")
"""struct ndmsg: family, index of the device, state, flags, type."""
_REQUESTS: Final = 32
_NAMES: Final = {
    uapi.NUD_INCOMPLETE: "incomplete",
    uapi.NUD_REACHABLE: "reachable",
    uapi.NUD_STALE: "stale",
    uapi.NUD_DELAY: "delay",
    uapi.NUD_PROBE: "probe",
    uapi.NUD_FAILED: "failed",
    uapi.NUD_NOARP: "noarp",
    uapi.NUD_PERMANENT: "permanent",
}


class NextHop(NamedTuple):
    """A neighbour: the index of its device, and the address."""

    link: int
    address: IPv4Address


def ask(sock: RtnlSocket, hops: Sequence[NextHop]) -> list[str]:
    """Return the state of each as `ip neigh` spells it, lower case; empty without an entry.

    Empty for all before Linux 5.0, which lists them only. PlatformError.
    """
    found: list[str] = []
    for first in range(0, len(hops), _REQUESTS):
        requests = [
            Request(
                uapi.RTM_GETNEIGH,
                0,
                _NDMSG.pack(socket.AF_INET, hop.link, 0, 0, 0)
                + attribute(uapi.NDA_DST, hop.address.packed),
            )
            for hop in hops[first : first + _REQUESTS]
        ]
        try:
            found.extend(map(_decode, sock.exchange(requests)))
        except OSError as error:
            raise PlatformError(
                f"cannot look up neighbours: {error.strerror or error}", error.errno
            ) from None
    return found


def _decode(answer: Answer) -> str:
    if answer.kind == uapi.NLMSG_ERROR or len(answer.body) < _NDMSG.size:
        return ""
    state = _NDMSG.unpack_from(answer.body)[2]
    return _NAMES.get(state, "")
