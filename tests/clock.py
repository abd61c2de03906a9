"""A clock without waiting, for tests of what takes seconds or days."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class Hurried(asyncio.SelectorEventLoop):
    """A loop whose clock goes to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        # Not 0: the clock of a machine that has been up for a while.
        self.now = 1_000_000.0
        super().__init__(_Hasty(self))

    def time(self) -> float:
        return self.now


class _Hasty(selectors.DefaultSelector):
    def __init__(self, loop: Hurried) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("nothing is left that could happen")
        if not ready and timeout:
            self._loop.now += max(timeout, 1e-6)
        return ready
