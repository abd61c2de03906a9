"""What the counters of a daemon mean, for metrics and `tundp status`.

All of it is the engines' table (engine/counters.py). A counter that is not in it is of a newer
daemon, and is shown under its name all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tundp.engine.counters import COUNTERS, CounterSpec
from tundp.observe.status import CountersStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """A counter broken down by a reason."""

    means: str
    metric: str
    label: str
    """What it is broken down by."""
    is_notable: bool
    """Whether a count above 0 is worth an operator's attention."""


BREAKDOWNS: Final[Mapping[str, Breakdown]] = MappingProxyType(
    {
        "coalesce_misses": Breakdown(
            means="packets written to the TUN alone, by the reason",
            metric="tundp_coalesce_misses",
            label="reason",
            is_notable=False,
        ),
        "errnos": Breakdown(
            means="system calls of the packet path the kernel refused",
            metric="tundp_kernel_refusals",
            label="errno",
            is_notable=True,
        ),
    }
)
_SPECS: Final[Mapping[str, CounterSpec]] = MappingProxyType({spec.name: spec for spec in COUNTERS})


def spec_of(name: str) -> CounterSpec | None:
    """The row of the counter `name`, None if this version knows none."""
    return _SPECS.get(name)


def sentence(means: str) -> str:
    """A row's meaning as the HELP line of a metric."""
    return f"{means[0].upper()}{means[1:]}."


def latency_text(counters: CountersStatus) -> str:
    """How long packets are in the engine, by direction; empty before any was measured."""
    parts = []
    for name, counted in counters.directions:
        half, most = (counted.latency_us(share) for share in (0.5, 0.99))
        if half is not None and most is not None:
            parts.append(f"{name} 50 % {_within(half)}, 99 % {_within(most)}")
    return f"time in the engine: {'; '.join(parts)}" if parts else ""


def _within(bound_us: int) -> str:
    return f"within {bound_us:,} us" if bound_us else "above 1 s"
