"""Traces of two nodes joined: what the other node saw of a packet, beside what this one did.

Packets are recognised by what no node changes: addresses, protocol, IP identification, and the
first bytes behind the header (ports and TCP sequence number; ICMP type, id and sequence; of UDP,
which may have no identification, all that records hold). TTL and checksums differ. Engines record
each datagram of a super-packet, so that this holds for those, too. Times of the other node are
corrected by the estimated difference of the clocks. Pure.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from tundp.observe.events import Event, PeerName
from tundp.observe.stories import LATE_MAX_NS, WAITING_MAX, Story
from tundp.observe.trace import STAGE_NAMES, Trace, Tracer
from tundp.wire.event import Record, Stage
from tundp.wire.peer_bodies import CAPTURED_MAX

NO_RECORD_NS: Final = 500_000_000
"""So long after a packet the other node's record of it is waited for, at least; PeerView.late_ns
is added."""
GIVE_UP_NS: Final = 3_000_000_000
"""And so long at most, if that node is not heard of."""
KEPT_NS: Final = LATE_MAX_NS + 2 * GIVE_UP_NS
"""So long a record is kept for which nothing was found: longer than stories are held."""
_LOSSES: Final = 64
KEPT_MAX: Final = 20_000
_STAGES: Final = {name: stage for stage, name in STAGE_NAMES.items()}
_MIN_HEADER: Final = 20
_UDP: Final = 17
_UDP_SUM: Final = slice(6, 8)
"""Its checksum, which may be unfinished where it is read."""
_KEY_LEN: Final = 8
"""Bytes behind the header that tell packets apart, of other protocols."""

Key = tuple[bytes, ...]


def key_of(packet: bytes) -> Key | None:
    """What stays the same of a packet between two nodes; None if it is no IPv4 packet."""
    if len(packet) < _MIN_HEADER or packet[0] >> 4 != 4:
        return None
    start = max(_MIN_HEADER, (packet[0] & 0x0F) * 4)
    offset = bytes([packet[6] & 0x1F, packet[7]])
    known = packet[start:CAPTURED_MAX]
    if packet[9] != _UDP:
        first = known[:_KEY_LEN]
    elif any(offset):
        first = known
    else:
        first = known[: _UDP_SUM.start] + known[_UDP_SUM.stop :]
    return packet[12:20], packet[9:10], packet[4:6], offset, first


@unique
class PeerState(Enum):
    """What there is of another node's half."""

    WAITING = "waiting"
    """It is being asked."""
    TRACING = "tracing"
    """It shows what it sees."""
    NOT_ASKED = "not-asked"
    """It cannot or does not want to: `text` says why."""
    ENDED = "ended"


