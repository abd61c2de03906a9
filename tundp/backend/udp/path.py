"""What is known of the way to one hop, what follows from it, and which ways a change concerns."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from tundp.backend.base import PathMeasuring
from tundp.backend.udp.path_search import FLOOR, PathSearch
from tundp.choices import Measuring, MtuOrigin
from tundp.engine.base import PathLimit
from tundp.finding import Finding, Verdict
from tundp.lease.model import Peer
from tundp.linux.netlink import Change, LinkChange, RouteChange, RuleChange
from tundp.linux.uapi import RT_TABLE_LOCAL

ROUTE_TEXT: Final = "the MTU of the route (ip route)"
_WORDS: Final = {
    Measuring.MEASURED: "measured",
    Measuring.PENDING: "not measured yet",
    Measuring.NO_ANSWER: "cannot be measured",
}
_NAMED: Final = 3
"""Peers without an answer that the finding names."""
MEASURED_TEXT: Final = "packets of this size were answered, larger ones were not"


@dataclass(slots=True, eq=False)
class Path:
    """What is known of the way to one hop that was active lately."""

    hop_id: int
    peer: Peer
    active_at: float
    due_at: float
    """Not measured again before that."""
    is_due: bool = True
    """Whether it was active, or its route changed, since it was measured last."""
    route: int | None = None
    """Inner MTU by the route."""
    link: int = 0
    """Index of the link the route leads over, 0 for not known."""
    measured: int | None = None
    measured_at: float = 0.0
    searched_at: float = 0.0
    """When a search ended last, with whatever result."""
    measuring: PathMeasuring = field(
        default_factory=lambda: PathMeasuring(Measuring.PENDING, time.time())
    )
    search: PathSearch | None = None
    cookies: list[bytes] = field(default_factory=list)
    """Of the requests of this search."""
    limit: PathLimit | None = None
    """What the engine was given."""

    def note(self, state: Measuring) -> None:
        """Keep what measuring has come to, and since when."""
        if state is not self.measuring.state:
            self.measuring = PathMeasuring(state, time.time())


def path_findings(paths: Collection[Path]) -> list[Finding]:
    """A finding `path-mtu` about the paths in use; none without one."""
    if not paths:
        return []
    counts = Counter(path.measuring.state for path in paths)
    words = ", ".join(f"{counts[each]} {_WORDS[each]}" for each in Measuring if counts[each])
    evidence = f"paths in use: {words}"
    silent = sorted(
        (path for path in paths if path.measuring.state is Measuring.NO_ANSWER),
        key=lambda path: (path.measuring.since, path.hop_id),
    )
    if not silent:
        return [Finding(id="path-mtu", verdict=Verdict.OK, evidence=evidence)]
    named = ", ".join(
        f"{path.peer.endpoint.address} since {_utc(path.measuring.since)}"
        for path in silent[:_NAMED]
    )
    more = f" and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
    return [
        Finding(
            id="path-mtu",
            verdict=Verdict.WARN,
            evidence=f"{evidence}: no echo request is answered by {named}{more}",
            meaning="packets leave at full size: what a narrower path swallows is lost",
            next_step="if the peer is up, let its kernel answer pings of its TUN address"
            " (icmp_echo_ignore_all, its INPUT chain): docs/debug.md, step 8",
        )
    ]


def _utc(since: float) -> str:
    return datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def limit_of(path: Path, full: int) -> PathLimit | None:
    """The smaller of what the route says and what was measured; None if neither is a limit."""
    known = [
        (size, origin, text)
        for size, origin, text in (
            (path.route, MtuOrigin.ROUTE, ROUTE_TEXT),
            (path.measured, MtuOrigin.MEASURED, MEASURED_TEXT),
        )
        if size is not None and size < full
    ]
    if not known:
        return None
    size, origin, text = min(known, key=lambda each: each[0])
    return PathLimit(inner_mtu=max(FLOOR, size), origin=origin, since=time.time(), text=text)


def concerned(changes: Iterable[Change], paths: Sequence[Path]) -> list[Path]:
    """The paths that changes of the kernel's routes, links or rules may have to do with."""
    by_address = sorted((int(path.peer.endpoint.address), path.hop_id) for path in paths)
    by_hop = {path.hop_id: path for path in paths}
    found: dict[int, Path] = {}
    for change in changes:
        if isinstance(change, RuleChange):
            return list(paths)
        if isinstance(change, LinkChange):
            index = change.link.index
            found |= {path.hop_id: path for path in paths if path.link == index}
        elif isinstance(change, RouteChange) and change.table != RT_TABLE_LOCAL:
            first = int(change.destination.network_address)
            last = int(change.destination.broadcast_address)
            left = bisect_left(by_address, (first, 0))
            right = bisect_right(by_address, (last, 1 << 32))
            found |= {hop_id: by_hop[hop_id] for _, hop_id in by_address[left:right]}
    return list(found.values())
