"""Packets the kernel dropped at the TUN's queue: a sum over the devices there have been."""

from __future__ import annotations

import contextlib

from tundp.errors import PlatformError
from tundp.linux.losses import tx_counts


class QueueDrops:
    """Adds up what each device dropped while it was ours. Never goes back.

    What a device dropped between the last `count` and its deletion is not known to anybody.
    """

    def __init__(self) -> None:
        self._index = 0
        self._seen = 0
        self._total = 0

    def follow(self, index: int, *, is_adopted: bool) -> None:
        """Count for this device from now on. is_adopted: what it dropped before is not ours."""
        self.count()
        self._index = index
        self._seen = self._ask() or 0 if is_adopted else 0

    def count(self) -> int:
        """Packets dropped until now."""
        dropped = self._ask()
        if dropped is not None and dropped > self._seen:
            self._total += dropped - self._seen
            self._seen = dropped
        return self._total

    def _ask(self) -> int | None:
        if self._index:
            with contextlib.suppress(PlatformError):
                return tx_counts(self._index).dropped
        return None
