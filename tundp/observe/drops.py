"""What was dropped, why, and the last packet it happened to: the answer of `tundp drops`.

Counts come from a daemon's status and are exact, since its start. Packets come from its flight
recorder, which keeps the last few of each direction and reason: where a selection asks for more
than reason and direction, they decide which reasons are shown, and no count is of them alone.
Pure: documents in, a report out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final, NamedTuple

from tundp.observe.codec import Malformed, to_json
from tundp.observe.events import Event
from tundp.observe.kernel_drops import KernelDrop, kernel_drops
from tundp.observe.skb_rows import SkbRow
from tundp.observe.status import ChaosStatus, CountersStatus, Status
from tundp.printable import printable
from tundp.wire import describe
from tundp.wire.drop import DropReason
from tundp.wire.facts import Direction, Facts, Field, facts_of
from tundp.wire.filter import Filter, parse
from tundp.wire.filter_program import OpKind

DROPS_SCHEMA: Final = 1
_REASONS: Final = {reason.label: reason for reason in DropReason}
REASON_NAMES: Final = tuple(_REASONS)
_EXACT: Final = frozenset({Field.REASON, Field.DIRECTION})
"""What every counted drop has, so that a filter of nothing else selects counts exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropExample:
    """One dropped packet."""

    at: float
    """When it was dropped, Unix time."""
    direction: str
    reason: str
    peer: str | None = None
    """Address and port of the other node; null if it was not routed."""
    error: int = 0
    """The errno the kernel refused it with; 0 if it was not the kernel."""
    length: int
    """Bytes of the IPv4 packet; of a super-packet, the whole."""
    packets: int = 1
    """Packets of wire size it stands for."""
    source: IPv4Address | None = None
    """These five are null where the packet has none, or too little of it is left."""
    destination: IPv4Address | None = None
    protocol: int | None = None
    source_port: int | None = None
    destination_port: int | None = None
    packet: str = ""
    """Its first bytes in hexadecimal, from the IPv4 header on."""

    @property
    def words(self) -> str:
        """The packet in one line."""
        return describe.packet(bytes.fromhex(self.packet), self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRow:
    """One reason in one direction."""

    reason: str
    direction: str
    count: int
    """Packets since the daemon's start, whichever were selected."""
    rate: float | None = None
    """Packets a second between two looks; null if there was but one."""
    last: float | None = None
    """When the last selected one was recorded, Unix time; null if none is."""
    peer: str | None = None
    """The other node of that one."""
    example: DropExample | None = None
    """That one."""
    means: str = ""
    next_step: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Whether every packet of a direction is accounted for."""

    direction: str
    packets_in: int
    packets_out: int
    dropped: int
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DropsReport:
    """Everything `tundp drops` shows."""

    schema: int = DROPS_SCHEMA
    version: str
    """Of the daemon."""
    node: IPv4Address | None
    started_at: float
    """When the daemon started, Unix time: counts are since then."""
    at: float
    """When it was asked."""
    filter: str
    """What was selected, as canonical filter text; empty for everything."""
    is_exact: bool
    """Whether the selection is of reasons and directions only, so that counts are of it."""
    drops: Sequence[DropRow]
    """The most frequent first."""
    undecided: Sequence[str]
    """Reasons left out since no packet is recorded that could be looked at: `encap no_route`."""
    balances: Sequence[Balance]
    kernel: Sequence[KernelDrop]
    """Only counts above 0."""
    kernel_seen: Sequence[SkbRow] | None = None
    """What the kernel dropped of the overlay's packets while the command looked; null if it could
    not look, or had no time."""
    kernel_looked_s: float | None = None
    """For how long."""
    kernel_lost: int = 0
    """Drops in that time that came too fast to be looked at, the selected ones or not."""
    chaos: Sequence[ChaosStatus] = ()
    """What `tundp chaos` did to packets behind the engine: of those counted as out."""
    notes: Sequence[str]
    """What could not be looked at, and why."""

    def to_json(self) -> dict[str, Any]:
        """The document of `tundp drops --json`."""
        return to_json(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which drops are wanted."""

    filter: Filter
    since: float | None = None
    """Unix time of the last one at least; None for any."""

    @property
    def is_exact(self) -> bool:
        """Whether counters alone decide."""
        fields = {op.field for op in self.filter.ops if op.kind is OpKind.TEST}
        return self.since is None and fields <= _EXACT

    def takes(self, example: DropExample) -> bool:
        """Whether a recorded packet is wanted."""
        if self.since is not None and example.at < self.since:
            return False
        return self.filter.matches(facts_of_example(example))

    def takes_kind(self, direction: str, reason: str) -> bool:
        """Whether drops of a direction and reason are wanted, if the selection is exact."""
        values = {Field.DIRECTION: int(_direction(direction))}
        if (known := _REASONS.get(reason)) is not None:
            values[Field.REASON] = int(known)
        return self.filter.matches(Facts(values))


def selected_text(
    text: str,
    *,
    reasons: Sequence[str] = (),
    peers: Sequence[IPv4Network] = (),
    sources: Sequence[IPv4Network] = (),
    destinations: Sequence[IPv4Network] = (),
    is_negated: bool = False,
) -> str:
    """One filter's text of several that must all hold; any one of the values of each.

    FilterError about `text`, which is a filter by itself.
    """
    groups = (
        ("reason", reasons),
        ("peer", peers),
        ("src net", sources),
        ("dst net", destinations),
    )
    own = parse(text).text
    parts = [f"({own})"] if own else []
    parts += [
        f"({' or '.join(f'{words} {value}' for value in values)})"
        for words, values in groups
        if values
    ]
    joined = " and ".join(parts)
    return f"not ({joined})" if is_negated and joined else joined


def facts_of_example(example: DropExample) -> Facts:
    """What filters test of a recorded packet."""
    peer = (example.peer or "").rpartition(":")[0]
    return facts_of(
        bytes.fromhex(example.packet),
        direction=_direction(example.direction),
        outer=int(IPv4Address(peer)) if peer else None,
        reason=_REASONS.get(example.reason),
        length=example.length,
    )


def selection_of(text: str, since: float | None = None) -> Selection:
    """A selection by filter text; FilterError."""
    return Selection(filter=parse(text), since=since)


def read_examples(document: Any) -> tuple[list[DropExample], int]:
    """The packets of a flight recorder's document, and how many entries could not be read.

    Malformed if it is no such document.
    """
    entries = document.get("drops") if isinstance(document, Mapping) else None
    if not isinstance(entries, Sequence):
        raise Malformed("this is no flight recorder's document: it has no list `drops`")
    found = []
    for entry in entries:
        try:
            found.append(_example(entry))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            continue
    return found, len(entries) - len(found)


def example_of(
    packet: bytes,
    *,
    at: float,
    direction: Direction,
    reason: str,
    length: int,
    peer: str | None = None,
    error: int = 0,
    packets: int = 1,
) -> DropExample:
    """A dropped packet by its first bytes."""
    values = facts_of(packet, direction=direction).values
    source, destination = values.get(Field.SOURCE), values.get(Field.DESTINATION)
    return DropExample(
        at=at,
        direction=direction.name.lower(),
        reason=reason,
        peer=peer,
        error=error,
        length=length,
        packets=packets,
        source=None if source is None else IPv4Address(source),
        destination=None if destination is None else IPv4Address(destination),
        protocol=values.get(Field.PROTOCOL),
        source_port=values.get(Field.SOURCE_PORT),
        destination_port=values.get(Field.DESTINATION_PORT),
        packet=packet.hex(),
    )


def example_of_event(event: Event) -> DropExample:
    """A drop as it happened."""
    record, peer = event.record, event.peer
    return example_of(
        event.packet,
        at=event.time_ns / 1e9,
        direction=Direction.ENCAP if event.stage.is_encap else Direction.DECAP,
        reason=event.reason or "",
        length=record.length,
        peer=None if peer is None else f"{peer.address}:{peer.port}",
        error=record.error,
        packets=record.packets,
    )


def _example(entry: Mapping[str, Any]) -> DropExample:
    outer = entry.get("outer")
    return example_of(
        bytes.fromhex(entry["packet"]),
        at=int(entry["unix_ns"]) / 1e9,
        direction=_direction(entry["direction"]),
        reason=printable(str(entry["reason"])),
        length=int(entry["length"]),
        peer=f"{IPv4Address(outer)}:{int(entry.get('port') or 0)}" if outer else None,
        error=int(entry.get("error") or 0),
        packets=int(entry.get("packets") or 1),
    )


def _direction(name: str) -> Direction:
    return Direction[name.upper()]


_START_S: Final = 1.0
"""A process's clock is read at its start, a moment before or after its first packet."""


class Look(NamedTuple):
    """A daemon's status, and when it was asked for, in seconds of any clock."""

    status: Status
    clock_s: float


def drops_report(
    looks: Sequence[Look],
    *,
    examples: Sequence[DropExample] | None,
    namespace: Mapping[str, int],
    selection: Selection,
    notes: Sequence[str] = (),
) -> DropsReport:
    """The report of one look, or of two with rates.

    examples: of the flight recorder, None if it cannot be had. namespace: see
    linux.kernel_counts. Examples of a former process are left out, as its counts are.
    """
    status = looks[-1].status
    counters = status.counters or CountersStatus()
    recorded = [each for each in examples or () if each.at >= status.started_at - _START_S]
    rows: list[DropRow] = []
    undecided: list[str] = []
    for direction, counted in counters.directions:
        for reason, count in counted.drops.items():
            of_kind = [e for e in recorded if (e.direction, e.reason) == (direction, reason)]
            taken = [each for each in of_kind if selection.takes(each)]
            if selection.is_exact:
                is_wanted = selection.takes_kind(direction, reason)
            else:
                is_wanted = bool(taken)
                if not of_kind:
                    undecided.append(f"{direction} {reason}")
            if is_wanted:
                rows.append(_row(direction, reason, count, taken, _rate(looks, direction, reason)))
    return DropsReport(
        version=status.version,
        node=status.public_ip,
        started_at=status.started_at,
        at=status.started_at + status.uptime_s,
        filter=selection.filter.text,
        is_exact=selection.is_exact,
        drops=sorted(rows, key=lambda row: -row.count),
        undecided=undecided,
        balances=[
            Balance(
                direction=direction,
                packets_in=counted.packets_in,
                packets_out=counted.packets_out,
                dropped=counted.dropped,
                holds=counted.is_conserved,
            )
            for direction, counted in counters.directions
        ],
        kernel=list(kernel_drops(status, namespace)),
        chaos=list(status.chaos),
        notes=list(notes),
    )


def _row(
    direction: str, reason: str, count: int, taken: Sequence[DropExample], rate: float | None
) -> DropRow:
    newest = max(taken, key=lambda each: each.at, default=None)
    known = _REASONS.get(reason)
    return DropRow(
        reason=reason,
        direction=direction,
        count=count,
        rate=rate,
        last=None if newest is None else newest.at,
        peer=None if newest is None else newest.peer,
        example=newest,
        means="a reason of another version of tundp" if known is None else known.means,
        next_step="" if known is None else known.next_step,
    )


def _rate(looks: Sequence[Look], direction: str, reason: str) -> float | None:
    """Packets a second between the two looks, if it is one daemon that was looked at."""
    first, last = looks[0], looks[-1]
    seconds = last.clock_s - first.clock_s
    if seconds <= 0 or first.status.started_at != last.status.started_at:
        return None
    counts = [dict((each.status.counters or CountersStatus()).directions) for each in (first, last)]
    before, after = (each[direction].drops.get(reason, 0) for each in counts)
    return max(0, after - before) / seconds
