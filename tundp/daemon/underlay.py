"""The interface to the other nodes while the daemon runs: found again whenever it changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from ipaddress import IPv4Network
from typing import Final

from tundp.errors import ConfigError
from tundp.linux.iface import Interface, Selection, relook
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings

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
    )


class Underlay:
    """The chosen interface. `error` says why none can be used just now; empty if one can."""

    def __init__(
        self,
        netlink: Netlink,
        selection: Selection,
        *,
        interface: Interface,
        network: IPv4Network,
    ) -> None:
        self.interface = interface
        self.error = ""
        self._netlink = netlink
        self._selection = selection
        self._network = network

    async def look(self) -> Interface | None:
        """The interface as it is now; None, and `error`, if there is none that fits.

        An `error` of before stays until the backend uses what was found: `follow`.
        """
        try:
            now = await self._patient_look()
        except ConfigError as error:
            self.failed(error)
            return None
        if now.link.is_up != self.interface.link.is_up:
            _log.warning("interface %s went %s", now.link.name, "up" if now.link.is_up else "down")
        return now

    def failed(self, error: Exception) -> None:
        """The interface, as it is now, cannot be used."""
        if str(error) != self.error:
            _log.error("underlay: %s; going on with what there is", error)
        self.error = str(error)

    def follow(self, now: Interface) -> None:
        """The backend uses `now`."""
        if self.error:
            _log.info("underlay: %s (%s) again", now.link.name, now.address)
        self.interface = now
        self.error = ""

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
