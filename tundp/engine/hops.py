"""Per-hop state of an engine that keeps it in Python: counters and path state, by hop id."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tundp.choices import MtuOrigin
from tundp.engine.base import PATH_STATE_S, HopActivity, PathLimit, PathState, all_limited, limited
from tundp.engine.counter_base import CounterBase, hop_rows
from tundp.engine.counters import HOP_SUMS, HopCounters


@dataclass(slots=True)
class HopCount:
    """What is counted of one hop: HopCounters while it grows."""

    packets_out: int = 0
    bytes_out: int = 0
    packets_in: int = 0
    bytes_in: int = 0
    drops: int = 0
    queue_full: int = 0
    last_heard: float | None = None
    last_errno: str | None = None
    last_refused_ns: int = 0
    """Of the last refused send, CLOCK_MONOTONIC: not among HopCounters."""

    def counters(self) -> HopCounters:
        """The same, as it is now."""
        values = asdict(self)
        del values["last_refused_ns"]
        return HopCounters(**values)


class HopLedger:
    """Counters and path state by hop id; both live until the id is assigned anew."""

    def __init__(self) -> None:
        self._counts: dict[int, HopCount] = {}
        self._paths: dict[int, tuple[PathState, float]] = {}
        self._limits: dict[int, PathLimit] = {}
        self._went_on: list[tuple[int, Any]] = []
        """Hop ids and rows of the last `go_on_from`."""

    def go_on_from(self, base: CounterBase, hop_array: npt.NDArray[np.void]) -> None:
        """See Dataplane."""
        for hop_id, row in self._went_on:
            count = self.count(hop_id)
            for name in HOP_SUMS:
                setattr(count, name, getattr(count, name) - int(row[name]))
        ids, rows = base.by_hop(hop_array)
        self._went_on = list(zip(ids.tolist(), rows, strict=True))
        for hop_id, row in self._went_on:
            count = self.count(hop_id)
            for name in HOP_SUMS:
                setattr(count, name, getattr(count, name) + int(row[name]))
            if heard_ns := int(row["last_heard_ns"]):
                count.last_heard = (_unix_less_monotonic_ns() + heard_ns) / 1e9
            if refused_ns := int(row["last_refused_ns"]):
                count.last_refused_ns = refused_ns
                number = int(row["last_errno"])
                count.last_errno = errno.errorcode.get(number, str(number))

    def base_rows(self, hop_array: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """CounterBase.hops of what was counted so far."""
        names = (*HOP_SUMS, "last_heard_ns", "last_refused_ns", "last_errno")
        columns = {name: np.zeros(len(hop_array), np.uint64) for name in names}
        for hop_id, count in self._counts.items():
            if hop_id < len(hop_array):
                for name in (*HOP_SUMS, "last_refused_ns"):
                    columns[name][hop_id] = getattr(count, name)
                if count.last_heard is not None:
                    heard_ns = int(count.last_heard * 1e9) - _unix_less_monotonic_ns()
                    columns["last_heard_ns"][hop_id] = max(1, heard_ns)
                if count.last_errno is not None:
                    columns["last_errno"][hop_id] = getattr(errno, count.last_errno, 0)
        return hop_rows(hop_array, columns)

    def reassign(self, hop_ids: Iterable[int]) -> None:
        """Start anew for hop ids that stand for another endpoint from now on."""
        for hop_id in hop_ids:
            self._paths.pop(hop_id, None)
            self._limits.pop(hop_id, None)
            self._counts.pop(hop_id, None)

    def count(self, hop_id: int) -> HopCount:
        """What is counted of a hop, to add to."""
        return self._counts.setdefault(hop_id, HopCount())

    def counters(self, hop_ids: Sequence[int] | None) -> Mapping[int, HopCounters]:
        """See Dataplane.hop_counters."""
        ids = sorted(self._counts) if hop_ids is None else hop_ids
        counts = {hop_id: self._counts.get(hop_id, HopCount()) for hop_id in ids}
        return {hop_id: count.counters() for hop_id, count in counts.items()}

    def activity(self, hop_count: int) -> HopActivity:
        """See Dataplane."""
        columns = {name: np.zeros(hop_count, np.uint64) for name in HopActivity._fields}
        for hop_id, count in self._counts.items():
            if hop_id < hop_count:
                for name, column in columns.items():
                    column[hop_id] = getattr(count, name)
        return HopActivity(**columns)

    def bytes_out(self, hop_count: int) -> npt.NDArray[np.uint64]:
        """See Dataplane."""
        found = np.zeros(hop_count, np.uint64)
        for hop_id, count in self._counts.items():
            if hop_id < hop_count:
                found[hop_id] = count.bytes_out
        return found

    def limit(self, hop_id: int, limit: PathLimit | None) -> None:
        """See Dataplane.limit_path."""
        if limit is None:
            self._limits.pop(hop_id, None)
        else:
            self._limits[hop_id] = limit

    def path(self, hop_id: int, now: float) -> PathState | None:
        """Path state of a hop, unless it was learnt too long ago. now: the loop's time."""
        # Empty unless some path is narrower than the TUN: then nothing is looked up at all.
        if not self._paths and not self._limits:
            return None
        return limited(self._learnt(hop_id, now), self._limits.get(hop_id))

    def learnt(self, now: float) -> Mapping[int, PathState]:
        """What was learnt of all hops, without limits."""
        known = ((hop_id, self._learnt(hop_id, now)) for hop_id in list(self._paths))
        return {hop_id: state for hop_id, state in known if state is not None}

    def paths(self, now: float) -> Mapping[int, PathState]:
        """See Dataplane.path_states."""
        return all_limited(self.learnt(now), self._limits)

    def _learnt(self, hop_id: int, now: float) -> PathState | None:
        state, ends_at = self._paths.get(hop_id, (None, 0.0))
        if state is not None and now >= ends_at:
            del self._paths[hop_id]
            return None
        return state

    def learn_path(self, hop_id: int, inner_mtu: int, origin: str, now: float) -> None:
        """Keep the largest inner packet of a path for PATH_STATE_S."""
        state = PathState(
            inner_mtu=inner_mtu, mtu_origin=MtuOrigin.DEVICE, since=time.time(), origin=origin
        )
        self._paths[hop_id] = (state, now + PATH_STATE_S)

    def forget_paths(self, hop_ids: Iterable[int] | None = None) -> None:
        """Forget what was learnt of some hops; None: of all, and limits: the address is another."""
        if hop_ids is None:
            self._limits.clear()
        for hop_id in list(self._paths) if hop_ids is None else hop_ids:
            self._paths.pop(hop_id, None)


def _unix_less_monotonic_ns() -> int:
    """Unix time when CLOCK_MONOTONIC began."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