class PeerView:
    """What one other node says."""

    def __init__(
        self,
        node: str,
        own: PeerName,
        *,
        own_subnet: IPv4Network | None = None,
        late_ns: int = 0,
    ) -> None:
        """node: its underlay address. own: this node, as the other one sees it.

        own_subnet: this node's; None if it is not known. late_ns: by how much this node makes
        packets to it late on purpose.
        """
        self.node = node
        self.state = PeerState.WAITING
        self.text = "it has not answered yet"
        self.hello: Mapping[str, Any] = {}
        self.began_ns = 0
        """Unix time from which on it is known to look, by this node's clock."""
        self.lost = 0
        self.late_ns = late_ns
        self._own = own
        self._own_subnet = own_subnet
        self._tracer = Tracer()
        self._known: dict[tuple[bool, Key], deque[Trace]] = {}
        """By direction (is it encap there) and what the packet is recognised by."""
        self._order: deque[tuple[int, bool, Key]] = deque()
        self._losses: deque[tuple[int, int]] = deque([(0, 0)], maxlen=_LOSSES)
        """When it was heard how many records had been lost, each time it was another number."""
        self._empty: deque[int] = deque(maxlen=2)
        """When it had no more records, the last two times."""

    @property
    def error_ns(self) -> int:
        """How far the difference of the clocks may be off."""
        return round(float(self.hello.get("error_s", 0)) * 1e9)

    def take(self, part: Mapping[str, Any], now_ns: int) -> None:
        """An object of /v1/peers/trace. KeyError, ValueError or TypeError if it is none."""
        if "hello" in part:
            self.hello = part["hello"]
            self.state, self.text, self.began_ns = PeerState.TRACING, "", now_ns
        elif "record" in part:
            for trace in self._tracer.add(self._event(part["record"])):
                self._keep(trace, now_ns)
        elif "lost" in part:
            if (lost := int(part["lost"])) != self.lost:
                self.lost = lost
                self._losses.append((now_ns, lost))
            if part.get("is_all"):
                self._empty.append(now_ns)
        elif "error" in part:
            is_begun = self.state is PeerState.TRACING
            self.state = PeerState.ENDED if is_begun else PeerState.NOT_ASKED
            self.text = str(part["error"])

    def end(self, text: str) -> None:
        """It says nothing any more."""
        if self.state in (PeerState.WAITING, PeerState.TRACING):
            is_begun = self.state is PeerState.TRACING
            self.state = PeerState.ENDED if is_begun else PeerState.NOT_ASKED
            self.text = text

    def look(self, now_ns: int) -> None:
        """Traces that will not go on are known, too; those nobody wanted are forgotten."""
        for trace in self._tracer.stale(now_ns=now_ns):
            self._keep(trace, now_ns)
        while self._order and (self._order[0][0] + KEPT_NS < now_ns or len(self._order) > KEPT_MAX):
            _, is_encap, key = self._order.popleft()
            self.find(key, is_encap=is_encap)

    def lost_by(self, time_ns: int) -> int:
        """What was known by then of the records it lost; of more news than are kept, the oldest."""
        return next((n for at, n in reversed(self._losses) if at <= time_ns), self._losses[0][1])

    def has_said_all(self, since_ns: int) -> bool:
        """Whether what it saw until then would have come: twice since, it had nothing more."""
        return len(self._empty) == self._empty.maxlen and self._empty[0] >= since_ns

    @property
    def ends(self) -> tuple[IPv4Network, IPv4Network] | None:
        """The subnets between which it traces: this node's and its own; None if not known."""
        theirs = self.hello.get("subnet")
        if theirs is None or self._own_subnet is None:
            return None
        return self._own_subnet, IPv4Network(theirs)

    def looks_at(self, key: Key) -> bool:
        """Whether its trace is of such packets: one end in each of `ends`."""
        if self.ends is None:
            return True
        own, theirs = self.ends
        first, second = IPv4Address(key[0][:4]), IPv4Address(key[0][4:])
        return (first in own and second in theirs) or (first in theirs and second in own)

    def find(self, key: Key, *, is_encap: bool) -> Trace | None:
        """The oldest trace there of a packet; each is found once."""
        traces = self._known.get((is_encap, key))
        if not traces:
            return None
        found = traces.popleft()
        if not traces:
            del self._known[is_encap, key]
        return found

    def _keep(self, trace: Trace, now_ns: int) -> None:
        is_encap = trace.first.stage.is_encap
        events = trace.rest if is_encap and trace.rest else [trace.first]
        for key in filter(None, (key_of(event.packet) for event in events)):
            self._known.setdefault((is_encap, key), deque()).append(trace)
            self._order.append((now_ns, is_encap, key))

    def _event(self, record: Mapping[str, Any]) -> Event:
        stage = _STAGES[record["stage"]]
        offset_ns = round(float(self.hello["offset_s"]) * 1e9)
        time_ns = int(record["unix_ns"]) - offset_ns
        return Event(
            worker=int(record["worker"]),
            record=Record(
                stage=stage,
                is_dropped=record["verdict"] == "drop",
                time_ns=time_ns,
                packet_id=int(record["packet_id"]),
                more_ids=int(record["last_packet_id"]) - int(record["packet_id"]),
                error=_errno(record["error"]),
                length=int(record["length"]),
                packets=int(record["packets"]),
                together=int(record["together"]),
                gso_size=int(record["gso_size"]),
                packet=bytes.fromhex(record["packet"]),
            ),
            time_ns=time_ns,
            reason=record["reason"],
            peer=self._own if stage.is_encap else None,
        )


