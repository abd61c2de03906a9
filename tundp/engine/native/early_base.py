"""What the workers of an early start have counted, as an engine goes on from it."""

from __future__ import annotations

import numpy as np

from tundp.engine.counter_base import HOP_TIMES, CounterBase, hop_rows
from tundp.engine.counters import HOP_SUMS, Counters
from tundp.engine.native.counting import add_counters
from tundp.engine.native.early import EarlyWorkers
from tundp.engine.native.library import require
from tundp.lease.fib import HOP_DTYPE

_QUEUE_FULL = "queue_full"


def counted_by(workers: EarlyWorkers) -> CounterBase:
    """All counted so far. Exact once they have stopped."""
    ffi = require().ffi
    total = Counters()
    hop_array = np.frombuffer(ffi.buffer(workers.hops), HOP_DTYPE)
    columns = {
        name: np.zeros(len(hop_array), np.uint64) for name in (*HOP_SUMS, *HOP_TIMES, "last_errno")
    }
    for counters, hop_counters, hop_queues in workers.counted():
        add_counters(total, counters)
        counts = np.frombuffer(ffi.buffer(hop_counters), _dtype("struct tundp_hop_counters"))
        queues = np.frombuffer(ffi.buffer(hop_queues), _dtype("struct tundp_hop_queue"))
        is_newer = counts["last_refused_ns"] > columns["last_refused_ns"]
        columns["last_errno"][is_newer] = counts["last_errno"][is_newer]
        for name in HOP_SUMS:
            columns[name] += queues["full"] if name == _QUEUE_FULL else counts[name]
        for name in HOP_TIMES:
            np.maximum(columns[name], counts[name], out=columns[name])
    return CounterBase(totals=total, hops=hop_rows(hop_array, columns))


def _dtype(struct: str) -> np.dtype[np.void]:
    ffi = require().ffi
    fields = ffi.typeof(struct).fields
    return np.dtype([(name, f"=u{ffi.sizeof(field.type)}") for name, field in fields])
