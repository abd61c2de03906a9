"""Stories: what daemon, netfilter and kernel know of the same packet, put together.

Pure: times come with the records.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tundp.linux.legacy_rules import LegacyRule
from tundp.linux.nft_trace import Path, Step
from tundp.observe.skb_steps import SkbStep, step_document
from tundp.observe.story_index import Index, Twins
from tundp.observe.trace import Trace, after_text, event_document, flow_of, is_ipv4, lines
from tundp.wire import describe

HOLD_NS: Final = 250_000_000
"""A trace waits so long for netfilter's account of its packet, and for the kernel's drops, and
until the kernel was asked for its drops once more: to find a function's name takes that long."""
LATE_NS: Final = 700_000_000
"""A drop without its packet's trace waits until all events up to so much later were told."""
LATE_MAX_NS: Final = 10_000_000_000
"""Nobody who is behind is waited for longer than that: a daemon that hangs tells nothing."""
REMEMBERED: Final = 1024
"""Packets that were shown, to which a later drop can be put."""
WAITING_MAX: Final = 4096
"""Stories that wait for their other parts, at most: a quarter of a second of netfilter's part at
bulk traffic would be tens of thousands."""
SUSPECTS_MAX: Final = 4
_ID_STEP: Final = 64
"""More than a super-packet mostly has packets, so that it has two names at most."""
_MIN_HEADER: Final = 20
_ICMP: Final = 1
_TCP: Final = 6
_UDP: Final = 17
_Key = tuple[int, int, int]


@dataclass(slots=True)
class Story:
    """A packet's trace, its way through netfilter, its drops by the kernel; at least one."""

    trace: Trace | None
    path: Path | None = None
    drops: list[SkbStep] = field(default_factory=list)
    earlier: int | None = None
    """The number of the story that this one's drop goes on with."""
    suspects: Sequence[LegacyRule] = ()
    """Legacy rules that dropped something when netfilter dropped this packet."""
    path_name: Hashable = None
    """What it can be found by because of its path: key and mark."""

    @property
    def is_dropped(self) -> bool:
        """Whether any packet of it was dropped, by whomever."""
        return (
            (self.trace is not None and self.trace.is_dropped)
            or (self.path is not None and self.path.drop is not None)
            or any(not step.is_copy for step in self.drops)
        )

    @property
    def has_packet(self) -> bool:
        """Whether its packet was seen, and not only netfilter's words of it."""
        return self.trace is not None or bool(self.drops)

    @property
    def packet(self) -> bytes:
        """Its first bytes, or what netfilter says of them; of the datagram if nobody knows."""
        if self.trace is not None:
            return self.trace.first.packet
        if self.drops:
            return self.drops[0].inner or self.drops[0].drop.packet
        assert self.path is not None
        return self.path.header()

    @property
    def length(self) -> int:
        """Bytes of the packet; of a super-packet, the whole."""
        if self.trace is not None:
            return self.trace.first.record.length
        if self.drops:
            return self.drops[0].length
        assert self.path is not None
        return int(self.path.fields.get("length", "0"))


