"""The interface to the other nodes while the daemon runs: looked at again when that is due."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.errors import ConfigError
from tundp.linux.iface import Host, Interface, Selection, relook, targets_of, ways_to
from tundp.linux.netlink import (
    AddressChange,
    Change,
    Flow,
    LinkChange,
    Netlink,
    RouteChange,
    RouteLookup,
)
from tundp.linux.uapi import RT_TABLE_LOCAL
from tundp.settings.settings import Settings

_log = logging.getLogger(__name__)

PATIENCE: Final = 5
"""Looks, a fifth of a second apart, before a vanished address is believed: DHCP clients
take one away before they give the next."""
LOOK_S: Final = 0.2
PEERS_ASKED: Final = 8
"""Other nodes the way to which is looked up."""


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
        self.peers: Sequence[IPv4Address] = ()
        """PublicIPs of other nodes, at most PEERS_ASKED."""
        self._netlink = netlink
        self._selection = selection
        self._network = network
        self._ways: list[RouteLookup] | None = None
        """The kernel's routes to the other nodes when last looked at."""

    def is_concerned(self, change: Change) -> bool:
        """Whether a change may be one of the interface, or allow one where none could be used."""
        if self.error:
            return not isinstance(change, RouteChange) or change.table != RT_TABLE_LOCAL
        chosen = self.interface
        if isinstance(change, LinkChange):
            if change.link.index == chosen.link.index:
                return change.is_gone or change.link != chosen.link
            return change.is_gone and change.link.index == chosen.holder
        if isinstance(change, AddressChange):
            return change.is_gone and change.address.interface.ip == chosen.address
        if isinstance(change, RouteChange):
            targets, _ = targets_of(self._selection, self.peers)
            return change.table != RT_TABLE_LOCAL and any(
                target in change.destination for target in targets
            )
        return True

    async def look(self, host: Host | None = None) -> Interface | None:
        """The interface as it is now; None, and `error`, if there is none that fits.

        An `error` of before stays until the backend uses what was found: `follow`.
        host: what was dumped just now; without it, nothing is dumped if nothing changed.
        """
        if host is None and not self.error and await self._is_as_before():
            return self.interface
        try:
            now = await self._patient_look(host)
        except ConfigError as error:
            self.failed(error)
            return None
        self._ways = await self._look_up_ways(now.address)
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
        if now.link.index != self.interface.link.index:
            _log.warning("packets from %s go over %s now", now.address, now.link.name)
        self.interface = now
        self.error = ""

    async def _is_as_before(self) -> bool:
        """Ask for the link, the address and the ways, and for nothing else."""
        chosen = self.interface
        if await self._netlink.link(chosen.link.index) != chosen.link:
            return False
        addresses = await self._netlink.addresses(chosen.holder or chosen.link.index)
        if not any(each.interface.ip == chosen.address for each in addresses):
            return False
        return await self._look_up_ways(chosen.address) == self._ways

    async def _look_up_ways(self, source: IPv4Address) -> list[RouteLookup]:
        targets, _ = targets_of(self._selection, self.peers)
        return await ways_to(self._netlink, targets, Flow(source=source))

    async def _patient_look(self, host: Host | None) -> Interface:
        for _ in range(PATIENCE):
            with contextlib.suppress(ConfigError):
                now = await self._relook(host)
                if (now.address, now.public_ip) == (
                    self.interface.address,
                    self.interface.public_ip,
                ) or now.link.index == self.interface.link.index:
                    return now
            host = None
            await asyncio.sleep(LOOK_S)
        return await self._relook(None)

    async def _relook(self, host: Host | None) -> Interface:
        return await relook(
            self._netlink,
            self._selection,
            self.interface,
            self._network,
            peers=self.peers,
            host=host,
        )
