"""The kernel's drops of the overlay's packets while `tundp drops` looks, by reason. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tundp.linux.skb_drops import Place
from tundp.observe.skb_steps import SkbStep, is_wanted
from tundp.wire.facts import Direction

if TYPE_CHECKING:
    from tundp.wire.filter import Filter

_Kind = tuple[str, Direction, str | None, str, bool, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkbRow:
    """Packets that one function of the kernel dropped for one reason."""

    reason: str
    """As enum skb_drop_reason of the kernel names it: NEIGH_FAILED."""
    direction: str
    """The way of the inner packet."""
    function: str | None
    """Of the kernel; null if it keeps its addresses to itself."""
    device: str
    """The packet's device then; empty if it had none."""
    is_outer: bool
    """Whether datagrams between two nodes were dropped, not inner packets."""
    count: int
    """While the command looked."""
    is_in_pod: bool = False
    """Whether a pod's own network namespace dropped them: the device is one of the pod."""
    peer: str | None = None
    """The other node of the last one."""
    example: str = ""
    """The last one's inner packet, in one line; the datagram if that is out of sight."""
    means: str = ""
    next_step: str = ""


class SkbTally:
    """Counts drops by kind, and keeps the last of each."""

    def __init__(self, packets: Filter) -> None:
        """packets: which are counted."""
        self._packets = packets
        self._counts: Counter[_Kind] = Counter()
        self._last: dict[_Kind, SkbStep] = {}

    def add(self, step: SkbStep) -> None:
        """One drop; copies are none.

        A datagram whose inner packet is out of sight counts whatever the filter says of that.
        """
        if step.is_copy or is_wanted(step, self._packets) is False:
            return
        drop = step.drop
        origin = (drop.reason, step.direction, drop.function, drop.device)
        kind = (*origin, step.peer is not None, drop.place is Place.POD)
        self._counts[kind] += 1
        self._last[kind] = step

    def rows(self) -> Sequence[SkbRow]:
        """A row a kind, the most frequent first."""
        return [_row(self._last[kind], count) for kind, count in self._counts.most_common()]


def _row(last: SkbStep, count: int) -> SkbRow:
    return SkbRow(
        reason=last.drop.reason,
        direction=last.direction.name.lower(),
        function=last.drop.function,
        device=last.drop.device,
        is_outer=last.peer is not None,
        count=count,
        is_in_pod=last.drop.place is Place.POD,
        peer=None if last.peer is None else str(last.peer),
        example=last.words,
        means=last.means,
        next_step=last.next_step,
    )
