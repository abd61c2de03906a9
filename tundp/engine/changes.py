"""The difference between two FIBs, for an engine that was given no delta."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tundp.lease.fib import Fib


def changed_hops(before: Fib | None, after: Fib) -> Sequence[int]:
    """Hop ids that stand for another endpoint in `after` than in `before`, or for a new one."""
    new = after.hop_array
    old = before.hop_array if before is not None else new[:0]
    common = min(len(old), len(new))
    changed = np.flatnonzero(old[:common] != new[:common]).tolist()
    return [*changed, *range(common, len(new))]
