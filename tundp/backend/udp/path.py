"""What is known of the way to one hop, what follows from it, and which ways a change concerns."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from tundp.backend.udp.path_search import FLOOR, PathSearch
from tundp.choices import MtuOrigin
from tundp.engine.base import PathLimit
from tundp.lease.model import Peer
from tundp.linux.netlink import Change, LinkChange, RouteChange, RuleChange
from tundp.linux.uapi import RT_TABLE_LOCAL

ROUTE_TEXT: Final = "the MTU of the route (ip route)"
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
    search: PathSearch | None = None
    cookies: list[bytes] = field(default_factory=list)
    """Of the requests of this search."""
    limit: PathLimit | None = None
    """What the engine was given."""


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
