"""What became of numbered datagrams: the results of tundp.lab.streams, and how they are computed.

No I/O: `judge` gets the sender's and the receiver's lists, and gives one `Direction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.lab.generators import Numbered

HELD_MIN: Final = 0.99
"""A sender that sent less than this share of its rate has measured another rate."""
LATE_MAX_S: Final = 0.1
"""One that was further behind its schedule sent bursts that no queue was sized for."""
_SHOWN: Final = 20

Ints = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Numbers in a row that never came."""

    first: int
    count: int
    at_s: float
    """When the first was sent, since the streams began."""
    for_s: float
    """From the first to the last sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """What became of the numbered datagrams of one direction."""

    name: str
    """`pod1 > pod2`."""
    sent: int
    refused: int
    """Of these, how many the sender's own kernel did not take (no route); lost like any other."""
    received: int
    """Numbers that came at least once."""
    losses: tuple[Loss, ...]
    duplicates: int
    """Copies beyond the first."""
    reordered: int
    """First copies that came after a higher number."""
    longest_silence_s: float
    """Between two arrivals, or the first sending and the first arrival, or the last of each."""
    silence_at_s: float
    """When that began, since the streams began."""
    longest_delay_s: float
    """From sending to arrival, of what came: how long a packet waited in a queue."""
    corrupt: int
    """Came with a wrong byte; their numbers, which may be wrong, too, count as lost."""
    missed: int
    """What the receiver's own buffer had no room for: not the path's fault, and no measurement."""
    late_s: float
    """How far the sender was behind its schedule, at most."""
    held: float
    """Sent, as a share of what the rate asks for in that time."""

    @property
    def lost(self) -> int:
        """Numbers that never came."""
        return self.sent - self.received

    @property
    def faults(self) -> list[str]:
        """Why these figures are no measurement of the path; empty if they are."""
        found = []
        if self.held < HELD_MIN:
            found.append(f"{self.name}: the sender held {self.held:.1%} of its rate")
        if self.late_s > LATE_MAX_S:
            found.append(f"{self.name}: the sender was {self.late_s * 1e3:.0f} ms late")
        if self.missed:
            found.append(f"{self.name}: the receiver itself lost {self.missed}")
        return found

    def __str__(self) -> str:
        text = f"{self.name}: {self.lost:,} of {self.sent:,} lost"
        if self.losses:
            rows = ", ".join(
                f"{each.count:,} from {each.at_s:.3f} s for {each.for_s * 1e3:.0f} ms"
                for each in self.losses[:_SHOWN]
            )
            more = len(self.losses) - _SHOWN
            text += f" ({rows}{f' and {more} more times' if more > 0 else ''})"
        return (
            f"{text}, {self.duplicates} twice, {self.reordered} out of order,"
            f" longest silence {self.longest_silence_s * 1e3:.0f} ms"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What became of the TCP stream."""

    received: int
    """Bytes."""
    corrupt: int
    """Pieces with a wrong byte."""
    error: str
    """What ended it, "Connection reset by peer"; empty if it lived to the end."""
    longest_stall_s: float
    """The longest time nothing came."""
    stall_at_s: float
    """When that began, since the streams began."""

    def __str__(self) -> str:
        end = self.error or "no reset"
        return (
            f"TCP: {self.received / 1e6:,.1f} MB, {end}, longest stall"
            f" {self.longest_stall_s * 1e3:.0f} ms"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamsResult:
    """All of it, times in seconds."""

    rate: int
    """Datagrams a second each way."""
    seconds: float
    directions: tuple[Direction, ...]
    stream: Stream | None
    marks: tuple[tuple[str, float], ...]
    """What the user of the streams said, and when, since they began."""

    @property
    def lost(self) -> int:
        """Of both directions."""
        return sum(each.lost for each in self.directions)

    @property
    def sent(self) -> int:
        """Of both directions."""
        return sum(each.sent for each in self.directions)

    @property
    def duplicates(self) -> int:
        """Of both directions."""
        return sum(each.duplicates for each in self.directions)

    @property
    def reordered(self) -> int:
        """Of both directions."""
        return sum(each.reordered for each in self.directions)

    @property
    def longest_silence_s(self) -> float:
        """The longer one of the two directions."""
        return max((each.longest_silence_s for each in self.directions), default=0.0)

    @property
    def faults(self) -> list[str]:
        """Why this is no measurement of the path; empty if it is."""
        return [fault for each in self.directions for fault in each.faults]

    @property
    def is_whole(self) -> bool:
        """Whether every datagram came once, unharmed and in order, and the stream lived."""
        is_right = all(
            not (each.lost or each.duplicates or each.reordered or each.corrupt)
            for each in self.directions
        )
        stream = self.stream
        return is_right and (stream is None or not (stream.error or stream.corrupt))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; of each direction's losses the first twenty."""
        document = asdict(self)
        for each, direction in zip(document["directions"], self.directions, strict=True):
            each["lost"] = direction.lost
            each["loss_count"] = len(direction.losses)
            each["losses"] = each["losses"][:_SHOWN]
        return document | {"faults": self.faults}

    def __str__(self) -> str:
        lines = [str(each) for each in self.directions]
        if self.stream is not None:
            lines.append(str(self.stream))
        lines += [f"{at_s:.3f} s: {name}" for name, at_s in self.marks]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a direction's lists do not tell."""

    started_ns: int
    rate: int
    refused: int = 0
    corrupt: int = 0
    missed: int = 0
    late_s: float = 0.0


def judge(name: str, sent_ns: Ints, arrivals: Numbered, given: Circumstances) -> Direction:
    """What became of the datagrams of one direction.

    sent_ns: of number n at n. Arrivals: in the order they came, copies included; a number that
    was never sent is corrupt.
    """
    is_known = arrivals.numbers < len(sent_ns)
    numbers, at_ns = arrivals.numbers[is_known], arrivals.at_ns[is_known]
    unique, first_at = np.unique(numbers, return_index=True)
    is_first = np.zeros(len(numbers), bool)
    is_first[first_at] = True
    firsts = numbers[is_first]
    highest_before = np.maximum.accumulate(firsts)[:-1]
    delays = at_ns[is_first].astype(np.int64) - sent_ns[firsts.astype(np.int64)].astype(np.int64)
    silence_s, silence_at_ns = _longest_silence(sent_ns, at_ns)
    span_s = _seconds(int(sent_ns[-1]) - int(sent_ns[0])) if len(sent_ns) else 0.0
    return Direction(
        name=name,
        sent=len(sent_ns),
        refused=given.refused,
        received=len(unique),
        losses=_losses(sent_ns, unique, given.started_ns),
        duplicates=len(numbers) - len(unique),
        reordered=int(np.count_nonzero(firsts[1:] < highest_before)),
        longest_silence_s=silence_s,
        silence_at_s=_seconds(silence_at_ns - given.started_ns),
        longest_delay_s=_seconds(int(delays.max())) if len(delays) else 0.0,
        corrupt=given.corrupt + int(np.count_nonzero(~is_known)),
        missed=given.missed,
        late_s=given.late_s,
        held=len(sent_ns) / (span_s * given.rate + 1),
    )


def _losses(sent_ns: Ints, received: Ints, started_ns: int) -> tuple[Loss, ...]:
    is_missing = np.ones(len(sent_ns) + 2, bool)
    is_missing[0] = is_missing[-1] = False
    is_missing[received.astype(np.int64) + 1] = False
    edges = np.flatnonzero(np.diff(is_missing.astype(np.int8)))
    return tuple(
        Loss(
            first=first,
            count=end - first,
            at_s=_seconds(int(sent_ns[first]) - started_ns),
            for_s=_seconds(int(sent_ns[end - 1]) - int(sent_ns[first])),
        )
        for first, end in edges.reshape(-1, 2).tolist()
    )


def _longest_silence(sent_ns: Ints, at_ns: Ints) -> tuple[float, int]:
    """Seconds, and when it began (ns)."""
    if not len(sent_ns):
        return 0.0, 0
    began, ended = int(sent_ns[0]), int(sent_ns[-1])
    moments: Sequence[int] = [began, *at_ns.tolist()]
    if ended > moments[-1]:
        moments = [*moments, ended]
    gaps = np.diff(np.array(moments, np.int64))
    if not len(gaps):
        return 0.0, began
    longest = int(gaps.argmax())
    return _seconds(int(gaps[longest])), moments[longest]


def _seconds(ns: int) -> float:
    return ns / 1e9
