"""What was counted before an engine began: by a predecessor's, or by the workers of an early start.

An engine adds it to what it counts itself (Dataplane.go_on_from), so that no counter goes back
while a node lives on in another process. Hops are told apart by the address of their endpoint: hop
ids are one process's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.engine.counters import (
    COUNTERS,
    DIRECTION_COUNTERS,
    HOP_SUMS,
    Counters,
    DirectionCounters,
)
from tundp.wire.coalesce import Miss
from tundp.wire.drop import DropReason

HOP_TIMES: Final = ("last_heard_ns", "last_refused_ns")
"""CLOCK_MONOTONIC, which all processes of a host share; 0 never."""
HOP_BASE_DTYPE: Final = np.dtype(
    [("endpoint", "=u8"), *((name, "=u8") for name in (*HOP_SUMS, *HOP_TIMES, "last_errno"))]
)
"""One hop: `endpoint` is its address in host order; 0 stands for packets without a hop."""
_LOCAL: Final = 1 << 32
"""`endpoint` of the hop that stands for this node's own subnet, hop id 1."""


def no_hops() -> npt.NDArray[np.void]:
    """No hop has counted anything."""
    return np.zeros(0, HOP_BASE_DTYPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterBase:
    """Counters of a node until now. Treated as immutable."""

    totals: Counters = field(default_factory=Counters)
    hops: npt.NDArray[np.void] = field(default_factory=no_hops)
    """HOP_BASE_DTYPE: hops that have counted anything, ascending by endpoint, each once."""

    def __add__(self, other: CounterBase) -> CounterBase:
        total = Counters()
        for each in (self.totals, other.totals):
            add(total, each)
        return CounterBase(totals=total, hops=_merged(np.concatenate([self.hops, other.hops])))

    def with_counted(self, counted: Counters, *, has_old_socks: bool) -> Counters:
        """Counters of a node: of before, and `counted` since.

        has_old_socks: the sockets are those of before: the kernel's count of what they lost goes
        on, and is in `counted` from their beginning (SO_RXQ_OVFL).
        """
        total = Counters()
        add(total, self.totals)
        add(total, counted)
        if has_old_socks:
            before = self.totals.socket_overflows
            total.socket_overflows = max(before, counted.socket_overflows)
        return total

    def by_hop(self, hop_array: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.int64], Any]:
        """Hop ids in `hop_array` (lease.fib.HOP_DTYPE), and the row of `hops` for each.

        Hops that are not there any more are left out; of several at one address the first has it.
        """
        endpoints = endpoints_of(hop_array)
        wanted, ids = np.unique(endpoints, return_index=True)
        found, at_wanted, at_hops = np.intersect1d(
            wanted, self.hops["endpoint"], assume_unique=True, return_indices=True
        )
        del found
        return ids[at_wanted], self.hops[at_hops]


def endpoints_of(hop_array: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """`endpoint` of each hop id. An unused id has that of no hop."""
    endpoints = hop_array["address"].astype(np.uint64)
    endpoints[1:2] = _LOCAL
    return endpoints


def hop_rows(
    hop_array: npt.NDArray[np.void], columns: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.void]:
    """HOP_BASE_DTYPE of the hops that have counted anything. columns: by hop id."""
    rows = np.zeros(len(hop_array), HOP_BASE_DTYPE)
    rows["endpoint"] = endpoints_of(hop_array)
    for name, column in columns.items():
        rows[name] = column[: len(rows)]
    has_counted = np.zeros(len(rows), np.bool_)
    for name in columns:
        has_counted |= rows[name] != 0
    has_counted[1:] &= rows["endpoint"][1:] != 0  # an unused id: its hop is gone
    return _merged(rows[has_counted])


def add(total: Counters, counted: Counters) -> None:
    """Add `counted` to `total`."""
    for spec in COUNTERS:
        setattr(total, spec.name, getattr(total, spec.name) + getattr(counted, spec.name))
    for direction, source in ((total.encap, counted.encap), (total.decap, counted.decap)):
        for spec in DIRECTION_COUNTERS:
            value = getattr(direction, spec.name) + getattr(source, spec.name)
            setattr(direction, spec.name, value)
        for counts, more in ((direction.latency, source.latency), (direction.drops, source.drops)):
            for number, count in enumerate(more):
                counts[number] += count
    for number, count in enumerate(counted.coalesce_misses):
        total.coalesce_misses[number] += count
    for name, count in counted.errnos.items():
        total.errnos[name] = total.errnos.get(name, 0) + count


def from_document(document: Mapping[str, Any]) -> Counters:
    """The counters Counters.as_dict made a document of, maybe those of another version.

    What this one does not count is left out, what that one did not count is 0. ValueError if it is
    no such document.
    """
    try:
        counters = Counters()
        for spec in COUNTERS:
            setattr(counters, spec.name, int(document.get(spec.name, 0)))
        for name, direction in (("encap", counters.encap), ("decap", counters.decap)):
            _read_direction(direction, document[name])
        misses = document.get("coalesce_misses", {})
        for miss in Miss:
            counters.coalesce_misses[miss] = int(misses.get(miss.label, 0))
        counters.errnos = {
            str(name): int(count) for name, count in document.get("errnos", {}).items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no counters: {error!r}") from None
    return counters


def _read_direction(direction: DirectionCounters, document: Mapping[str, Any]) -> None:
    for spec in DIRECTION_COUNTERS:
        setattr(direction, spec.name, int(document.get(spec.name, 0)))
    for reason in DropReason:
        direction.drops[reason] = int(document.get("drops", {}).get(reason.label, 0))
    latency = [int(count) for count in document.get("latency", ())]
    if len(latency) == len(direction.latency):
        direction.latency = latency


def _merged(rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """One row for each endpoint, ascending."""
    endpoints, which = np.unique(rows["endpoint"], return_inverse=True)
    if len(endpoints) == len(rows):
        return rows[np.argsort(rows["endpoint"])]
    merged = np.zeros(len(endpoints), HOP_BASE_DTYPE)
    merged["endpoint"] = endpoints
    for name in HOP_SUMS:
        np.add.at(merged[name], which, rows[name])
    np.maximum.at(merged["last_heard_ns"], which, rows["last_heard_ns"])
    # The errno is that of the last refusal: rows in the order of their times, the last one stays.
    order = np.argsort(rows["last_refused_ns"], kind="stable")
    merged["last_refused_ns"][which[order]] = rows["last_refused_ns"][order]
    merged["last_errno"][which[order]] = rows["last_errno"][order]
    return merged