class Stories:
    """Joins traces with what kernel and netfilter say of the same packets a little later.

    At most WAITING_MAX wait: where more come, the oldest are due before their time.
    """

    def __init__(self, *, has_paths: bool) -> None:
        """has_paths: whether the kernel is asked, so that a trace has to wait for it."""
        self._hold_ns = HOLD_NS if has_paths else 0
        self._waiting: deque[tuple[int, Story]] = deque()
        self._late: deque[tuple[int, Story]] = deque()
        self._twins: dict[bytes, Twins[Story]] = {}
        """Those that wait and have a packet, by what it is recognised by."""
        self._untraced = Index[Story]()
        """Those of them that lack the engine's part: by that, or by key and mark of the path."""
        self._unpathed = Index[Story]()
        """Those of them that lack netfilter's part: by key, and by key and mark."""
        self._supers = Index[Story]()
        """Those of them with a super-packet: by flow and IP id, in steps of _ID_STEP."""
        self._shown: OrderedDict[bytes, int] = OrderedDict()
        self._paths: set[int] = set()
        """By id(): the paths of those that wait. A path can come again, with more steps."""

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting) + len(self._late)

    def add_trace(self, trace: Trace, now_ns: int) -> None:
        """A trace that is complete."""
        packet = trace.first.packet
        story = self._untraced.first(_identity(packet)) or self._only_path(packet)
        if story is not None:
            self._take_out(story)
            story.trace = trace
            self._put_in(story)
        else:
            self._wait(Story(trace), now_ns)

    def add_path(self, path: Path, now_ns: int) -> None:
        """A packet that left netfilter, or was dropped in it; of some, more is told later."""
        if id(path) in self._paths:
            return
        mark = _path_mark(path)
        if (story := self._unpathed.first((path.key, mark) if mark else path.key)) is not None:
            self._take_out(story)
            story.path = path
            self._put_in(story)
        else:
            self._wait(Story(None, path), now_ns)

    def add_drop(self, step: SkbStep, now_ns: int) -> None:
        """A drop by the kernel."""
        if step.inner:
            twins = self._twins.get(_identity(step.inner))
            if twins is not None and (story := twins.take(_kind(step))) is not None:
                story.drops.append(step)
                return
            if (story := self._only_path(step.inner)) is not None:
                self._take_out(story)
                story.drops.append(step)
                self._put_in(story)
                return
            for story in self._supers.all(_super_name(step.inner)):
                if story.trace is not None and _is_segment(story.trace, step.inner):
                    story.drops.append(step)
                    return
        self._wait(Story(None, None, [step]), now_ns)

    def suspect(self, rules: Sequence[LegacyRule]) -> None:
        """Legacy rules dropped something by now: maybe packets that netfilter dropped."""
        for _, story in (*self._waiting, *self._late):
            if not story.suspects and any(step.is_netfilter for step in story.drops):
                story.suspects = rules

    def due(
        self, now_ns: int, events_ns: int | None = None, drops_ns: int | None = None
    ) -> Iterator[Story]:
        """Stories that need not wait any longer, but those of packets the engine never had.

        events_ns, drops_ns: up to then the daemon told of all its events, the kernel of all its
        drops; None: up to now.
        """
        events_ns, drops_ns = (
            now_ns if heard_ns is None else min(now_ns, max(heard_ns, now_ns - LATE_MAX_NS))
            for heard_ns in (events_ns, drops_ns)
        )
        while self._late and len(self) > WAITING_MAX:  # those have waited longest
            yield from self._left(self._late.popleft()[1])
        while self._waiting and (self._waiting[0][0] <= drops_ns or len(self) > WAITING_MAX):
            due_ns, story = self._waiting.popleft()
            if story.drops and story.trace is None:
                self._late.append((due_ns + LATE_NS, story))
            else:
                yield from self._left(story)
        while self._late and self._late[0][0] <= events_ns:
            yield from self._left(self._late.popleft()[1])

    def _left(self, story: Story) -> Iterator[Story]:
        """Forget a story; itself, if it is one to be shown."""
        self._take_out(story)
        if story.trace is not None or story.is_dropped or story.drops:
            yield story

    def remember(self, story: Story, number: int) -> None:
        """A story was shown under a number: what the kernel drops of it later can name it."""
        if story.trace is None:
            return
        identity = _identity(story.packet)
        self._shown[identity] = number
        self._shown.move_to_end(identity)
        while len(self._shown) > REMEMBERED:
            self._shown.popitem(last=False)

    def recall(self, story: Story) -> None:
        """Name the story that this one goes on with, if that was shown."""
        if story.trace is None and story.drops and story.drops[0].inner:
            story.earlier = self._shown.get(_identity(story.drops[0].inner))

    def _wait(self, story: Story, now_ns: int) -> None:
        self._waiting.append((now_ns + self._hold_ns, story))
        self._put_in(story)

    def _only_path(self, packet: bytes) -> Story | None:
        """The oldest story of a packet of which only netfilter spoke until now."""
        key, mark = packet_key(packet), _mark(packet)
        found = self._untraced.first((key, mark)) if mark else None
        return found or self._untraced.first((key, b""))

    def _put_in(self, story: Story) -> None:
        """Put a story under all that it can be found by."""
        packet = story.packet
        if (path := story.path) is None:
            for name in _path_names(packet):
                self._unpathed.add(name, story)
        else:
            # Its path may be told of again, and have another name then.
            name = story.path_name = (path.key, _path_mark(path))
            self._paths.add(id(path))
            if not story.has_packet:
                self._untraced.add(name, story)
        if story.has_packet:
            identity = _identity(packet)
            self._twins.setdefault(identity, Twins(_kinds)).add(story)
            if story.trace is None:
                self._untraced.add(identity, story)
        if story.trace is not None:
            for name in _super_names(story.trace):
                self._supers.add(name, story)

    def _take_out(self, story: Story) -> None:
        """Undo _put_in."""
        packet = story.packet
        for name in _path_names(packet):
            self._unpathed.remove(name, story)
        if story.path is not None:
            self._paths.discard(id(story.path))
            self._untraced.remove(story.path_name, story)
        identity = _identity(packet)
        self._untraced.remove(identity, story)
        if (twins := self._twins.get(identity)) is not None:
            twins.remove(story)
            if not twins:
                del self._twins[identity]
        if story.trace is not None:
            for name in _super_names(story.trace):
                self._supers.remove(name, story)


