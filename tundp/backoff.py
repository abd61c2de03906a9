"""Waiting between tries, and saying so without flooding the log."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final

REMIND_S: Final = 60.0
"""A lasting outage is mentioned again this often."""


class Backoff:
    """Delays that double from `first_s` to `ceiling_s`, each shortened by up to a half.

    The jitter keeps a cluster of daemons from coming back at an etcd in step.
    """

    def __init__(
        self, first_s: float, ceiling_s: float, rng: Callable[[], float] = random.random
    ) -> None:
        self._first_s = first_s
        self._ceiling_s = ceiling_s
        self._rng = rng
        self._next_s = first_s

    def next_s(self) -> float:
        """Seconds to wait before the next try."""
        delay = self._next_s * (1 - self._rng() / 2)
        self._next_s = min(self._ceiling_s, self._next_s * 2)
        return delay

    def reset(self) -> None:
        """Start over, after a success."""
        self._next_s = self._first_s


class Outage:
    """One line when something fails, one a minute while it lasts, one when it is over."""

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._since: float | None = None
        self._said_at = 0.0
        self._said = ""
        self._unsaid = 0

    @property
    def is_on(self) -> bool:
        """Whether the last try failed."""
        return self._since is not None

    def failed(self, error: object, *, now: float) -> None:
        """Report one failed try at `now` (monotonic seconds)."""
        text = str(error)
        if self._since is None:
            self._since = now
        elif text == self._said and now - self._said_at < REMIND_S:
            self._unsaid += 1
            return
        repeated = f" (failed {self._unsaid} more times since)" if self._unsaid else ""
        self._logger.warning("%s: %s; retrying%s", self._what, text, repeated)
        self._said, self._said_at, self._unsaid = text, now, 0

    def ended(self, *, now: float) -> None:
        """Report a success at `now`; silent if nothing had failed."""
        if self._since is None:
            return
        self._logger.info("%s: working again after %.1f s", self._what, now - self._since)
        self._since = None
        self._unsaid = 0
