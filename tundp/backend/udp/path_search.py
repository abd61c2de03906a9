"""How large a packet a path carries, by what is answered: decisions without I/O or clock.

    check    the full size, what was measured before and the next larger one, and the floor
    search   common sizes between the largest answered and the full size
    confirm  the full size and the size above the largest answered, which is asked again, too

Each stage is a series of rounds, one a pace; the first asks for the full size alone: a wide path
costs one packet. The full size answered: nothing is narrow, whatever was said. Nothing answered:
nothing is known, since a peer, or a firewall on the way, may not answer at all.

A path is called narrow by rounds that tell its width from loss: the size above the largest was
asked and not answered, a smaller one of the same round was. A path that takes the full size, but
loses each request or its answer with probability p, passes for a narrow one with a probability of
at most p ** CONFIRM, 5.4e-7 for p = 0.3. Where the path was that narrow before, fewer rounds do.
`path_prober.py` carries the decisions out. Sizes are those of inner packets, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from tundp.wire import overhead

FLOOR: Final = 552
"""No path is called narrower: below it Linux hosts clear DF (net.ipv4.route.min_pmtu), and what a
path does not carry a router fragments."""
TRIES: Final = 3
"""Rounds before a search begins, and for what was known before."""
CONFIRM: Final = 12
"""Rounds that tell a narrow path from a lossy one."""
GRACE: Final = 2
"""Paces the answers of a round have before it tells anything."""
SILENT: Final = 7
"""Rounds asked for while nothing at all is answered ..."""
SILENT_PACES: Final = 10
"""... and paces until that is the result."""
ROUNDS_MAX: Final = 64
"""Rounds after which losses keep the search from a result."""
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
    """Nothing was answered, or too little for a result: `PathSearch.largest` says which."""


@dataclass(slots=True)
class _Round:
    """What was asked for at one pace, and the sizes answered since."""

    asked: tuple[int, ...]
    answered: set[int] = field(default_factory=set)


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
    _rounds: list[_Round] = field(default_factory=list)
    _searched: int = 0
    """Rounds of search and confirm so far."""
    _has_grown: bool = False
    """Whether `largest` is larger than at the round before."""

    @property
    def round(self) -> int:
        """Number of the round that `next_sizes` was asked for last, from 0."""
        return len(self._rounds) - 1

    def next_sizes(self) -> tuple[int, ...]:
        """Sizes to ask for now, largest first; empty while waiting, and when there is a result."""
        if self.result is None:
            self._conclude()
        if self.result is not None:
            return ()
        sizes = tuple(sorted(self._candidates(), reverse=True))
        self._rounds.append(_Round(sizes))
        self._has_grown = False
        return sizes

    def answered(self, size: int, of_round: int) -> None:
        """A packet of this size, of the round of this number, arrived: its answer came back."""
        self._rounds[of_round].answered.add(size)
        if size > self.largest:
            self.largest = size
            self._has_grown = True
        if self.largest >= self.full:
            self.result = Answer.FULL

    def _candidates(self) -> set[int]:
        made = len(self._rounds)
        if made == 0:
            return {self.full}
        if not self.largest:
            return self._checked() if made < SILENT else set()
        if self._telling(made) >= self._needed():
            return set()  # enough, but for the time of late answers
        # As narrow as before: no search.
        if not self._searched and (made < TRIES or self.largest == self.known):
            return self._checked()
        above = [size for size in COMMON if self.largest < size < self.full]
        if self._searched >= TRIES - 1 and not self._has_grown:
            above = above[-1:]
        self._searched += 1
        return {self.full, *above, self.largest}

    def _checked(self) -> set[int]:
        """Sizes that show whether all is as before."""
        if self.known is None or not FLOOR <= self.known < self.full:
            return {self.full, FLOOR}
        sizes = {self.full, self.known, self._above(self.known)}
        return sizes if self.largest == self.known else sizes | {FLOOR}

    def _above(self, size: int) -> int:
        """The next larger size that can be told from this one."""
        return min((each for each in COMMON if size < each < self.full), default=self.full)

    def _conclude(self) -> None:
        """Judge the rounds whose answers had time to come."""
        made = len(self._rounds)
        if not self.largest:
            if made >= SILENT_PACES:
                self.result = Answer.UNKNOWN
            return
        if self._telling(made + 1 - GRACE) >= self._needed():
            self.result = Answer.NARROW
        elif made >= ROUNDS_MAX:
            self.result = Answer.UNKNOWN

    def _telling(self, count: int) -> int:
        """Of the first rounds, how many tell that the largest answered is the largest there is."""
        above = self._above(self.largest)
        return sum(above in each.asked and bool(each.answered) for each in self._rounds[:count])

    def _needed(self) -> int:
        """How many such rounds there must be."""
        was_known = self.known is not None and self.largest >= self.known
        return TRIES if was_known else CONFIRM
