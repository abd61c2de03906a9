"""Traces: the records of one packet put together, from read to send, or from receive to write.

Encap records are joined by worker and packet id. Decap ones too, and by flow: a coalesced write
holds packets of several receives, in order within each flow. A trace is complete once every packet
its read brought was sent, written or dropped. Pure: times come with the records.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, Final

from tundp.observe.events import Event, PeerName
from tundp.wire import describe
from tundp.wire.drop import DropReason
from tundp.wire.event import Stage

OPEN_MAX: Final = 4096
"""Traces that wait for more records; of more, the oldest are shown as they are."""
STALE_NS: Final = 200_000_000
"""A trace to which nothing came so long is shown as it is."""
STAGE_NAMES: Final = {
    Stage.TUN_READ: "tun.read",
    Stage.UDP_SEND: "udp.send",
    Stage.UDP_RECEIVE: "udp.receive",
    Stage.TUN_WRITE: "tun.write",
}
_BY_LABEL: Final = {reason.label: reason for reason in DropReason}
_MIN_HEADER: Final = 20


@dataclass(slots=True)
class Trace:
    """What happened to one packet, or super-packet, on one node."""

    first: Event
    """Its read or receive; if none was seen, what was."""
    rest: list[Event] = field(default_factory=list)
    """Sends, writes and drops, in order."""
    left: int = 0
    """Packets that neither left nor were dropped yet."""
    last_ns: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether it is known of every packet what became of it."""
        return self.left <= 0

    @property
    def is_dropped(self) -> bool:
        """Whether any packet of it was dropped."""
        return any(event.record.is_dropped for event in self.rest)


class Tracer:
    """Joins events into traces. Feed it the events of one node, in order within a worker."""

    def __init__(self) -> None:
        self._encap: dict[tuple[int, int], Trace] = {}
        """By worker and packet id."""
        self._decap: dict[tuple[int, bytes], deque[Trace]] = {}
        """By worker and flow, oldest first."""
        self._decap_count = 0
        self._newest_ns = 0

    def add(self, event: Event) -> Iterator[Trace]:
        """The traces that end with this event, or have waited for too long."""
        self._newest_ns = max(self._newest_ns, event.time_ns)
        if event.stage.is_encap:
            yield from self._add_encap(event)
        else:
            yield from self._add_decap(event)
        if len(self._encap) + self._decap_count > OPEN_MAX:
            yield from self.stale(0)

    def stale(self, wait_ns: int = STALE_NS, now_ns: int | None = None) -> Iterator[Trace]:
        """Traces to which nothing came for `wait_ns`; they are forgotten."""
        until = (self._newest_ns if now_ns is None else now_ns) - wait_ns
        for key in [key for key, trace in self._encap.items() if trace.last_ns <= until]:
            yield self._encap.pop(key)
        for flow in list(self._decap):
            queue = self._decap[flow]
            while queue and queue[0].last_ns <= until:
                self._decap_count -= 1
                yield queue.popleft()
            if not queue:
                del self._decap[flow]

    def _add_encap(self, event: Event) -> Iterator[Trace]:
        key = (event.worker, event.record.packet_id)
        if event.stage is Stage.TUN_READ:
            self._encap[key] = _begin(event)
            return
        trace = self._encap.get(key)
        if trace is None:
            # Read before anybody looked, or the filter knows no peer and no reason of a read.
            yield Trace(event, last_ns=event.time_ns)
            return
        _go_on(trace, event, event.record.packets)
        if trace.is_complete:
            yield self._encap.pop(key)

    def _add_decap(self, event: Event) -> Iterator[Trace]:
        key = (event.worker, flow_of(event.packet))
        if event.stage is Stage.UDP_RECEIVE:
            self._decap.setdefault(key, deque()).append(_begin(event))
            self._decap_count += 1
            return
        queue = self._decap.get(key)
        left = event.record.packets
        if not queue:
            yield Trace(event, last_ns=event.time_ns)
            return
        while queue and left > 0:
            trace = queue[0]
            if trace.first.record.packet_id > event.record.packet_id + event.record.more_ids:
                break
            _go_on(trace, event, min(left, trace.left))
            left -= trace.first.record.packets
            if not trace.is_complete:
                break
            self._decap_count -= 1
            yield queue.popleft()
        if not queue:
            del self._decap[key]


def _begin(event: Event) -> Trace:
    return Trace(event, [], event.record.packets, event.time_ns)


def _go_on(trace: Trace, event: Event, packets: int) -> None:
    trace.rest.append(event)
    trace.left -= packets
    trace.last_ns = event.time_ns


def flow_of(packet: bytes) -> bytes:
    """Addresses, protocol and ports: what stays the same on the way, of whatever is there."""
    if len(packet) < _MIN_HEADER:
        return packet
    header_len = max(_MIN_HEADER, (packet[0] & 0x0F) * 4)
    is_fragment = packet[6] & 0x1F or packet[7]
    ports = b"" if is_fragment else packet[header_len : header_len + 4]
    return packet[9:10] + packet[12:20] + (ports if packet[9] in (6, 17) else b"")


# What people read


