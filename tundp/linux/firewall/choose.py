"""The firewall as the daemon uses it: set up once, looked after, cleaned up on request.

The rules are flannel's, byte for byte (see iptables.py and nftables.py), and like
flannel's they stay when the daemon ends: the overlay's packets still need them after a
restart. `tundp cleanup` removes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from ipaddress import IPv4Network
from typing import Final, Protocol

from tundp.errors import PlatformError
from tundp.linux.command import find, try_all
from tundp.linux.firewall import iptables, nftables
from tundp.linux.firewall.settings import FirewallSettings, NetworkPair, Previous

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

NETLINK_NETFILTER: Final = 12
"""uapi/linux/netlink.h"""
NFNLGRP_NFTABLES: Final = 7
"""uapi/linux/netfilter/nfnetlink.h: told of every change of tables, chains, rules and sets."""
SOL_NETLINK: Final = 270
NETLINK_NO_ENOBUFS: Final = 5
_RECEIVE_BUFFER: Final = 4096
"""Bytes. That something changed is all we ask; a full buffer says it as well as a message."""


class Firewall(Protocol):
    """One flavour's rules for one overlay. Not to be called twice at a time."""

    @property
    def name(self) -> str:
        """`iptables` or `nftables`."""
        ...

    async def set_up(self, previous: Previous | None) -> None:
        """Make the rules anew, jumps at the end; then remove what they replace.

        Replaced are rules for the network and subnet of the run before (`previous`), the
        other flavour's objects, and the rules flannel v0.11 made for either pair of
        network and subnet: flannel would leave those for ever, where they go on to
        masquerade and accept. A chain that is not wanted (is_masquerading,
        is_forwarding) is not touched. PlatformError if a rule cannot be made; if
        something old cannot be removed, the log says so.
        """
        ...

    async def repair(self) -> list[str]:
        """Look, and put back what is missing; what that was, for the log. Cheap if nothing is.

        PlatformError if it cannot be put back. What somebody added stays.
        """
        ...


def make_firewall(
    settings: FirewallSettings, *, is_nftables: bool, binary: str = "iptables"
) -> Firewall:
    """The flavour asked for; `binary` picks an iptables back end, e.g. iptables-legacy."""
    if is_nftables:
        return _NftablesFirewall(settings)
    return _IptablesFirewall(settings, binary)


class _IptablesFirewall:
    name: Final = iptables.Iptables.name

    def __init__(self, settings: FirewallSettings, binary: str) -> None:
        self._settings = settings
        self._rules = iptables.Iptables(settings, binary=binary)

    async def set_up(self, previous: Previous | None) -> None:
        # The old goes after the new has come, so that no packet meets neither.
        await self._rules.install(_pairs(self._settings, previous))
        await _remove_other(nftables.remove)

    async def repair(self) -> list[str]:
        return await self._rules.repair()


class _NftablesFirewall:
    name: Final = nftables.Nftables.name

    def __init__(self, settings: FirewallSettings) -> None:
        self._settings = settings
        self._rules = nftables.Nftables(settings)

    async def set_up(self, previous: Previous | None) -> None:
        await self._rules.install()
        pairs = _pairs(self._settings, previous)
        await _remove_other(partial(iptables.remove, pairs, mark=self._settings.mark))

    async def repair(self) -> list[str]:
        return await self._rules.repair()


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
    """What `remove_all` would remove, in the same words."""
    return await _remove(networks, mark, is_dry_run=True)


def needs_raw_sockets() -> bool:
    """Whether iptables here is the legacy one, which needs CAP_NET_RAW to reach the kernel."""
    path = find("iptables")
    return path is not None and "legacy" in os.path.basename(os.path.realpath(path))


@contextlib.asynccontextmanager
async def watch_ruleset() -> AsyncIterator[Callable[[float], Awaitable[bool]]]:
    """Gives `changed(timeout_s)`: True as soon as any nf_tables ruleset changed, else False.

    Nothing from the moment the block is entered is missed, our own changes included. A
    busy kube-proxy changes rules many times a second: whoever acts on this keeps a pause.
    iptables-legacy changes nothing the kernel tells of, and without CAP_NET_ADMIN it may
    tell nothing at all: then False comes at the timeout, and looking is the caller's.
    """
    is_changed = asyncio.Event()

    async def changed(timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await is_changed.wait()
        except TimeoutError:
            return False
        is_changed.clear()
        return True

    try:
        watcher = _open_watcher()
    except OSError as error:
        _log.info("firewall changes are not told by the kernel (%s): looking by the clock", error)
        yield changed
        return

    def drain() -> None:
        is_changed.set()
        while True:
            try:
                watcher.recv(1)  # the rest of the message goes unread
            except BlockingIOError:
                return
            except OSError as error:
                _log.warning("cannot read what the kernel tells of the firewall: %s", error)
                loop.remove_reader(watcher.fileno())
                return

    loop = asyncio.get_running_loop()
    with watcher:
        loop.add_reader(watcher.fileno(), drain)
        try:
            yield changed
        finally:
            loop.remove_reader(watcher.fileno())


def _open_watcher() -> socket.socket:
    watcher = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
    )
    try:
        watcher.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        # libuv takes the error a full buffer raises for the end of the descriptor, and never
        # looks at it again. We lose nothing by not being told: what is in the buffer wakes us.
        watcher.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        watcher.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
    except BaseException:
        watcher.close()
        raise
    return watcher


def _pairs(settings: FirewallSettings, previous: Previous | None) -> list[NetworkPair]:
    pairs = [(settings.network, settings.subnet)]
    if previous is not None:
        pairs.append((previous.network, previous.subnet))
    return pairs


async def _remove_other(remove: Callable[[], Awaitable[list[str]]]) -> None:
    try:
        for line in await remove():
            _log.info("firewall: removed what was there before: %s", line)
    except PlatformError as error:
        _log.warning("firewall: older rules may be left, and apply too: %s", error)


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
