"""Pauses between tries, and log lines about what lasts: two a minute at most, whatever happens.

Outage    something fails, and is tried again
Contest   two programs undo each other's work
Pace      something costly, not all the time
Ration    how many lines of one kind may be logged
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

REMIND_S: Final = 60.0
"""A lasting outage is mentioned again this often."""
LINES: Final = 2
"""Lines about one thing in any REMIND_S."""
REASONS: Final = 4
"""Different reasons of one outage that are logged at once."""
PACE: Final = 3.0
"""Pause after something costly, in parts of the time it took."""
PAUSE_MAX_S: Final = 10.0
CONTEST: Final = 3
"""Times that somebody undid the same work within REMIND_S, from which on it is a contest."""


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


class Pace:
    """Of something costly, a quarter of the time at most: it is followed by three times its cost.

    Such as reading all leases for an event: whoever rewrites one all the time must not make us
    read tens of thousands each time. The pause is PAUSE_MAX_S at most, and none after a failure.
    """

    def __init__(self) -> None:
        self._free_at = float("-inf")

    async def run(self, act: Callable[[], Awaitable[T]]) -> T:
        """Await `act()` once its time has come."""
        clock = asyncio.get_running_loop().time
        if (wait_s := self._free_at - clock()) > 0:
            await asyncio.sleep(wait_s)
        began = clock()
        result = await act()
        self._free_at = clock() + min(PAUSE_MAX_S, PACE * (clock() - began))
        return result


class Ration:
    """A number of log lines of one kind for any REMIND_S. Pure: times are the caller's."""

    def __init__(self, lines: int = LINES) -> None:
        self._times: deque[float] = deque(maxlen=lines)
        self.withheld = 0
        """Lines refused since the last one that was granted."""

    def take(self, now: float) -> bool:
        """Whether one more line may be logged at `now` (monotonic seconds)."""
        times = self._times
        if len(times) == times.maxlen and now - times[0] < REMIND_S:
            self.withheld += 1
            return False
        self.spend(now)
        return True

    def spend(self, now: float) -> None:
        """Count a line that is logged whatever was logged before."""
        self._times.append(now)

    def withheld_words(self) -> str:
        """` (and N more since)` about the lines refused, which count as reported; or empty."""
        count, self.withheld = self.withheld, 0
        return f" (and {count} more since)" if count else ""


class TokenBucket:
    """Lines of one kind: `burst` at once, then one each REMIND_S; the rest is counted."""

    def __init__(self, burst: int) -> None:
        self.withheld = 0
        """Lines refused, and not yet told of."""
        self._burst = self._tokens = float(burst)
        self._at = float("-inf")
        self._summaries = Ration(1)

    def take(self, now: float) -> bool:
        """Whether one more line may be logged at `now` (monotonic seconds)."""
        if self._at > float("-inf"):
            self._tokens = min(self._burst, self._tokens + (now - self._at) / REMIND_S)
        self._at = now
        if self._tokens < 1:
            self.withheld += 1
            return False
        self._tokens -= 1
        return True

    def may_summarise(self, now: float) -> bool:
        """Whether a line about those withheld may be logged: one in REMIND_S."""
        return self._summaries.take(now)


class Outage:
    """One line when something fails, one a minute while it lasts, one when it is over.

    Something that fails and works by turns, or fails in other words each time, costs no more.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self.what = what
        """What fails, for people."""
        self._logger = logger
        self._since: float | None = None
        self._ration = Ration()
        self._said_at = 0.0
        self._said = ""
        self._is_said = False
        """Whether the log says that it fails just now."""
        self._ended_at = float("-inf")
        self._unsaid = 0
        self._reasons: set[str] = set()
        """What was logged of this outage."""
        self.error = ""
        """How the last try failed; empty if it did not."""

    @property
    def is_on(self) -> bool:
        """Whether the last try failed."""
        return self._since is not None

    def failed(self, error: object, *, now: float) -> None:
        """Report one failed try at `now` (monotonic seconds)."""
        self.error = text = str(error)
        if self._since is None:
            self._since = now
        if self._is_said and now - self._said_at < REMIND_S:
            is_flapping = now - self._ended_at < REMIND_S
            if text == self._said or is_flapping:
                self._unsaid += 1
                return
        is_new_reason = text not in self._reasons and 0 < len(self._reasons) < REASONS
        if is_new_reason:
            self._ration.spend(now)
        elif not self._ration.take(now):
            self._unsaid += 1
            return
        self._reasons.add(text)
        repeated = f" (failed {self._unsaid} more times since)" if self._unsaid else ""
        self._logger.warning("%s: %s; retrying%s", self.what, text, repeated)
        self._said, self._said_at, self._unsaid = text, now, 0
        self._is_said = True

    def ended(self, *, now: float) -> None:
        """Report a success at `now`; silent if nothing had failed, or nobody was told so."""
        self.error = ""
        if self._since is None:
            return
        if self._is_said:
            self._logger.info("%s: working again after %.1f s", self.what, now - self._since)
            self._ration.spend(now)
            self._ended_at, self._unsaid = now, 0
        self._is_said = False
        self._since = None
        self._reasons.clear()


class Contest:
    """Two programs that undo each other's work: named, and not answered with a line each time."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._ration = Ration()
        self._times: deque[float] = deque(maxlen=1000)

    def note(self, *, now: float) -> None:
        """Count that somebody undid our work at `now` (monotonic seconds); nothing is logged."""
        self._times.append(now)

    def undone(self, what: str, *, now: float) -> None:
        """The same, and log that we did it again."""
        self.note(now=now)
        if self._ration.take(now):
            contest = self.words(now=now)
            self._logger.warning("%s%s", what, f": {contest}" if contest else "")

    def words(self, *, now: float) -> str:
        """Who fights over it, and how often, for status and readyz; empty if nobody does."""
        while self._times and now - self._times[0] >= REMIND_S:
            self._times.popleft()
        count = len(self._times)
        if count < CONTEST:
            return ""
        return (
            f"another program has undone it {count} times in the last minute: stop one of the two"
        )
