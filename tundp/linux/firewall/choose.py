"""Firewall rules of the overlay, iptables or nftables: set up, repair, removal.

The rules are flannel's, byte for byte (see iptables.py and nftables.py), and like
flannel's they stay when the daemon ends: the overlay's packets still need them after a
restart. `tundp cleanup` removes them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from tundp.errors import PlatformError
from tundp.linux.command import try_all
from tundp.linux.firewall import iptables, iptables_removal, nftables
from tundp.linux.firewall.backend import needs_raw_sockets
from tundp.linux.firewall.iptables_removal import has_legacy_tables
from tundp.linux.firewall.recognise import Network
from tundp.linux.firewall.settings import FirewallSettings, Previous, Removal
from tundp.linux.firewall.watch import watch_ruleset

__all__ = [
    "Firewall",
    "FirewallSettings",
    "Network",
    "Previous",
    "Removal",
    "has_legacy_tables",
    "leftovers",
    "make_firewall",
    "needs_raw_sockets",
    "remove_all",
    "watch_ruleset",
]

_log = logging.getLogger(__name__)

OLD_RETRY_S: Final = 300.0
"""Between attempts to remove old rules that cannot be removed: each runs ten programs."""


class Flavour(Protocol):
    """The rules of one overlay, by one tool. Not to be called twice at a time."""

    @property
    def name(self) -> str:
        """`iptables` or `nftables`."""
        ...

    async def install(self, networks: Sequence[Network]) -> None:
        """Make the rules that are wanted anew, in the place of flannel's for `networks`.

        PlatformError if a rule cannot be made, after all was tried.
        """
        ...

    async def repair(self) -> list[str]:
        """See Firewall."""
        ...

    async def is_blind(self) -> bool:
        """See Firewall."""
        ...

    def memory(self) -> dict[str, Any]:
        """See Firewall."""
        ...

    def recall(self, memory: Mapping[str, Any], networks: Sequence[Network]) -> None:
        """See Firewall. KeyError, TypeError or ValueError if it is another's memory."""
        ...