def _kind(step: SkbStep) -> tuple[str, str | None]:
    return step.drop.reason, step.drop.function


def _kinds(story: Story) -> set[Hashable]:
    return {_kind(step) for step in story.drops}


def _mark(packet: bytes) -> bytes:
    """Protocol, and ports or type and numbers of an echo; empty if they are not there.

    What netfilter tells of a packet beyond its key: the IP id of many is 0.
    """
    start = max(_MIN_HEADER, (packet[0] & 0x0F) * 4) if packet else _MIN_HEADER
    first = packet[start : start + 8]
    if packet[6:7] and (packet[6] & 0x1F or packet[7]):
        return b""
    if packet[9:10] == bytes([_ICMP]):
        is_echo = len(first) == 8 and first[0] in (0, 8)
        return packet[9:10] + first[:1] + first[4:] if is_echo else b""
    has_ports = packet[9:10] in (bytes([_TCP]), bytes([_UDP])) and len(first) >= 4
    return packet[9:10] + first[:4] if has_ports else b""


def _path_mark(path: Path) -> bytes:
    """The same of what netfilter says, which may be less."""
    is_echo = {"icmp id", "sequence"} <= path.fields.keys()
    return _mark(path.header()) if is_echo or path.fields.get("protocol") != "icmp" else b""


def _path_names(packet: bytes) -> Iterator[Hashable]:
    """What netfilter may know a packet by."""
    key, mark = packet_key(packet), _mark(packet)
    yield key
    if mark:
        yield key, mark


def _super_name(packet: bytes) -> Hashable:
    return flow_of(packet), int.from_bytes(packet[4:6], "big") // _ID_STEP


