"""The interface to the other nodes while the daemon runs: its address, its sockets, its MTU."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.errors import ConfigError, PlatformError
from tundp.linux.iface import Interface, Selection, relook
from tundp.linux.netlink import Netlink
from tundp.linux.udp import open_udp, rebind
from tundp.settings.settings import Settings
from tundp.wire import overhead

_log = logging.getLogger(__name__)

PATIENCE: Final = 5
"""Looks, a fifth of a second apart, before a vanished address is believed: DHCP clients
take one away before they give the next."""
LOOK_S: Final = 0.2


def selection_of(settings: Settings) -> Selection:
    """What the flags ask for."""
    return Selection(
        iface=settings.iface,
        iface_regex=settings.iface_regex,
        iface_can_reach=settings.iface_can_reach,
        public_ip=settings.public_ip,
        public_ipv6=settings.public_ipv6,
    )


def open_sockets(address: IPv4Address, port: int, count: int) -> list[socket.socket]:
    """The underlay's sockets, one for each worker; all or none. PlatformError."""
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(
                open_udp(address, port, is_shared=count > 1, is_one_of_many=number > 0)
            )
            for number in range(count)
        ]
        stack.pop_all()
        return socks


class Underlay:
    """The chosen interface and the sockets bound to its address."""

    def __init__(
        self,
        netlink: Netlink,
        selection: Selection,
        *,
        interface: Interface,
        network: IPv4Network,
        port: int,
        socks: list[socket.socket],
    ) -> None:
        self.interface = interface
        self.socks = socks
        self.error = ""
        """Why there is no usable interface just now; empty when there is one."""
        self._netlink = netlink
        self._selection = selection
        self._network = network
        self._port = port

    @property
    def tun_mtu(self) -> int:
        """What an inner packet may have, bytes."""
        return overhead.tun_mtu(self.interface.link.mtu, self.interface.link.name)

    async def look(self) -> Interface | None:
        """The interface as it is now; None, and `error`, if there is none that fits."""
        try:
            now = await self._patient_look()
        except ConfigError as error:
            if not self.error:
                _log.error("underlay: %s; going on with what there is", error)
            self.error = str(error)
            return None
        if self.error and now.address == self.interface.address:
            _log.info("underlay: %s (%s) again", now.link.name, now.address)
            self.error = ""
        if now.link.is_up != self.interface.link.is_up:
            _log.warning("interface %s went %s", now.link.name, "up" if now.link.is_up else "down")
        return now

    def open(self, now: Interface) -> list[socket.socket] | None:
        """Sockets on the new address, for `move`; None, and `error`, if they cannot be had."""
        try:
            fresh = open_sockets(now.address, self._port, len(self.socks))
        except PlatformError as error:
            if str(error) != self.error:
                _log.error("cannot move to %s: %s", now.address, error)
            self.error = str(error)
            return None
        self.error = ""
        return fresh

    def move(self, fresh: list[socket.socket]) -> None:
        """Put the new sockets under the old descriptors, which engines know; the old ones go."""
        for sock, successor in zip(self.socks, fresh, strict=True):
            rebind(sock, successor)

    async def _patient_look(self) -> Interface:
        for _ in range(PATIENCE):
            with contextlib.suppress(ConfigError):
                now = await self._relook()
                if now.link.index == self.interface.link.index:
                    return now
            await asyncio.sleep(LOOK_S)
        return await self._relook()

    async def _relook(self) -> Interface:
        return await relook(self._netlink, self._selection, self.interface, self._network)
