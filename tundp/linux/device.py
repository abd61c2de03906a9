"""Configuration of the overlay's TUN device: flannel's settings, and repair of what is missing.

address   <subnet base>/32, scope global
MTU       underlay MTU - 28
route     the whole Network over the device, table main
queue     `queue_len` packets at least: a longer one somebody chose is left alone
sysctl    IPv6 off (the overlay carries none), accept_local on (our ICMP errors come
          from our own address, and the kernel would drop them as martians)
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import sysctl
from tundp.linux.netlink import Link, Netlink
from tundp.linux.tun import Tun

_log = logging.getLogger(__name__)

_SUPER_PACKET_LEN: Final = 1 << 16
_MEMORY_SHARE: Final = 16


def queue_len_for(memory_len: int) -> int:
    """Packets for the TUN's queue on a host with so many bytes of memory.

    10,000: a second of 10,000 packets/s, while a daemon is replaced or starts again. What it does
    under overload is in docs/performance.md; it takes 80 KB of pointers. Fewer on a small host, as
    super-packets that wait there are nobody's: no limit of a socket or a pod holds them
    (drivers/net/tun.c, tun_net_xmit: skb_orphan), and they may take a sixteenth of its memory.
    """
    return max(1_000, min(10_000, memory_len // _MEMORY_SHARE // _SUPER_PACKET_LEN))


def queue_len(queues: int) -> int:
    """Packets for each queue of a TUN on this host, which share what it has for them."""
    return queue_len_for(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // queues)


QUEUE_LEN: Final = queue_len(1)
"""Of a TUN with one queue on this host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """Required settings of the device."""

    address: IPv4Address
    mtu: int
    network: IPv4Network
    queues: int = 1

    @property
    def queue_len(self) -> int:
        """Packets that each of its queues holds, at least."""
        return queue_len(self.queues)


async def configure(netlink: Netlink, tun: Tun, settings: DeviceSettings) -> int:
    """Configure a new device and bring it up; return its interface index."""
    for family, name, value in (("ipv6", "disable_ipv6", 1), ("ipv4", "accept_local", 1)):
        try:
            sysctl.set_device(family, tun.name, name, value)
        except PlatformError as error:
            # IPv6 may be compiled out, /proc/sys read-only: packets flow all the same.
            _log.warning("%s", error)
    index = await _index_of(netlink, tun)
    await repair(netlink, index, settings)
    return index


async def repair(netlink: Netlink, index: int, settings: DeviceSettings) -> list[str]:
    """Restore missing settings and nothing else; return what was missing, for the log.

    A device that is gone is left to whoever reads it: nothing is done.
    """
    done: list[str] = []
    link = await netlink.link(index)
    if link is None:
        return done
    if link.mtu != settings.mtu:
        await netlink.set_link(index, mtu=settings.mtu)
        done.append(f"MTU {settings.mtu} (was {link.mtu})")
    if link.queue_len < settings.queue_len:
        await netlink.set_link(index, txqlen=settings.queue_len)
        done.append(f"queue of {settings.queue_len:,} packets (was {link.queue_len:,})")
    if not link.is_up:
        await netlink.set_link(index, state="up")
        done.append("up")
    own = IPv4Interface((settings.address, 32))
    addresses = await netlink.addresses(index)
    if not any(each.interface.ip == settings.address for each in addresses):
        await netlink.ensure_address(index, own)
        done.append(f"address {own}")
    if not any(
        route.kind == "unicast" and route.destination == settings.network
        for route in await netlink.list_routes(index=index)
    ):
        await netlink.ensure_route(index, settings.network)
        done.append(f"route {settings.network}")
    return done


def fits(link: Link, settings: DeviceSettings) -> bool:
    """Whether the device, as the kernel reports it, has what of these settings is its own."""
    return link.is_up and link.mtu == settings.mtu and link.queue_len >= settings.queue_len


async def _index_of(netlink: Netlink, tun: Tun) -> int:
    for link in await netlink.links():
        if link.name == tun.name:
            return link.index
    raise PlatformError(f"TUN device {tun.name} vanished right after it was made")
