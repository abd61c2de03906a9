"""Which hop has a send socket of its own, and when another hop gets it: decisions without I/O.

The specification of native/src/hop_slots.c. `hop_sockets.py` carries the decisions out. Times
are nanoseconds of one monotonic clock; `queued` is what the kernel still holds of a socket's
datagrams, in bytes of its own accounting (SIOCOUTQ).
Standard library only: native/tables.py imports it before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

SOCKETS_MAX: Final = 256
"""Send sockets of single hops a worker has at most."""
SEND_BUFFER_LEN: Final = 96 << 10
"""SO_SNDBUF of such a socket, of which the kernel makes 192 KiB. It must stay below the 208 KiB
an unresolved neighbour holds (net.ipv4.neigh.default.unres_qlen_bytes): the neighbour would
discard the oldest datagram without a word, where a full socket refuses the newest."""
HOLD_NS: Final = 10_000_000_000
"""A hop keeps its socket at least so long."""
STUCK_NS: Final = 100_000_000
"""A queue that held something and did not drain for so long is stuck."""
CLOSED_NS: Final = 1_000_000_000
"""A hop that lost its socket because it was stuck is sent nothing for so long."""
LOOK_NS: Final = 1_000_000
"""When no hop could do without its socket, they are not all asked again for so long."""


@dataclass(slots=True)
class HopSlot:
    """What is remembered of one hop's socket."""

    since_ns: int
    """When the hop got it."""
    used_ns: int
    """When a datagram was last sent by it, or refused."""
    drained_ns: int
    """When its queue was last seen to drain; before that, since_ns."""
    floor: int = 0
    """Bytes its queue cannot be below now unless it drained."""


class Pick(NamedTuple):
    """A slot another hop may have."""

    number: int
    is_stuck: bool
    """Its queue is full of what does not move: its hop is closed for CLOSED_NS."""


def new_slot(now_ns: int) -> HopSlot:
    """The slot of a hop that gets a socket now."""
    return HopSlot(since_ns=now_ns, used_ns=now_ns, drained_ns=now_ns)


def look(slot: HopSlot, queued: int, now_ns: int) -> None:
    """Note what the kernel holds of a socket's datagrams."""
    if queued < slot.floor:
        slot.drained_ns = now_ns
    slot.floor = queued


def use(slot: HopSlot, now_ns: int, *, is_taken: bool) -> None:
    """Note a send right after `look`. is_taken: the kernel took a datagram."""
    slot.used_ns = now_ns
    slot.floor += is_taken


def may_return(slot: HopSlot, queued: int, now_ns: int) -> bool:
    """Whether a hop goes back to the shared socket: its own is empty, and not quite new."""
    return queued == 0 and now_ns - slot.since_ns >= HOLD_NS


def pick(slots: Sequence[HopSlot], now_ns: int) -> Pick | None:
    """The slot to take from its hop when all are in use, right after a `look` at each.

    The one that has been stuck longest, else the empty one that was used longest ago; of equals
    the first. An empty one may be a live peer's, which would have to ask for another.
    """
    stuck: int | None = None
    idle: int | None = None
    for index, slot in enumerate(slots):
        if slot.floor and now_ns - slot.drained_ns >= STUCK_NS:
            if stuck is None or slot.drained_ns < slots[stuck].drained_ns:
                stuck = index
        elif not slot.floor and (idle is None or slot.used_ns < slots[idle].used_ns):
            idle = index
    if stuck is not None:
        return Pick(stuck, is_stuck=True)
    return None if idle is None else Pick(idle, is_stuck=False)
