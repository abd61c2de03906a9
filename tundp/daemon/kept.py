"""Keeps the descriptor store equal to what the daemon has open: see linux/fd_store.py.

What is there already is not sent again. What was replaced, as a TUN device that was made anew, is
removed before its successor is put there: the store would keep both alive.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final

from tundp.linux import fd_store
from tundp.linux.tun_device import device_of

_log = logging.getLogger(__name__)

AGAIN_S: Final = 5.0
"""Between two looks at what could not be sent, or was made again without saying so."""

Token = tuple[object, ...]
Source = Callable[[], Mapping[str, int]]
"""Names and duplicates of descriptors, which are closed after use."""


class Kept:
    """The store as it must be by now. All of it on one thread."""

    def __init__(self, found: Mapping[str, int] | None = None) -> None:
        """found: what this process was given, still open."""
        self._there = {name: token_of(fd) for name, fd in (found or {}).items()}
        self._sources: dict[tuple[str, ...], Source] = {}
        self._is_said = False

    @property
    def names(self) -> frozenset[str]:
        """What is in the store, as far as is known."""
        return frozenset(self._there)

    def follow(self, owned: tuple[str, ...], source: Source) -> None:
        """Keep what `source` says from now on, and nothing else whose name begins as in `owned`."""
        self._sources[owned] = source

    def freeze(self) -> None:
        """Leave the store as it is: what is closed from now on is what the next start needs."""
        self._sources.clear()

    def forget(self, name: str) -> None:
        """Let the store close what has this name, or a name that begins with `tun-` or `udp-`.

        Returns when it has done so, or after a second. Blocks.
        """
        is_prefix = name in fd_store.QUEUES
        gone = [
            each for each in self._there if each == name or (is_prefix and each.startswith(name))
        ]
        for each in gone:
            if fd_store.remove(each):
                del self._there[each]
        if gone and not fd_store.settle():
            _log.warning("the descriptor store does not answer: what it has as %s lives on", gone)

    def sync(self) -> None:
        """Send the store what it lacks. What cannot be sent now is sent the next time."""
        if not fd_store.is_there():
            return
        try:
            for owned, source in self._sources.items():
                wanted = source()
                try:
                    self._bring(owned, wanted)
                finally:
                    for fd in wanted.values():
                        os.close(fd)
        except OSError as error:
            # Short of descriptors, which is said elsewhere.
            _log.debug("the descriptor store is not up to date: %s", error)
        if self._there and not self._is_said:
            self._is_said = True
            _log.info(
                "the descriptor store has for the next start: %s", ", ".join(sorted(self._there))
            )

    async def keep(self) -> None:
        """`sync` every AGAIN_S until cancelled."""
        while True:
            self.sync()
            await asyncio.sleep(AGAIN_S)

    def _bring(self, owned: tuple[str, ...], wanted: Mapping[str, int]) -> None:
        for name in [each for each in self._there if each.startswith(owned)]:
            if name not in wanted and fd_store.remove(name):
                del self._there[name]
        for name, fd in wanted.items():
            token = token_of(fd)
            if self._there.get(name) == token:
                continue
            if name in self._there and not fd_store.remove(name):
                continue
            self._there.pop(name, None)
            if not fd_store.put(name, fd):
                return  # nor is there room for the others: the next time
            self._there[name] = token


def token_of(fd: int) -> Token:
    """What two descriptors of the same thing have in common, and those of two things not.

    A socket and a memfd have a number of their own (their inode), all TUN devices one together:
    there it is the device.
    """
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino, device_of(fd))