def _errno(name: str | None) -> int:
    if name is None:
        return 0
    return int(name) if name.isdigit() else int(getattr(errno, name, 0))


@dataclass(slots=True, kw_only=True)
class Half:
    """The other node's half of a story."""

    view: PeerView
    keys: list[Key]
    """Of the packets it is asked about, those not found yet."""
    wanted: int
    """How many there were."""
    after_ns: int
    """Unix time of the last thing this node did with the packet."""
    lost_then: int
    """Records of that node that were lost before."""
    is_sender: bool
    """Whether the other node sent the packet, and this one received it."""
    found: list[tuple[Key, Trace]] = field(default_factory=list)
    unwaited: str = ""
    """Why it was not waited for as long as it takes; empty if it was."""

    @property
    def is_dropped(self) -> bool:
        """Whether the other node dropped any of it, or has no record where it should."""
        is_lost = self.is_lost
        return is_lost or any(event.record.is_dropped for event in their_events(self))

    @property
    def is_lost(self) -> bool:
        """Whether the other node would know of a packet, and does not."""
        view = self.view
        return bool(
            self.keys
            and not self.is_sender  # it arrived here
            and not self.unwaited
            and view.state is PeerState.TRACING
            and self.is_looked_at
            and view.began_ns <= self.after_ns
            and view.lost == self.lost_then
            and view.has_said_all(self.arrives_ns)
        )

    @property
    def is_looked_at(self) -> bool:
        """Whether the other node's trace is of packets with such addresses."""
        return all(map(self.view.looks_at, self.keys))

    @property
    def arrives_ns(self) -> int:
        """Unix time until which this node may have kept it."""
        return self.after_ns + (0 if self.is_sender else self.view.late_ns)

    @property
    def waits_ns(self) -> int:
        """Unix time until which the record of it is waited for."""
        return self.arrives_ns + NO_RECORD_NS

    def missing(self) -> str:
        """What is not known of it, and why; empty if all is."""
        view, count = self.view, len(self.keys)
        if not count:
            return ""
        which = "" if self.wanted == 1 else f"of {count} of {self.wanted} packets "
        if view.state in (PeerState.WAITING, PeerState.NOT_ASKED):
            return f"not looked at: {view.text}"
        if not self.is_looked_at and view.ends is not None:
            own, theirs = view.ends
            return f"not looked at there: that node traces packets between {own} and {theirs} only"
        if self.after_ns < view.began_ns:
            return f"{which}no record: it was not asked yet when this packet passed"
        if view.state is PeerState.ENDED:
            return f"{which}no record: {view.text}"
        if view.lost > self.lost_then:
            return (
                f"{which}no record: {view.lost - self.lost_then} of its records were lost"
                " meanwhile, since more packets match than it can tell of; a narrower filter"
                " misses none"
            )
        if self.unwaited:
            return f"{which}no record yet: {self.unwaited}"
        if not view.has_said_all(self.arrives_ns):
            return f"{which}no record: nothing more was heard of it for {GIVE_UP_NS // 10**9} s"
        if self.is_sender:
            return (
                f"{which}no record: its daemon asked by itself whether this node answers, which"
                " passes no engine there, or somebody else sent it in its name"
            )
        return (
            f"{which}no record of it within {(self.waits_ns - self.after_ns) / 1e9:g} s: lost"
            " between the nodes, still on the way, or dropped there before tundp (its firewall, the"
            " socket's buffer)"
        )


