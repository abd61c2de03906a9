"""Per-hop state of an engine that keeps it in Python: counters and path state, by hop id."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from tundp.engine.base import PATH_STATE_S, PathState
from tundp.engine.counters import HopCounters


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


class HopLedger:
    """Counters and path state by hop id; both live until the id is assigned anew."""

    def __init__(self) -> None:
        self._counts: dict[int, HopCount] = {}
        self._paths: dict[int, tuple[PathState, float]] = {}

    def reassign(self, hop_ids: Iterable[int]) -> None:
        """Start anew for hop ids that stand for another endpoint from now on."""
        for hop_id in hop_ids:
            self._paths.pop(hop_id, None)
            self._counts.pop(hop_id, None)

    def count(self, hop_id: int) -> HopCount:
        """What is counted of a hop, to add to."""
        return self._counts.setdefault(hop_id, HopCount())

    def counters(self, hop_ids: Sequence[int] | None) -> Mapping[int, HopCounters]:
        """See Dataplane.hop_counters."""
        ids = sorted(self._counts) if hop_ids is None else hop_ids
        counts = {hop_id: self._counts.get(hop_id, HopCount()) for hop_id in ids}
        return {hop_id: HopCounters(**asdict(count)) for hop_id, count in counts.items()}

    def path(self, hop_id: int, now: float) -> PathState | None:
        """Path state of a hop, unless it was learnt too long ago. now: the loop's time."""
        # Empty unless some path is narrower than the TUN: then nothing is looked up at all.
        if not self._paths:
            return None
        state, ends_at = self._paths.get(hop_id, (None, 0.0))
        if state is not None and now >= ends_at:
            del self._paths[hop_id]
            return None
        return state

    def paths(self, now: float) -> Mapping[int, PathState]:
        """See Dataplane.path_states."""
        known = ((hop_id, self.path(hop_id, now)) for hop_id in list(self._paths))
        return {hop_id: state for hop_id, state in known if state is not None}

    def learn_path(self, hop_id: int, inner_mtu: int, origin: str, now: float) -> None:
        """Keep the largest inner packet of a path for PATH_STATE_S."""
        state = PathState(inner_mtu=inner_mtu, since=time.time(), origin=origin)
        self._paths[hop_id] = (state, now + PATH_STATE_S)

    def forget_paths(self, hop_ids: Iterable[int] | None = None) -> None:
        """Forget the path state of some hops; None: of all, it was another address's."""
        for hop_id in list(self._paths) if hop_ids is None else hop_ids:
            self._paths.pop(hop_id, None)