class Firewall:
    """One flavour's rules for one overlay. Not to be called twice at a time."""

    def __init__(self, settings: FirewallSettings, flavour: Flavour, binary: str) -> None:
        """binary: the iptables program, where the flavour is iptables."""
        self._settings = settings
        self._flavour = flavour
        self._binary = binary
        self._networks: list[Network] = []
        self._is_old_gone = True
        self._retry_at = 0.0
        self.name = flavour.name

    @property
    def is_wanted(self) -> bool:
        """Whether there is any rule to make. Where none is, there may be old ones to remove."""
        return self._settings.is_wanted

    @property
    def wanted(self) -> str:
        """What is wanted, in words that are equal for equal rules."""
        return f"{self.name} {self._binary} {self._settings}"

    @property
    def needs_care(self) -> bool:
        """Whether `repair` has anything to look after: rules, or old ones not removed yet."""
        return self.is_wanted or not self._is_old_gone

    async def set_up(self, previous: Previous | None) -> None:
        """Make the rules anew; then remove all else that is there for the same networks.

        Networks are ours and that of the run before (`previous`). Removed are chains that are
        not wanted any more (is_masquerading, is_forwarding), the direct rules of flannel before
        v0.20, and all of the other flavour and of the other iptables back end: flannel would
        leave those for ever, where they go on to masquerade and accept. PlatformError if a
        rule cannot be made; if something old cannot be removed, the log has it, and `repair`
        tries again.
        """
        self._networks = list(self._settings.networks)
        if previous is not None:
            self._networks.append(previous.network)
            if previous.network6 is not None:
                self._networks.append(previous.network6)
        # Remove the old rules after adding the new, so that no packet meets neither.
        if self.is_wanted:
            await self._flavour.install(self._networks)
        await self._remove_old()

    async def repair(self) -> list[str]:
        """Restore missing rules; return what was missing, for the log. Cheap if nothing is.

        PlatformError if it cannot be put back. What somebody added stays.
        """
        if not self._is_old_gone and asyncio.get_running_loop().time() >= self._retry_at:
            await self._remove_old()
        return await self._flavour.repair() if self.is_wanted else []

    def memory(self) -> dict[str, Any]:
        """How the rules looked when they were made, as JSON: for a successor's `recall`."""
        return self._flavour.memory()

    def recall(self, memory: Mapping[str, Any]) -> bool:
        """In place of `set_up`: rules of equal settings are there, and `repair` looks after them.

        False if the memory is of no use: set them up.
        """
        self._networks = list(self._settings.networks)
        try:
            self._flavour.recall(memory, self._networks)
        except (KeyError, TypeError, ValueError):
            return False
        return True

    async def is_blind(self) -> bool:
        """Whether nobody reports changes of these rules: who keeps them has to look often.

        True if the program does not answer.
        """
        try:
            return await self._flavour.is_blind()
        except PlatformError:
            return True

    async def _remove_old(self) -> None:
        was_gone, self._is_old_gone = self._is_old_gone, False
        self._retry_at = asyncio.get_running_loop().time() + OLD_RETRY_S
        try:
            done = await try_all([self._remove_iptables, self._remove_nftables])
        except PlatformError as error:
            if was_gone:
                _log.warning("firewall: older rules may be left, and apply too: %s", error)
            return
        self._is_old_gone = True
        for line in Removal.of(done).removed:
            _log.info("firewall: removed what was there before: %s", line)

    async def _remove_iptables(self) -> Removal:
        if self.name == nftables.Nftables.name:
            return await iptables_removal.remove(self._networks, mark=self._settings.mark)
        return await iptables_removal.remove_others(self._settings, self._networks, self._binary)

    async def _remove_nftables(self) -> Removal:
        if self.name == nftables.Nftables.name:
            return await nftables.remove_unwanted(self._settings, self._networks)
        return await nftables.remove(self._networks, mark=self._settings.mark)


def make_firewall(
    settings: FirewallSettings, *, is_nftables: bool, binary: str = "iptables"
) -> Firewall:
    """The flavour asked for; `binary` picks an iptables back end, e.g. iptables-legacy."""
    if is_nftables:
        return Firewall(settings, nftables.Nftables(settings), binary)
    return Firewall(settings, iptables.Iptables(settings, binary=binary), binary)


async def remove_all(
    networks: Iterable[Network] | None, mark: str = "", *, spares_direct: bool = False
) -> Removal:
    """Remove everything of ours with that mark, of both flavours and families, and nothing else.

    `networks` are those whose rules may go: flannel's direct ones (unless spares_direct), and
    those in chains and tables of flannel's own name, where other networks' stay. None: whatever
    is in these. Programs that are not installed have nothing to remove. PlatformError after all
    was tried.
    """
    return await _remove(networks, mark, is_dry_run=False, spares_direct=spares_direct)


async def leftovers(
    networks: Iterable[Network] | None, mark: str = "", *, spares_direct: bool = False
) -> Removal:
    """List what `remove_all` would remove, in the same words."""
    return await _remove(networks, mark, is_dry_run=True, spares_direct=spares_direct)


async def _remove(
    networks: Iterable[Network] | None, mark: str, *, is_dry_run: bool, spares_direct: bool
) -> Removal:
    known = None if networks is None else list(networks)
    parts: list[Removal] = []

    async def with_iptables() -> None:
        parts.append(
            await iptables_removal.remove(
                known, mark=mark, is_dry_run=is_dry_run, spares_direct=spares_direct
            )
        )

    async def with_nft() -> None:
        parts.append(await nftables.remove(known, mark=mark, is_dry_run=is_dry_run))

    try:
        await try_all([with_iptables, with_nft])
    except PlatformError as error:
        found = Removal.of(parts).removed
        done = f" (found all the same: {', '.join(found)})" if found else ""
        raise PlatformError(f"{error}{done}", error.errno) from None
    return Removal.of(parts)
