"""Per-hop memory of the C engines: path state, and what each worker counts.

Arrays indexed by hop id, reserved once for every id there can be, so that they never move: a
worker reads them through whatever FIB it uses. Untouched pages cost address space only.

Path state is shared by all workers, who write it, and Python, who clears it and sets limits.
Counters belong to the worker that counts; Python never writes them: what an id has counted for an
earlier endpoint is subtracted (`_bases`).
"""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.choices import MtuOrigin
from tundp.engine.base import (
    EMSGSIZE_ORIGIN,
    NO_GSO_ORIGIN,
    HopActivity,
    PathLimit,
    PathState,
    all_limited,
)
from tundp.engine.counter_base import HOP_TIMES, CounterBase, hop_rows
from tundp.engine.counters import HOP_SUMS, HopCounters
from tundp.engine.native.library import require

_MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""asm-generic/mman.h; in the mmap module since Python 3.13. A hint: ignored where it is not."""


class HopMemory:
    """The arrays of one engine with `worker_count` workers."""

    def __init__(self, worker_count: int) -> None:
        native = require()
        self._ffi = native.ffi
        hops_max = int(native.lib.TUNDP_HOPS_MAX)
        self.paths = _reserve("struct tundp_path", hops_max)
        self._counters = [
            _reserve("struct tundp_hop_counters", hops_max) for _ in range(worker_count)
        ]
        self._queues = [_reserve("struct tundp_hop_queue", hops_max) for _ in range(worker_count)]
        self._bases: dict[int, HopTotals] = {}
        self._went_on: tuple[npt.NDArray[np.int64], Any] | None = None
        """Hop ids and rows of the last `go_on_from`."""

    def counters_of(self, worker: int) -> Any:
        """Where a worker counts, for its struct."""
        return self._ffi.from_buffer("struct tundp_hop_counters[]", self._counters[worker])

    def queues_of(self, worker: int) -> Any:
        """Where a worker keeps its hops' send sockets, for its struct."""
        return self._ffi.from_buffer("struct tundp_hop_queue[]", self._queues[worker])

    def go_on_from(self, base: CounterBase, hop_array: npt.NDArray[np.void]) -> None:
        """See Dataplane: as if the first worker had counted it. No worker may run."""
        counters, queues = self._counters[0], self._queues[0]
        if self._went_on is not None:
            ids, rows = self._went_on
            for name in _COUNTED:
                counters[name][ids] -= rows[name]
            queues["full"][ids] -= rows["queue_full"]
        ids, rows = self._went_on = base.by_hop(hop_array)
        for name in _COUNTED:
            counters[name][ids] += rows[name]
        queues["full"][ids] += rows["queue_full"]
        for name in (*HOP_TIMES, "last_errno"):
            counters[name][ids] = rows[name]

    def base_rows(self, hop_array: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """CounterBase.hops of what was counted so far."""
        totals = self._totals(np.arange(len(hop_array)))
        columns = {name: np.array(column, np.uint64) for name, column in totals.sums.items()}
        times = {"last_heard_ns": totals.last_heard_ns, "last_refused_ns": totals.last_refused_ns}
        for hop_id, before in self._bases.items():
            if hop_id < len(hop_array):
                for name, count in before.sums.items():
                    columns[name][hop_id] -= np.uint64(count)
                for name, column in times.items():
                    if column[hop_id] <= getattr(before, name):
                        column[hop_id] = 0
        errnos = np.where(times["last_refused_ns"] != 0, totals.last_errno, 0)
        return hop_rows(hop_array, {**columns, **times, "last_errno": errnos})

    def reassign(self, hop_ids: Iterable[int]) -> None:
        """Start anew for hop ids that stand for another endpoint from now on."""
        ids = np.fromiter(hop_ids, np.int64)
        self.paths[ids] = 0
        totals = self._totals(ids)
        counted = np.flatnonzero(totals.any())
        for at in counted.tolist():
            self._bases[int(ids[at])] = totals.of(at)

    def bytes_out(self, hop_count: int) -> npt.NDArray[np.uint64]:
        """See Dataplane."""
        found: npt.NDArray[np.uint64] = np.zeros(hop_count, np.uint64)
        for counters in self._counters:
            found += counters["bytes_out"][:hop_count]
        return found

    def activity(self, hop_count: int) -> HopActivity:
        """See Dataplane. hop_count: ids in use are below."""
        columns: dict[str, npt.NDArray[np.uint64]] = {}
        for name in (*_COUNTED, "last_refused_ns"):
            add = np.maximum if name == "last_refused_ns" else np.add
            columns[name] = np.zeros(hop_count, np.uint64)
            for counters in self._counters:
                add(columns[name], counters[name][:hop_count], out=columns[name])
        for hop_id, base in self._bases.items():
            if hop_id < hop_count:
                for name in _COUNTED:
                    columns[name][hop_id] -= np.uint64(base.sums[name])
        return HopActivity(**columns)

    def counters(self, hop_ids: Sequence[int] | None, hop_count: int) -> Mapping[int, HopCounters]:
        """See Dataplane.hop_counters. hop_count: ids in use are below."""
        is_asked = hop_ids is not None
        ids = np.arange(hop_count) if hop_ids is None else np.array(hop_ids, np.int64)
        totals = self._totals(ids)
        rows = range(len(ids)) if is_asked else np.flatnonzero(totals.any()).tolist()
        unix_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        found = {}
        for row in rows:
            hop_id = int(ids[row])
            counted = totals.of(row).since(self._bases.get(hop_id), unix_ns)
            if is_asked or counted != _NOTHING:
                found[hop_id] = counted
        return found

    def _totals(self, ids: npt.NDArray[np.int64]) -> HopTotals:
        """What all workers have counted, one entry an id."""
        rows = [counters[ids] for counters in self._counters]
        sums = {name: sum(row[name] for row in rows) for name in _COUNTED}
        sums["queue_full"] = sum(queues["full"][ids] for queues in self._queues)
        last_heard_ns = np.maximum.reduce([row["last_heard_ns"] for row in rows])
        refused = np.stack([row["last_refused_ns"] for row in rows])
        errnos = np.stack([row["last_errno"] for row in rows])
        newest = refused.argmax(axis=0)
        columns = np.arange(len(ids))
        return HopTotals(sums, last_heard_ns, refused[newest, columns], errnos[newest, columns])


class HopTotals:
    """Columns of hop counters, or (`of`) one row of them."""

    __slots__ = ("last_errno", "last_heard_ns", "last_refused_ns", "sums")

    def __init__(
        self, sums: dict[str, Any], last_heard_ns: Any, last_refused_ns: Any, last_errno: Any
    ) -> None:
        self.sums = sums
        self.last_heard_ns = last_heard_ns
        self.last_refused_ns = last_refused_ns
        self.last_errno = last_errno

    def any(self) -> npt.NDArray[np.bool_]:
        """Which rows have counted anything."""
        found = (self.last_heard_ns != 0) | (self.last_refused_ns != 0)
        for column in self.sums.values():
            found = found | (column != 0)
        return np.asarray(found)

    def of(self, row: int) -> HopTotals:
        """One row, as plain numbers."""
        return HopTotals(
            {name: int(column[row]) for name, column in self.sums.items()},
            int(self.last_heard_ns[row]),
            int(self.last_refused_ns[row]),
            int(self.last_errno[row]),
        )

    def since(self, base: HopTotals | None, unix_ns: int) -> HopCounters:
        """One row less what `base` had. unix_ns: Unix time when the workers' clock began."""
        heard = refused = 0
        sums = self.sums
        if base is not None:
            heard, refused = base.last_heard_ns, base.last_refused_ns
            sums = {name: count - base.sums[name] for name, count in sums.items()}
        is_heard = self.last_heard_ns > heard
        is_refused = self.last_refused_ns > refused
        return HopCounters(
            **sums,
            last_heard=(unix_ns + self.last_heard_ns) / 1e9 if is_heard else None,
            last_errno=_errno_name(self.last_errno) if is_refused else None,
        )


class PathStates:
    """Path state as workers wrote it, with its age, and limits; what workers wrote expires."""

    def __init__(self, paths: npt.NDArray[np.void], lasts_s: float) -> None:
        """lasts_s: what workers wrote is forgotten after so long."""
        self._paths = paths
        self._lasts_s = lasts_s
        self._known: dict[int, tuple[PathState, float]] = {}
        self._limits: dict[int, PathLimit] = {}

    def limit(self, hop_id: int, limit: PathLimit | None) -> None:
        """See Dataplane.limit_path."""
        self._paths["limit"][hop_id] = 0 if limit is None else limit.inner_mtu
        if limit is None:
            self._limits.pop(hop_id, None)
        else:
            self._limits[hop_id] = limit

    def take_in(self, hop_count: int, now: float) -> list[tuple[int, PathState, PathState | None]]:
        """Read what workers wrote; what is new, with what was known before. now: loop's time."""
        news = []
        # A few among thousands, asked for at every change of routes: no loop over all.
        written = self._paths[:hop_count].view(np.uint64)
        for hop_id in np.flatnonzero(written).tolist():
            path = self._paths[hop_id]
            inner_mtu, no_gso = int(path["inner_mtu"]) or None, bool(path["no_gso"])
            before = self._known[hop_id][0] if hop_id in self._known else None
            if (inner_mtu, no_gso) == _learnt(before):
                continue
            origins = [EMSGSIZE_ORIGIN] * (inner_mtu is not None) + [NO_GSO_ORIGIN] * no_gso
            state = PathState(
                inner_mtu=inner_mtu,
                mtu_origin=None if inner_mtu is None else MtuOrigin.DEVICE,
                no_gso=no_gso,
                since=time.time(),
                origin="; ".join(origins),
            )
            self._known[hop_id] = (state, now + self._lasts_s)
            news.append((hop_id, state, before))
        return news

    def expire(self, now: float) -> None:
        """Forget what was learnt long ago, so that it is tried again."""
        self.forget([hop_id for hop_id, (_, ends_at) in self._known.items() if now >= ends_at])

    def forget(self, hop_ids: Iterable[int]) -> None:
        """Forget what was learnt of the paths to some hops."""
        for hop_id in list(self._known.keys() & set(hop_ids)):
            del self._known[hop_id]
            self._paths["inner_mtu"][hop_id] = 0
            self._paths["no_gso"][hop_id] = 0

    def reset(self, hop_ids: Iterable[int] | None = None) -> None:
        """Forget all of some hops, None: of every hop: what was learnt, and limits."""
        known = self._known.keys() | self._limits
        for hop_id in known if hop_ids is None else known & set(hop_ids):
            self._known.pop(hop_id, None)
            self._limits.pop(hop_id, None)
            self._paths[hop_id] = 0

    def learnt(self) -> Mapping[int, PathState]:
        """What was learnt, by hop id, without limits."""
        return {hop_id: state for hop_id, (state, _) in self._known.items()}

    def states(self) -> Mapping[int, PathState]:
        """By hop id."""
        return all_limited(self.learnt(), self._limits)


def _learnt(state: PathState | None) -> tuple[int | None, bool]:
    return (None, False) if state is None else (state.inner_mtu, state.no_gso)


def _reserve(struct: str, count: int) -> npt.NDArray[np.void]:
    """A zeroed array of a C struct, that takes memory only where it is written."""
    ffi = require().ffi
    fields = ffi.typeof(struct).fields
    dtype = np.dtype([(name, f"=u{ffi.sizeof(field.type)}") for name, field in fields])
    assert dtype.itemsize == ffi.sizeof(struct), f"{struct} has padding"
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return np.frombuffer(memory, dtype)


def _errno_name(number: int) -> str:
    return errno.errorcode.get(number, str(number))


_COUNTED: Final = tuple(name for name in HOP_SUMS if name != "queue_full")
"""Those in struct tundp_hop_counters."""
_NOTHING: Final = HopCounters()
