"""What changed since an engine looked last: between two FIBs, and in the MTUs of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tundp.engine.base import PathState
from tundp.lease.fib import Fib
from tundp.wire import ip, overhead


def changed_hops(before: Fib | None, after: Fib) -> Sequence[int]:
    """Hop ids that stand for another endpoint in `after` than in `before`, or for a new one."""
    new = after.hop_array
    old = before.hop_array if before is not None else new[:0]
    common = min(len(old), len(new))
    changed = np.flatnonzero(old[:common] != new[:common]).tolist()
    return [*changed, *range(common, len(new))]


def changed_paths(
    states: Mapping[int, PathState], fib: Fib, ask: Callable[[str], int | None]
) -> list[int]:
    """Hop ids whose device has another MTU by now than `states` say, which hold no limits.

    ask: the MTU of the device to an address in bytes, None without a route, which is no news.
    """
    changed = []
    for hop_id, state in states.items():
        hop = fib.hops[hop_id] if hop_id < len(fib.hops) else None
        outer = None if hop is None or state.inner_mtu is None else ask(hop.sockaddr[0])
        if outer is not None and max(ip.MIN_MTU, overhead.inner_mtu(outer)) != state.inner_mtu:
            changed.append(hop_id)
    return changed
