"""What the attackers share: decks of kinds from one seed, a tally, and when honest loss is due."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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

    def excuse(self, at: float) -> str | None:
        """Why a packet sent at this time may be lost; None if it may not."""
        return next((why for begin, end, why in self.windows if begin <= at <= end), None)


BEFORE_S = 0.5
"""Packets sent so long before a fault may still have been under way."""


def deck(rng: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Every kind once in a random order, then every kind once more, without end."""
    while True:
        order = list(kinds)
        rng.shuffle(order)
        yield from order
