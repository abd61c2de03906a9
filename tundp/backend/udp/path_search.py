"""How large a packet a path carries, by what is answered: decisions without I/O or clock.

    check    the full size, what was measured before and the next larger one, and the floor
    search   common sizes between the floor and the full size, all at once

Each size is asked up to TRIES times, the full size alone at first: a wide path costs one packet.
The full size answered: nothing is narrow, whatever was said.
Nothing answered: nothing is known, since a peer, or a firewall on the way, may not answer at all.
Only a size that was answered, below one that was not, makes a path narrow. `path_prober.py` carries
the decisions out. Sizes are those of inner packets, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from tundp.wire import overhead

FLOOR: Final = 552
"""No path is called narrower: below it Linux hosts clear DF (net.ipv4.route.min_pmtu), and what a
path does not carry a router fragments."""
TRIES: Final = 3
COMMON: Final = tuple(
    size - overhead.OVERHEAD
    for size in (
        9000,
        8966,
        8500,
        4352,
        2048,
        1500,
        1492,  # PPPoE
        1480,  # IPIP
        1476,  # GRE
        1460,
        1450,  # VXLAN
        1440,
        1428,
        1420,  # WireGuard
        1412,
        1400,
        1380,
        1360,
        1340,
        1320,
        1300,
        1280,
        1240,
        1200,
        1100,
        1006,
        900,
        800,
        700,
        620,
    )
)
"""Path MTUs that are common, less the outer headers, descending."""


class Answer(Enum):
    """What a search found."""

    FULL = "full"
    """The full size arrives."""
    NARROW = "narrow"
    """`PathSearch.largest` arrives, larger packets do not."""
    UNKNOWN = "unknown"
    """Nothing was answered."""


@dataclass(slots=True)
class PathSearch:
    """One measurement of one path. Ask for `next_sizes` at a steady pace until there is a result.

    full: what there would be without any limit, more than FLOOR. known: what was measured before.
    """

    full: int
    known: int | None
    result: Answer | None = None
    largest: int = 0
    """The largest size answered so far; 0: none."""
    _tries: int = 0
    _is_searching: bool = False

    def next_sizes(self) -> tuple[int, ...]:
        """Sizes to ask for now, largest first; empty while waiting, and when there is a result."""
        if self.result is None and self._tries > TRIES:
            self._conclude()
        if self.result is not None:
            return ()
        self._tries += 1
        if self._tries > TRIES:
            return ()  # the last answers have the time of one more pace
        return tuple(size for size in self._candidates() if size > self.largest)

    def answered(self, size: int) -> None:
        """A packet of this size arrived, and its answer came back."""
        self.largest = max(self.largest, size)
        if self.largest >= self.full:
            self.result = Answer.FULL

    def _candidates(self) -> list[int]:
        if self._is_searching:
            return [self.full, *self._between(self.largest, self.full)]
        if self._tries == 1:
            return [self.full]
        sizes = {self.full, FLOOR}
        if self.known is not None and FLOOR <= self.known < self.full:
            sizes |= {self.known, *self._between(self.known, self.full)[-1:]}
        return sorted(sizes, reverse=True)

    def _between(self, low: int, high: int) -> list[int]:
        return [size for size in COMMON if low < size < high]

    def _conclude(self) -> None:
        """All tries of this stage were made: a result, or the next stage."""
        if self.largest == 0:
            self.result = Answer.UNKNOWN
        elif self._is_searching or self.largest == self.known:
            self.result = Answer.NARROW
        else:
            self._is_searching = True
            self._tries = 0
