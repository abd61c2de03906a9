"""Which hops have been in use for a while: they are asked for the round-trip time now and then."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from tundp.engine.base import HopActivity

USE_S: Final = 10.0
"""From the first packet to the first question: what is over by then is not worth one."""
AGAIN_S: Final = 60.0


class Usage:
    """When each hop was first used, and is to be asked again. Numpy passes, however many."""

    def __init__(self) -> None:
        self._bytes: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._first: npt.NDArray[np.float64] = np.zeros(0)
        self._due: npt.NDArray[np.float64] = np.zeros(0)

    def due(
        self, activity: HopActivity, unanswered: npt.NDArray[np.float64], now: float
    ) -> list[int]:
        """Hop ids to ask: in use now and for USE_S, answering, and not asked for AGAIN_S.

        unanswered: Unanswered.since.
        """
        sent = activity.bytes_out.copy()
        count = len(sent)
        if count != len(self._bytes):
            kept = min(count, len(self._bytes))
            first, due = np.full(count, np.inf), np.zeros(count)
            first[:kept], due[:kept] = self._first[:kept], self._due[:kept]
            self._first, self._due = first, due
            before = np.zeros(count, np.uint64)
            before[:kept] = self._bytes[:kept]
            self._bytes = before
        is_used = sent != self._bytes
        self._bytes = sent
        self._first[is_used] = np.minimum(self._first[is_used], now)
        is_due = is_used & (now - self._first >= USE_S) & (now >= self._due)
        return [int(each) for each in np.flatnonzero(is_due & (unanswered[:count] == 0))]

    def asked(self, hop_id: int, now: float) -> None:
        """The hop is asked at `now`."""
        self._due[hop_id] = now + AGAIN_S
