"""What the attackers share: decks of kinds from one seed, a tally, and when honest loss is due."""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Score:
    """What was done, by (attacker, kind), and windows in which honest packets may be lost."""

    seed: int
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    packets: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """Sends the kernel of the sender refused, by attacker: they reached nobody."""
    windows: list[tuple[float, float, str]] = field(default_factory=list)
    """Monotonic seconds, from and to, and why."""

    def rng(self, name: str) -> random.Random:
        """A generator of its own for each attacker: timing changes nobody's choices."""
        return random.Random(f"{self.seed}:{name}")

    def fault(self, why: str, for_s: float) -> None:
        """From now on, and for so long, honest packets may be lost."""
        now = time.monotonic()
        self.windows.append((now - BEFORE_S, now + for_s, why))

    def excuses(self, times: Iterable[float]) -> list[str | None]:
        """Why a packet sent at each of these times may be lost; None if it may not."""
        windows = sorted(self.windows)
        begins = [begin for begin, _, _ in windows]
        # The window that ends last, of those that begin no later than each.
        last: list[tuple[float, float, str]] = []
        for window in windows:
            last.append(window if not last or window[1] > last[-1][1] else last[-1])
        found: list[str | None] = []
        for at in times:
            number = bisect_right(begins, at) - 1
            _, end, why = last[number] if number >= 0 else (0.0, float("-inf"), "")
            found.append(why if at <= end else None)
        return found


HEALTH_PORT = 10256
HONEST = 2
"""Honest traffic runs between so many of the first nodes: a fault at another excuses no loss."""
BEFORE_S = 0.5
"""Packets sent so long before a fault may still have been under way."""


def deck(rng: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Every kind once in a random order, then every kind once more, without end."""
    while True:
        order = list(kinds)
        rng.shuffle(order)
        yield from order