@dataclass(slots=True)
class Joined:
    """A story of this node, and the other node's half; None if there is no other node in it."""

    story: Story
    half: Half | None = None

    @property
    def is_dropped(self) -> bool:
        """Whether any packet of it was dropped, on either node."""
        return self.story.is_dropped or (self.half is not None and self.half.is_dropped)


class Joiner:
    """Holds stories until the other node's half is known, or known to be missing.

    At most WAITING_MAX wait: where more come, the oldest are due before their time.
    """

    def __init__(self) -> None:
        self._waiting: deque[Joined] = deque()

    def add(self, story: Story, view: PeerView | None) -> None:
        """A story of this node. view: of the node the packet went to or came from, if any."""
        self._waiting.append(Joined(story, None if view is None else _half(story, view)))

    def due(self, now_ns: int, *, is_last: bool = False) -> Iterator[Joined]:
        """Stories in order, as far as they need not wait any longer. is_last: all."""
        for joined in self._waiting:
            if joined.half is not None:
                _fill(joined.half)
        while self._waiting:
            half = self._waiting[0].half
            if half is not None and not _is_known(half, now_ns):
                if is_last:
                    half.unwaited = "the trace ended before that node's answer was due"
                elif len(self._waiting) > WAITING_MAX:
                    half.unwaited = f"not waited for, since {WAITING_MAX:,} packets already are"
                else:
                    return
            yield self._waiting.popleft()


def peer_of(story: Story) -> PeerName | None:
    """The other node that a story is about: of which subnets lead to it. None: no other's."""
    if story.trace is None:
        return None
    first = story.trace.first
    events = story.trace.rest if first.stage is Stage.TUN_READ else [first]
    for event in events:
        passed = not event.record.is_dropped and event.stage in (Stage.UDP_SEND, Stage.UDP_RECEIVE)
        if passed and event.peer is not None and event.peer.subnets:
            return event.peer
    return None


def _half(story: Story, view: PeerView) -> Half | None:
    trace = story.trace
    assert trace is not None
    events = [trace.first]
    if trace.first.stage.is_encap:
        everything = (trace.first, *trace.rest)
        events = [
            each for each in everything if each.stage is Stage.UDP_SEND and each.reason is None
        ]
    keys = [key for key in (key_of(event.packet) for event in events) if key is not None]
    if not keys:
        return None
    return Half(
        view=view,
        keys=keys,
        wanted=len(keys),
        after_ns=events[-1].time_ns,
        lost_then=view.lost_by(events[-1].time_ns),
        is_sender=not trace.first.stage.is_encap,
    )


def _fill(half: Half) -> None:
    """Look for the packets that are not found yet."""
    left = []
    for key in half.keys:
        if (trace := half.view.find(key, is_encap=half.is_sender)) is None:
            left.append(key)
        else:
            half.found.append((key, trace))
    half.keys = left


def _is_known(half: Half | None, now_ns: int) -> bool:
    if half is None or not half.keys:
        return True
    view = half.view
    if view.state in (PeerState.NOT_ASKED, PeerState.ENDED):
        return True
    if view.state is PeerState.TRACING and not half.is_looked_at:
        return True
    if now_ns < half.waits_ns:
        return False
    if now_ns >= half.arrives_ns + GIVE_UP_NS or view.lost > half.lost_then:
        return True
    is_asked = view.state is PeerState.TRACING
    return is_asked and (half.after_ns < view.began_ns or view.has_said_all(half.arrives_ns))


def their_events(half: Half) -> Iterator[Event]:
    """The events of the other node, each once: of a read of many packets those of this story."""
    wanted = {key for key, _ in half.found}
    seen: set[int] = set()
    for _, trace in half.found:
        for event in (trace.first, *trace.rest):
            is_sent = half.is_sender and event is not trace.first
            if id(event) in seen or (is_sent and key_of(event.packet) not in wanted):
                continue
            seen.add(id(event))
            yield event
