"""The counters of C workers, added up."""

from __future__ import annotations

import errno
from typing import Any

from tundp.engine.counters import COUNTERS, DIRECTION_COUNTERS, Counters
from tundp.wire.coalesce import Miss
from tundp.wire.drop import DropReason


def add_counters(total: Counters, counted: Any) -> None:
    """Add a worker's struct tundp_counters, as tundp_worker_counters copied it, to `total`."""
    for spec in COUNTERS:
        setattr(total, spec.name, getattr(total, spec.name) + getattr(counted, spec.name))
    for direction, source in ((total.encap, counted.encap), (total.decap, counted.decap)):
        for spec in DIRECTION_COUNTERS:
            value = getattr(direction, spec.name) + getattr(source, spec.name)
            setattr(direction, spec.name, value)
        for number, count in enumerate(source.latency):
            direction.latency[number] += count
        for reason in DropReason:
            direction.drops[reason] += source.drops[reason]
    for miss in Miss:
        total.coalesce_misses[miss] += counted.coalesce_misses[miss]
    for number, count in enumerate(counted.errnos):
        if count:
            name = errno.errorcode.get(number, "other")
            total.errnos[name] = total.errnos.get(name, 0) + count
