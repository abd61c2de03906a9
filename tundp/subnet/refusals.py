"""Refused starts, remembered on disk: a supervisor's restarts question a live node seldom.

    <state-dir>/refused-last-known.json    who and why, how often in a row, when last

A duplicate node exits and names the other one, and systemd starts it again two seconds later.
Each start challenges the other's lease: a write, a warning there, an etcd lease. So from the
third refusal in a row on a start waits, up to a minute, before it asks again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tundp.files import SMALL_LEN, read_regular, write_atomically

FIRST_PAUSE_S: Final = 15.0
"""Pause before the third try in a row; it doubles from try to try."""
PAUSE_MAX_S: Final = 60.0


class Refusals:
    """The refusals of one instance. Whatever cannot be read or written is as if there were none."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        """clock: Unix time in seconds."""
        self._path = path
        self._clock = clock

    def pause(self, who: str) -> tuple[float, str]:
        """How many seconds to wait before `who` asks again, 0 for none, and why it was refused."""
        _, why, count, at = self._read(who)
        if count < 2:
            return 0.0, ""
        pause_s = min(PAUSE_MAX_S, FIRST_PAUSE_S * 2 ** min(count - 2, 10))
        # The clock may have been set meanwhile.
        left_s = min(pause_s, at + pause_s - self._clock())
        return max(0.0, left_s), why

    def note(self, who: str, why: str) -> None:
        """`who` (node id and PublicIP) was refused for `why`, once more."""
        count = self._read(who)[2] + 1
        document = {"who": who, "why": why, "count": count, "at": self._clock()}
        if self._path is not None:
            try:
                write_atomically(self._path, json.dumps(document) + "\n", mode=0o600)
            except OSError:
                return  # the lease cache has told of it

    def clear(self) -> None:
        """Nobody refuses any more."""
        if self._path is not None:
            try:
                self._path.unlink(missing_ok=True)
            except OSError:
                return

    def _read(self, who: str) -> tuple[str, str, int, float]:
        nothing = (who, "", 0, 0.0)
        if self._path is None:
            return nothing
        try:
            document = json.loads(read_regular(self._path, most_len=SMALL_LEN, is_ours=True))
            found = (
                str(document["who"]),
                str(document["why"]),
                int(document["count"]),
                float(document["at"]),
            )
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return nothing
        return found if found[0] == who else nothing