def lines(trace: Trace, number: int, node: str, base_ns: int | None = None) -> Iterator[str]:
    """The packet, then a line for each stage with the time since `base_ns`, or since the first."""
    first = trace.first
    base_ns = first.time_ns if base_ns is None else base_ns
    many = f", super-packet of {first.record.packets}" if first.record.packets > 1 else ""
    yield f"#{number} {describe.packet(first.packet, first.record.length)}{many}"
    is_whole = first.stage in (Stage.TUN_READ, Stage.UDP_RECEIVE)
    came = _came(first) if is_whole else went([first])
    yield stage_line(node, first.time_ns - base_ns, first, came)
    if not is_whole:
        step = next_step(first.reason)
        yield from [f"    next step: {step}"] if step else []
    if first.stage is Stage.TUN_READ and trace.rest:
        peer = trace.rest[0].peer
        yield f"  {node} {'':>9}  lookup       {_lookup(first, peer, trace.rest[0])}"
    for run in runs(trace.rest):
        yield stage_line(node, run[0].time_ns - base_ns, run[0], went(run))
        if step := next_step(run[0].reason):
            yield f"    next step: {step}"
    if not trace.is_complete:
        yield f"    {trace.left} of its packets: nothing more was seen of them"


def stage_line(node: str, after_ns: int, event: Event, text: str) -> str:
    """One stage of a trace."""
    return f"  {node} {after_text(after_ns):>9}  {STAGE_NAMES[event.stage]:<11}  {text}".rstrip()


def after_text(after_ns: int) -> str:
    """Nanoseconds since the first stage, for people."""
    if abs(after_ns) < 10_000_000:
        return f"{round(after_ns / 1000):+d}us"
    return f"{after_ns / 1_000_000:+.1f}ms"


def _came(event: Event) -> str:
    record = event.record
    if event.stage is Stage.TUN_READ:
        return "" if not record.gso_size else f"{record.gso_size} B of payload in each"
    text = "" if event.peer is None else f"from {_peer(event.peer, event, is_source=True)}"
    if record.together > 1:
        text += f", {record.together} datagrams in one receive"
    wait = describe.socket_wait(record.wait_ns)
    return ", ".join(part for part in (text, wait) if part)


def went(run: list[Event]) -> str:
    """Events with one fate in a row."""
    event = run[0]
    record = event.record
    packets = sum(each.record.packets for each in run)
    many = f", {packets} packets" if packets > 1 else ""
    if record.is_dropped:
        reason = _BY_LABEL.get(event.reason or "")
        means = f": {reason.means}" if reason else ""
        refused = f" ({errno.errorcode.get(record.error, record.error)})" if record.error else ""
        return f"DROP {event.reason}{refused}{many}{means}"
    if event.stage is Stage.UDP_SEND:
        together = f", {record.together} datagrams in one send" if record.together > 1 else ""
        return f"{record.length} B to {_endpoint(event.peer)}{many}{together}"
    together = f", written as one super-packet of {record.packets}" if record.packets > 1 else ""
    return f"{record.length} B{together}"


def runs(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Neighbours of one stage, fate and peer."""
    run: list[Event] = []
    for event in events:
        if run and _fate(run[0]) != _fate(event):
            yield run
            run = []
        run.append(event)
    if run:
        yield run


def _fate(event: Event) -> tuple[object, ...]:
    return event.stage, event.reason, event.record.error, event.record.outer, event.record.together


def _lookup(first: Event, peer: PeerName | None, after: Event) -> str:
    destination = destination_of(first.packet)
    generation = f"FIB {after.record.generation}"
    if destination is None:
        return "none: it is no IPv4 packet"
    if peer is None:
        return f"{destination}: no peer's subnet, {generation}"
    subnet = peer.subnet_of(destination)
    through = f"{subnet} -> " if subnet else f"{destination} -> "
    return f"{through}{_endpoint(peer)}, {generation}"


def _peer(peer: PeerName, event: Event, *, is_source: bool) -> str:
    address = source_of(event.packet) if is_source else destination_of(event.packet)
    subnet = None if address is None else peer.subnet_of(address)
    if not event.record.hop:
        return f"{_endpoint(peer)}, which is no peer"
    if subnet is None:
        return f"{_endpoint(peer)}, whose subnet the source is not in"
    return f"{_endpoint(peer)}, which holds {subnet}"


def _endpoint(peer: PeerName | None) -> str:
    return "nobody" if peer is None else f"{peer.address}:{peer.port}"


def next_step(reason: str | None) -> str:
    """What to look at next after a drop; empty for none."""
    known = _BY_LABEL.get(reason or "")
    return known.next_step if known else ""


def source_of(packet: bytes) -> IPv4Address | None:
    """The inner source; None if that is not there."""
    return IPv4Address(packet[12:16]) if is_ipv4(packet) else None


def destination_of(packet: bytes) -> IPv4Address | None:
    """The inner destination; None if that is not there."""
    return IPv4Address(packet[16:20]) if is_ipv4(packet) else None


def is_ipv4(packet: bytes) -> bool:
    """Whether a whole IPv4 header may be there."""
    return len(packet) >= _MIN_HEADER and packet[0] >> 4 == 4


# What programs read


def event_document(event: Event) -> Mapping[str, Any]:
    """One record, its numbers as names; packet bytes in hex."""
    record, peer = event.record, event.peer
    return {
        "unix_ns": event.time_ns,
        "stage": STAGE_NAMES[event.stage],
        "direction": "encap" if event.stage.is_encap else "decap",
        "verdict": "drop" if record.is_dropped else "pass",
        "reason": event.reason,
        "error": errno.errorcode.get(record.error, str(record.error)) if record.error else None,
        "worker": event.worker,
        "packet_id": record.packet_id,
        "last_packet_id": record.packet_id + record.more_ids,
        "peer": None
        if peer is None
        else {
            "address": str(peer.address),
            "port": peer.port,
            "subnets": [str(subnet) for subnet in peer.subnets],
        },
        "hop": record.hop,
        "generation": record.generation,
        "length": record.length,
        "packets": record.packets,
        "together": record.together,
        "gso_size": record.gso_size,
        "wait_ns": record.wait_ns or None,
        "packet": event.packet.hex(),
    }
