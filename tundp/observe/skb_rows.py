"""The kernel's drops of the overlay's packets while `tundp drops` looks, by reason. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tundp.observe.skb_steps import SkbStep, is_wanted

if TYPE_CHECKING:
    from tundp.wire.filter import Filter


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
    peer: str | None = None
    """The other node of the last one."""
    example: str = ""
    """The last one's inner packet, in one line; the datagram if that is out of sight."""
    means: str = ""
    next_step: str = ""


def skb_rows(steps: Iterable[SkbStep], packets: Filter) -> Sequence[SkbRow]:
    """A row a kind, the most frequent first; without copies.

    Datagrams whose inner packet is out of sight are counted whatever the filter says of it.
    """
    kinds: dict[tuple[object, ...], list[SkbStep]] = {}
    for step in steps:
        if step.is_copy or is_wanted(step, packets) is False:
            continue
        drop = step.drop
        key = (drop.reason, step.direction, drop.function, drop.device, step.peer is not None)
        kinds.setdefault(key, []).append(step)
    return [_row(kind) for kind in sorted(kinds.values(), key=lambda kind: -len(kind))]


def _row(kind: Sequence[SkbStep]) -> SkbRow:
    last = kind[-1]
    return SkbRow(
        reason=last.drop.reason,
        direction=last.direction.name.lower(),
        function=last.drop.function,
        device=last.drop.device,
        is_outer=last.peer is not None,
        count=len(kind),
        peer=None if last.peer is None else str(last.peer),
        example=last.words,
        means=last.means,
        next_step=last.next_step,
    )