def _super_names(trace: Trace) -> Iterator[Hashable]:
    """Those of the packets in a super-packet; none for another."""
    packet, count = trace.first.packet, trace.first.record.packets
    if count <= 1 or not is_ipv4(packet):
        return
    flow, first = flow_of(packet), int.from_bytes(packet[4:6], "big")
    for step in range(first // _ID_STEP, (first + count - 1) // _ID_STEP + 1):
        yield flow, step % (0x10000 // _ID_STEP)


def _is_segment(trace: Trace, packet: bytes) -> bool:
    """Whether a packet was cut from a super-packet: segments count IP ids on."""
    whole = trace.first.packet
    if not is_ipv4(whole) or flow_of(whole) != flow_of(packet):
        return False
    first, this = (int.from_bytes(each[4:6], "big") for each in (whole, packet))
    return (this - first) & 0xFFFF < trace.first.record.packets


def _identity(packet: bytes) -> bytes:
    """What stays the same of one packet on its way, and tells it from the next of its flow."""
    header_len = max(20, (packet[0] & 0x0F) * 4) if packet else 20
    transport = packet[header_len : header_len + 8]
    if packet[9:10] == bytes([_UDP]):
        transport = transport[:6]
    elif packet[9:10] == bytes([_ICMP]):
        transport = transport[:2] + transport[4:]
    return packet[4:6] + packet[6:8] + packet[9:10] + packet[12:20] + transport


def packet_key(packet: bytes) -> tuple[int, int, int] | None:
    """Source, destination and IP id; None if that is not there."""
    if not is_ipv4(packet):
        return None
    source, destination = (int.from_bytes(packet[at : at + 4], "big") for at in (12, 16))
    return source, destination, int.from_bytes(packet[4:6], "big")


# What people read


def story_lines(story: Story, number: int, node: str, base_ns: int | None = None) -> Iterator[str]:
    """One story: the packet, its stages, and the part of netfilter and kernel where it belongs.

    base_ns: what times count from; None: the first stage.
    """
    trace, path = story.trace, story.path
    if trace is None:
        yield f"#{number} {describe.packet(story.packet, story.length)}"
        if story.earlier is not None:
            yield f"  the packet of #{story.earlier}, later"
    else:
        head, *rest = lines(trace, number, node, base_ns)
        yield head
        if path is not None and trace.first.stage.is_encap:
            yield from _path_lines(path, node)
        yield from rest
    if path is not None and not (trace is not None and trace.first.stage.is_encap):
        yield from _path_lines(path, node)
    if base_ns is None and trace is not None:
        base_ns = trace.first.time_ns
    yield from _drop_lines(story, node, base_ns)


def _drop_lines(story: Story, node: str, base_ns: int | None) -> Iterator[str]:
    """The kernel's drops, those of one kind as one line."""
    kinds: dict[str, list[SkbStep]] = {}
    for step in sorted(story.drops, key=lambda each: each.drop.time_ns):
        kinds.setdefault(step.text, []).append(step)
    has_rule = story.path is not None and story.path.drop is not None
    suspects = () if has_rule else story.suspects[:SUSPECTS_MAX]
    for text, steps in kinds.items():
        step = steps[0]
        # A packet that netfilter drops was not read yet, or was written long ago.
        after = "" if base_ns is None else after_text(step.drop.time_ns - base_ns)
        many = f" ({len(steps)} times)" if len(steps) > 1 else ""
        yield f"  {node} {after:>9}  kernel       {text}{many}"
        if step.is_netfilter:
            for rule in suspects:
                yield f"    a rule of legacy iptables counted drops meanwhile: {rule}"
                yield f"    lets it pass: {rule.mend}"
        if step.next_step and not (step.is_netfilter and (has_rule or suspects)):
            yield f"    next step: {step.next_step}"


def _path_lines(path: Path, node: str) -> Iterator[str]:
    start = f"  {node} {'':>9}  netfilter    "
    came = f"in by {path.fields['iif']}, " if "iif" in path.fields else ""
    if (step := path.drop) is not None:
        rule = f"handle {step.handle}: {step.text}" if step.handle is not None else "policy"
        yield f"{start}{came}DROP {step.where}, {rule}"
        yield f"    lets it pass: {step.mend}"
        return
    decided = [step for step in path.steps if step.verdict.startswith("accept")]
    by = ", ".join(dict.fromkeys(_accepted(step) for step in decided))
    yield f"{start}{came}accepted{f' by {by}' if by else ''}"


def _accepted(step: Step) -> str:
    rule = "policy" if step.handle is None else f"handle {step.handle}"
    return f"{step.where} {rule}"


# What programs read


def document(story: Story, number: int) -> Mapping[str, Any]:
    """One story, with every record of it; times are Unix nanoseconds."""
    trace, path = story.trace, story.path
    return {
        "number": number,
        "packet": describe.packet(story.packet, story.length),
        "is_complete": trace is not None and trace.is_complete,
        "is_dropped": story.is_dropped,
        "events": [] if trace is None else list(map(event_document, (trace.first, *trace.rest))),
        "netfilter": None if path is None else _path_document(path),
        "kernel": list(map(step_document, story.drops)),
        "earlier": story.earlier,
        "suspects": [
            {"rule": str(each), "mend": each.mend}
            for each in (() if path is not None and path.drop else story.suspects)
        ],
    }


def _path_document(path: Path) -> Mapping[str, Any]:
    return {
        "unix_ns": path.began_ns,
        "fields": dict(path.fields),
        "dropped_by": None if path.drop is None else path.drop.where,
        "steps": [
            {
                "chain": step.where,
                "rule": step.text,
                "handle": step.handle,
                "verdict": step.verdict,
            }
            for step in path.steps
        ],
    }
