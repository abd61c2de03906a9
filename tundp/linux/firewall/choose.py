"""Firewall rules of the overlay, iptables or nftables: set up, repair, removal.

The rules are flannel's, byte for byte (see iptables.py and nftables.py), and like
flannel's they stay when the daemon ends: the overlay's packets still need them after a
restart. `tundp cleanup` removes them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from ipaddress import IPv4Network
from typing import Protocol

from tundp.errors import PlatformError
from tundp.linux.command import try_all
from tundp.linux.firewall import iptables, nftables
from tundp.linux.firewall.backend import needs_raw_sockets
from tundp.linux.firewall.settings import FirewallSettings, NetworkPair, Previous
from tundp.linux.firewall.watch import watch_ruleset

__all__ = [
    "Firewall",
    "FirewallSettings",
    "Previous",
    "leftovers",
    "make_firewall",
    "needs_raw_sockets",
    "remove_all",
    "watch_ruleset",
]

_log = logging.getLogger(__name__)


class Flavour(Protocol):
    """The rules of one overlay, by one tool. Not to be called twice at a time."""

    @property
    def name(self) -> str:
        """`iptables` or `nftables`."""
        ...

    async def install(self, pairs: Sequence[NetworkPair]) -> None:
        """Make the rules anew, jumps at the end, and remove flannel v0.11's for `pairs`.

        PlatformError if a rule cannot be made, after all was tried.
        """
        ...

    async def repair(self) -> list[str]:
        """See Firewall."""
        ...

    async def is_blind(self) -> bool:
        """See Firewall."""
        ...


class Firewall:
    """One flavour's rules for one overlay. Not to be called twice at a time."""

    def __init__(self, settings: FirewallSettings, flavour: Flavour) -> None:
        self._settings = settings
        self._flavour = flavour
        self.name = flavour.name

    async def set_up(self, previous: Previous | None) -> None:
        """Make the rules anew, jumps at the end; then remove what they replace.

        Replaced are rules for the network and subnet of the run before (`previous`), the
        other flavour's objects, and the rules flannel v0.11 made for either pair of
        network and subnet: flannel would leave those for ever, where they go on to
        masquerade and accept. A chain that is not wanted (is_masquerading,
        is_forwarding) is not touched. PlatformError if a rule cannot be made; if
        something old cannot be removed, the log says so.
        """
        pairs = [(self._settings.network, self._settings.subnet)]
        if previous is not None:
            pairs.append((previous.network, previous.subnet))
        # Remove the old rules after adding the new, so that no packet meets neither.
        await self._flavour.install(pairs)
        try:
            for line in await self._remove_other(pairs):
                _log.info("firewall: removed what was there before: %s", line)
        except PlatformError as error:
            _log.warning("firewall: older rules may be left, and apply too: %s", error)

    async def repair(self) -> list[str]:
        """Restore missing rules; return what was missing, for the log. Cheap if nothing is.

        PlatformError if it cannot be put back. What somebody added stays.
        """
        return await self._flavour.repair()

    async def is_blind(self) -> bool:
        """Whether nobody reports changes of these rules: who keeps them has to look often.

        True if the program does not answer.
        """
        try:
            return await self._flavour.is_blind()
        except PlatformError:
            return True

    async def _remove_other(self, pairs: list[NetworkPair]) -> list[str]:
        if self.name == nftables.Nftables.name:
            return await iptables.remove(pairs, mark=self._settings.mark)
        return await nftables.remove(mark=self._settings.mark)


def make_firewall(
    settings: FirewallSettings, *, is_nftables: bool, binary: str = "iptables"
) -> Firewall:
    """The flavour asked for; `binary` picks an iptables back end, e.g. iptables-legacy."""
    if is_nftables:
        return Firewall(settings, nftables.Nftables(settings))
    return Firewall(settings, iptables.Iptables(settings, binary=binary))


async def remove_all(
    networks: Iterable[tuple[IPv4Network, IPv4Network]], mark: str = ""
) -> list[str]:
    """Remove everything of ours with that mark, of both flavours and families, and nothing else.

    `networks` are the pairs of network and subnet whose v0.11 rules go too. Says what was
    removed; programs that are not installed have nothing to remove. PlatformError after
    all was tried.
    """
    return await _remove(networks, mark, is_dry_run=False)


async def leftovers(
    networks: Iterable[tuple[IPv4Network, IPv4Network]] = (), mark: str = ""
) -> list[str]:
    """List what `remove_all` would remove, in the same words."""
    return await _remove(networks, mark, is_dry_run=True)


async def _remove(networks: Iterable[NetworkPair], mark: str, *, is_dry_run: bool) -> list[str]:
    found: list[str] = []

    async def collect(
        remove: Callable[..., Awaitable[list[str]]], *pairs: list[NetworkPair]
    ) -> None:
        found.extend(await remove(*pairs, mark=mark, is_dry_run=is_dry_run))

    try:
        await try_all(
            [partial(collect, iptables.remove, list(networks)), partial(collect, nftables.remove)]
        )
    except PlatformError as error:
        done = f" (found all the same: {', '.join(found)})" if found else ""
        raise PlatformError(f"{error}{done}", error.errno) from None
    return found
