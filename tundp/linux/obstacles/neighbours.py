"""Entries of the neighbour table: those no ARP has made outlive the card they name."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address
from shlex import quote
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles.scene import NOT_JUDGED
from tundp.linux.rtnl import attributes

ID: Final = "obstacle.neighbour"
SHOWN: Final = 6
_NDMSG: Final = struct.Struct("=BxxxiHBB")
"""struct ndmsg: family, index of the device, state, flags, type (linux/neighbour.h)."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One entry of IPv4."""

    index: int
    address: IPv4Address
    link_address: str
    """As `02:00:00:00:00:01`; empty if there is none."""
    state: int = uapi.NUD_PERMANENT
    """NUD_ bits (linux/neighbour.h)."""

    @property
    def is_permanent(self) -> bool:
        """Whether somebody fixed it: no ARP is asked."""
        return bool(self.state & uapi.NUD_PERMANENT)

    @property
    def is_unanswered(self) -> bool:
        """Whether ARP was asked for it, without an answer so far."""
        return bool(self.state & (uapi.NUD_FAILED | uapi.NUD_INCOMPLETE))


async def table(netlink: Netlink) -> list[Neighbour]:
    """All entries of IPv4. PlatformError if they are not listed."""
    request = uapi.RTM_GETNEIGH, _NDMSG.pack(socket.AF_INET, 0, 0, 0, 0)
    return await netlink.dump("list neighbours", request, decode_any)


async def findings(
    netlink: Netlink, index: int, device: str, addresses: Collection[IPv4Address]
) -> list[Finding]:
    """Permanent entries of one device for these addresses. PlatformError if they are not listed."""
    found = []
    for each in await table(netlink):
        if not each.is_permanent or each.index != index or each.address not in addresses:
            continue
        command = f"ip neigh del {each.address} dev {quote(device)}"
        found.append(
            Finding(
                id=ID,
                verdict=Verdict.NOTE,
                evidence=f"datagrams for {each.address} go to the link address"
                f" {each.link_address or '(none)'} on {device}, which somebody has fixed",
                meaning=NOT_JUDGED,
                next_step=f"{command}  (where {each.address} has another one)",
                facts={"command": command},
            )
        )
    return found[:SHOWN]


def decode(body: memoryview) -> Neighbour | None:
    """The entry of an RTM_NEWNEIGH; None for one that is not permanent, or not of IPv4."""
    found = decode_any(body)
    return found if found is not None and found.is_permanent else None


def decode_any(body: memoryview) -> Neighbour | None:
    """The entry of an RTM_NEWNEIGH, whatever its state; None for one that is not of IPv4."""
    family, index, state, _, _ = _NDMSG.unpack_from(body)
    values = dict(attributes(body[_NDMSG.size :]))
    address = values.get(uapi.NDA_DST)
    if family != socket.AF_INET or address is None:
        return None
    link_address = bytes(values.get(uapi.NDA_LLADDR, b"")).hex(":")
    return Neighbour(index, IPv4Address(bytes(address)), link_address, state)
