"""Stories: what daemon, netfilter and kernel know of the same packet, put together.

Pure: times come with the records.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tundp.linux.legacy_rules import LegacyRule
from tundp.linux.nft_trace import Path, Step
from tundp.observe.skb_steps import SkbStep, step_document
from tundp.observe.trace import Trace, after_text, event_document, flow_of, is_ipv4, lines
from tundp.wire import describe

HOLD_NS: Final = 250_000_000
"""A trace waits so long for netfilter's account of its packet, and for the kernel's drops."""
LATE_NS: Final = 700_000_000
"""A drop without its packet's trace waits so much longer: events of a busy daemon are late."""
REMEMBERED: Final = 1024
"""Packets that were shown, to which a later drop can be put."""
WAITING_MAX: Final = 4096
"""Stories that wait for their other parts, at most: a quarter of a second of netfilter's part at
bulk traffic would be tens of thousands."""
SUSPECTS_MAX: Final = 4
_ICMP: Final = 1
_UDP: Final = 17
_Key = tuple[int, int, int]
_Index = dict[_Key | None, deque["Story"]]


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

    @property
    def is_dropped(self) -> bool:
        """Whether any packet of it was dropped, by whomever."""
        return (
            (self.trace is not None and self.trace.is_dropped)
            or (self.path is not None and self.path.drop is not None)
            or any(not step.is_copy for step in self.drops)
        )

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
        self._by_key: _Index = {}
        """Those that wait, oldest first."""
        self._untraced: _Index = {}
        """Those of them that lack the engine's part."""
        self._unpathed: _Index = {}
        """Those of them that lack netfilter's part."""
        self._supers: dict[int, Story] = {}
        """Those of them with a super-packet, by identity."""
        self._shown: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting) + len(self._late)

    def add_trace(self, trace: Trace, now_ns: int) -> None:
        """A trace that is complete."""
        packet = trace.first.packet
        key = packet_key(packet)
        for story in self._untraced.get(key, ()):
            if _is_of(story, packet):
                story.trace = trace
                _remove(self._untraced, key, story)
                break
        else:
            story = Story(trace)
            self._wait(story, key, now_ns)
        if trace.first.record.packets > 1:
            self._supers[id(story)] = story

    def add_path(self, path: Path, now_ns: int) -> None:
        """A packet that left netfilter, or was dropped in it."""
        if (queue := self._unpathed.get(path.key)) is not None:
            story = queue[0]
            story.path = path
            _remove(self._unpathed, path.key, story)
            return
        self._wait(Story(None, path), path.key, now_ns)

    def add_drop(self, step: SkbStep, now_ns: int) -> None:
        """A drop by the kernel."""
        if step.inner:
            for story in self._by_key.get(packet_key(step.inner), ()):
                if _is_of(story, step.inner) and not _has(story, step):
                    story.drops.append(step)
                    return
            for story in self._supers.values():
                if story.trace is not None and _is_segment(story.trace, step.inner):
                    story.drops.append(step)
                    return
        story = Story(None, None, [step])
        story.earlier = self._shown.get(_identity(step.inner)) if step.inner else None
        self._wait(story, packet_key(story.packet), now_ns)

    def suspect(self, rules: Sequence[LegacyRule]) -> None:
        """Legacy rules dropped something by now: maybe packets that netfilter dropped."""
        for _, story in (*self._waiting, *self._late):
            if not story.suspects and any(step.is_netfilter for step in story.drops):
                story.suspects = rules

    def due(self, now_ns: int) -> Iterator[Story]:
        """Stories that need not wait any longer, but those of packets the engine never had."""
        while self._waiting and (self._waiting[0][0] <= now_ns or len(self) > WAITING_MAX):
            due_ns, story = self._waiting.popleft()
            if story.drops and story.trace is None:
                self._late.append((due_ns + LATE_NS, story))
            else:
                yield from self._left(story)
        while self._late and (self._late[0][0] <= now_ns or len(self) > WAITING_MAX):
            yield from self._left(self._late.popleft()[1])

    def _left(self, story: Story) -> Iterator[Story]:
        """Forget a story; itself, if it is one to be shown."""
        for key in {packet_key(story.packet), story.path.key if story.path else None}:
            for index in (self._by_key, self._untraced, self._unpathed):
                _remove(index, key, story)
        self._supers.pop(id(story), None)
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

    def _wait(self, story: Story, key: _Key | None, now_ns: int) -> None:
        self._waiting.append((now_ns + self._hold_ns, story))
        self._by_key.setdefault(key, deque()).append(story)
        if story.trace is None:
            self._untraced.setdefault(key, deque()).append(story)
        if story.path is None:
            self._unpathed.setdefault(key, deque()).append(story)


def _remove(index: _Index, key: _Key | None, story: Story) -> None:
    """Take a story out of an index, if it is there; of a packet's, mostly the oldest goes first."""
    queue = index.get(key)
    if queue is None:
        return
    if queue[0] is story:
        queue.popleft()
    else:
        queue = index[key] = deque(each for each in queue if each is not story)
    if not queue:
        del index[key]


def _is_of(story: Story, packet: bytes) -> bool:
    """Whether a story with the same key is a packet's: one with IP id 0 needs a closer look."""
    if story.trace is not None:
        return _identity(story.trace.first.packet) == _identity(packet)
    if story.drops:
        return _identity(story.drops[0].inner) == _identity(packet)
    return True


def _has(story: Story, step: SkbStep) -> bool:
    """Whether such a drop is there already: this one is of another packet that looks the same."""
    return any(
        (each.drop.reason, each.drop.function) == (step.drop.reason, step.drop.function)
        for each in story.drops
    )


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
