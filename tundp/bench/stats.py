"""Medians, bootstrap intervals, ratios paired by round, and when a difference is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

RESAMPLES: Final = 2000
ROUNDS_MIN: Final = 5
"""With fewer samples the bootstrap's interval is far too narrow."""
CONFIDENCE: Final = 95.0
NOISE_LIMIT: Final = 0.25
"""Where the baseline differs from itself by more, nothing is compared with it."""
SAME_WITHIN: Final = 0.1
"""An interval that lies so close to 1 is a finding: the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A median, its bootstrap 95 % interval, and the spread (max - min) of the samples."""

    median: float
    low: float
    high: float
    spread: float
    count: int


def estimate(samples: Sequence[float], seed: int = 0) -> Estimate | None:
    """None without samples. The bootstrap is seeded: the same samples give the same interval."""
    values = np.asarray(samples, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    rng = np.random.default_rng(seed)
    resampled = rng.choice(values, (RESAMPLES, len(values)))
    medians = np.median(resampled, axis=1)
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Estimate(
        median=float(np.median(values)),
        low=float(low),
        high=float(high),
        spread=float(values.max() - values.min()),
        count=len(values),
    )


def paired_ratio(
    rows: dict[int, float], baseline: dict[int, float], seed: int = 0
) -> Estimate | None:
    """Ratio of `rows` to `baseline`, round by round, so that slow drift cancels out."""
    ratios = [
        value / baseline[number]
        for number, value in rows.items()
        if baseline.get(number) and np.isfinite(value)
    ]
    return estimate(ratios, seed)


def noise_floor(ratios: Estimate | None) -> float | None:
    """How far from 1 the ratio of a row to itself was: nothing smaller can be claimed."""
    if ratios is None:
        return None
    return max(abs(ratios.high - 1), abs(1 - ratios.low))


def verdict(ratio: Estimate | None, noise: float | None, *, more_is_better: bool) -> str:
    """`better`, `worse`, `same`, `undecided`, `not comparable`, or `n/a`: not measured enough.

    A difference must clear the noise. The same is what lies within SAME_WITHIN of 1 with its whole
    interval, noise no larger than that; the rest is undecided. Above NOISE_LIMIT nothing is said.
    """
    if ratio is None or noise is None or ratio.count < ROUNDS_MIN:
        return "n/a"
    if noise > NOISE_LIMIT:
        return "not comparable"
    if ratio.low > 1 + noise:
        return "better" if more_is_better else "worse"
    if ratio.high < 1 - noise:
        return "worse" if more_is_better else "better"
    is_close = ratio.low >= 1 - SAME_WITHIN and ratio.high <= 1 + SAME_WITHIN
    return "same" if is_close and noise <= SAME_WITHIN else "undecided"
