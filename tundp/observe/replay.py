"""`tundp replay`: packets of a capture file through the rules and a lease table. Pure.

An outer datagram for the overlay's port is decapsulated, an inner packet encapsulated, by
wire/encap.py, which is the specification of every engine's verdicts; each packet of the file gets
one `Decision`. Nothing is sent, and no reply is judged in turn.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, Final

from tundp.choices import ReplayWay as Way
from tundp.lease.fib import Fib, NextHop
from tundp.observe import codec
from tundp.observe.codec import Malformed
from tundp.observe.ledger import DEFAULT_PORT, Ledger
from tundp.wire import encap, icmp, ip
from tundp.wire.capture_file import CapturedPacket
from tundp.wire.policy import Policy

REPLAY_SCHEMA: Final = 1
REMEMBERED: Final = 1 << 16
"""Packet ids that are remembered, to know a packet that was dropped again."""
_ETHERNET, _RAW, _SLL, _IPV4, _SLL2 = 1, 101, 113, 228, 276
_BARE: Final = (_RAW, _IPV4, 12, 14)
"""Link types without a link header; 12 and 14 are the raw IP of older files."""
_ETHERTYPE_IPV4: Final = 0x0800
_TAGS: Final = (0x8100, 0x88A8)
_UDP: Final = 17
_PORTS: Final = struct.Struct("!HH")
_PROTO_NAMES: Final = {1: "icmp", 6: "tcp", 17: "udp"}
_CUT: Final = (6, 17)
"""Protocols of which the kernel hands over super-packets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of one packet of the file."""

    number: int
    """Of the packet in the file, from 1."""
    direction: str = ""
    """`encap` or `decap`; empty for one that is not judged."""
    verdict: str
    """`forward`, `deliver`, `reply` (dropped, and an ICMP error sent), `drop` or `skip`."""
    reason: str = ""
    """The drop reason; of `skip`, why it is not judged."""
    source: str = ""
    """Of the inner packet, as far as it has one."""
    destination: str = ""
    proto: str = ""
    length: int = 0
    """Bytes of the inner packet, as it says; 0 if it cannot be read."""
    hop: str = ""
    """Where it is sent; of decap, where it came from."""
    packets: int = 0
    """Datagrams sent, or packets delivered; more than 1 if it was fragmented."""
    notes: Sequence[str] = ()
    """`source_mismatch` and `destination_mismatch` for what is counted and delivered; `super`: a
    super-packet, judged as the first of its packets."""
    answer: str = ""
    """The ICMP error, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """The decisions about a file."""

    schema: int = REPLAY_SCHEMA
    """Goes up when a member changes meaning, changes type or goes."""
    decisions: Sequence[Decision]
    summary: Mapping[str, int]
    """How many of each: `encap forward`, `decap drop source_mismatch`, `skip`, ..."""

    def to_json(self) -> dict[str, Any]:
        """For -o json, and for --expect."""
        return codec.to_json(self)

    @classmethod
    def from_json(cls, document: Any) -> Replayed:
        """The reverse. Malformed, if it is no such document."""
        if not isinstance(document, dict) or document.get("schema") != REPLAY_SCHEMA:
            raise Malformed(f"this is no output of tundp replay of schema {REPLAY_SCHEMA}")
        return codec.from_json(cls, document)


@dataclass(slots=True)
class Rules:
    """A lease table, and what else decides about packets."""

    leases: Ledger
    way: Way = Way.AUTO
    mtu: int = 0xFFFF
    """Bytes of the largest inner packet that a path carries."""
    _seen: dict[int, None] = field(default_factory=dict)
    """The ids of packets judged where they came in: a drop of one is no packet more."""
    _sides: set[Way] = field(default_factory=set)
    """Which sides of the daemon the file has packets of, by the names of its interfaces."""
    _fib: Fib = field(init=False)
    _policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        """Make the table once: a file may have millions of packets."""
        self._fib = self.leases.fib()
        self._policy = self.leases.policy()

    @property
    def port(self) -> int:
        """The overlay's UDP port."""
        return self.leases.port or DEFAULT_PORT

    def decide(self, captured: CapturedPacket) -> Decision:
        """Judge one packet of the file."""
        packet, why_not = inner_of_link(captured)
        if packet is None:
            return Decision(number=captured.number, verdict="skip", reason=why_not)
        outer = _Outer.read(packet, self.port)
        side, why_not = self._side(packet, outer, captured)
        if side is not None and captured.packet_id is not None:
            self._remember(captured.packet_id)
        if side is Way.DECAP and outer is not None:
            return self._decapsulate(captured.number, outer)
        if side is Way.ENCAP:
            is_bare = captured.linktype in _BARE
            return self._encapsulate(captured.number, packet, may_be_super=is_bare)
        return Decision(number=captured.number, verdict="skip", reason=why_not)

    def _remember(self, packet_id: int) -> None:
        if len(self._seen) >= REMEMBERED:
            del self._seen[next(iter(self._seen))]
        self._seen[packet_id] = None

    def _side(
        self, packet: bytearray, outer: _Outer | None, captured: CapturedPacket
    ) -> tuple[Way | None, str]:
        """The direction of a packet; None, and why it is not judged."""
        if self.way is Way.ENCAP:
            return Way.ENCAP, ""
        if self.way is Way.DECAP:
            return (Way.DECAP, "") if outer else (None, f"no UDP datagram for port {self.port}")
        name = captured.interface
        if name.startswith("udp:"):
            self._sides.add(Way.DECAP)
            return self._outer_side(outer, captured)
        if name.startswith("drop/"):
            return self._dropped_side(packet, captured)
        if name.endswith(("/in", "/out")):
            self._sides.add(Way.ENCAP)
        if name.endswith("/out"):
            if captured.packet_id is not None and captured.packet_id not in self._seen:
                return None, (
                    "written to the TUN, and the datagram it came in is not in the file: capture"
                    " without --inner"
                )
            return None, "written to the TUN: it has been judged as a datagram"
        if name.endswith("/in"):
            return Way.ENCAP, ""
        if outer is not None:
            return self._outer_side(outer, captured)
        header = ip.parse(memoryview(packet))
        if isinstance(header, ip.Ipv4Header) and self._fib.is_own(header.destination):
            if not self._fib.is_own(header.source):
                return None, "for this node: what came out of the tunnel has been judged before"
            if header.source == self._policy.tun_address:
                return None, "an ICMP error of tundp's own to this node"
        return Way.ENCAP, ""

    def _dropped_side(self, packet: bytearray, captured: CapturedPacket) -> tuple[Way | None, str]:
        """The direction of a packet on an interface `drop/REASON`, which holds inner packets."""
        if captured.packet_id in self._seen:
            return None, "dropped: it has been judged where it came in"
        header = ip.parse(memoryview(packet))
        is_read = isinstance(header, ip.Ipv4Header) and self._fib.is_own(header.source)
        if self._sides:
            # What was received comes before its drop, if the file has what was received.
            is_read = Way.DECAP in self._sides
        if is_read:
            return Way.ENCAP, ""
        return None, "dropped after it was received: its outer header is not in the file"

    def _outer_side(self, outer: _Outer | None, captured: CapturedPacket) -> tuple[Way | None, str]:
        if outer is None:
            return None, "no whole UDP datagram for the overlay's port"
        ours = {*self._fib.own_addresses, int(self.leases.public_ip or 0)} - {0}
        if outer.source in ours or captured.interface.endswith("/out"):
            if captured.packet_id is None:
                return None, "sent by this node: it is judged where it is read from the TUN"
            if captured.packet_id not in self._seen:
                return None, (
                    "sent by this node, and what was read from the TUN is not in the file: capture"
                    " without --outer"
                )
            return None, "sent by this node: its inner packet has been judged"
        if ours and outer.destination not in ours:
            return None, f"for {IPv4Address(outer.destination)}, which is not this node"
        return Way.DECAP, ""

    def _encapsulate(self, number: int, packet: bytearray, *, may_be_super: bool) -> Decision:
        notes: tuple[str, ...] = ()
        shown = _Shown.of(packet)
        if may_be_super and shown.length > self.mtu and shown.ip_proto in _CUT:
            # The kernel hands over nothing larger than the MTU but super-packets.
            packet, notes = _first_of(packet, self.mtu), ("super",)
        view = memoryview(packet)
        found = encap.encapsulate(
            view,
            lookup=self._fib.lookup,
            path_mtu=lambda _: self.mtu,
            tun_address=self._policy.tun_address,
        )
        hop, packets = "", 0
        if isinstance(found, encap.Forward):
            hop, packets = _endpoint(found.hop), len(found.packets)
        return Decision(
            number=number,
            direction="encap",
            hop=hop,
            packets=packets,
            notes=notes,
            **shown.members,
            **_verdict(found),
        )

    def _decapsulate(self, number: int, outer: _Outer) -> Decision:
        shown = _Shown.of(outer.payload)
        found = encap.decapsulate(
            memoryview(outer.payload),
            sender=(outer.source, outer.source_port),
            table=self._fib,
            policy=self._policy,
        )
        notes = []
        if isinstance(found, encap.Deliver):
            notes += [] if found.source_matches else ["source_mismatch"]
            notes += [] if found.destination_matches else ["destination_mismatch"]
        return Decision(
            number=number,
            direction="decap",
            hop=f"{IPv4Address(outer.source)}:{outer.source_port}",
            packets=1 if isinstance(found, encap.Deliver) else 0,
            notes=tuple(notes),
            **shown.members,
            **_verdict(found),
        )


def _verdict(
    found: encap.Forward[NextHop] | encap.Deliver | encap.Reply | encap.Drop,
) -> dict[str, Any]:
    if isinstance(found, encap.Forward):
        return {"verdict": "forward"}
    if isinstance(found, encap.Deliver):
        return {"verdict": "deliver"}
    if isinstance(found, encap.Reply):
        return {
            "verdict": "reply",
            "reason": found.reason.label,
            "answer": icmp.described(found.packet),
        }
    return {"verdict": "drop", "reason": found.reason.label}


def _endpoint(hop: NextHop) -> str:
    return f"{hop.sockaddr[0]}:{hop.sockaddr[1]}"


@dataclass(frozen=True, slots=True)
class _Shown:
    """What is shown of an inner packet, however broken it is."""

    source: str = ""
    destination: str = ""
    proto: str = ""
    length: int = 0
    ip_proto: int = 0

    @classmethod
    def of(cls, packet: bytes | bytearray) -> _Shown:
        if len(packet) < ip.MIN_HEADER_LEN or packet[0] >> 4 != 4:
            return cls()
        header = ip.read(memoryview(packet))
        return cls(
            str(IPv4Address(header.source)),
            str(IPv4Address(header.destination)),
            _PROTO_NAMES.get(header.ip_proto, str(header.ip_proto)),
            header.total_len,
            header.ip_proto,
        )

    @property
    def members(self) -> dict[str, Any]:
        """Those of a Decision."""
        return {
            "source": self.source,
            "destination": self.destination,
            "proto": self.proto,
            "length": self.length,
        }


@dataclass(frozen=True, slots=True)
class _Outer:
    """A whole UDP datagram for the overlay's port."""

    source: int
    source_port: int
    destination: int
    payload: bytearray

    @classmethod
    def read(cls, packet: bytearray, port: int) -> _Outer | None:
        header = ip.parse(memoryview(packet))
        if not isinstance(header, ip.Ipv4Header) or header.ip_proto != _UDP:
            return None
        start = header.header_len
        is_fragment = header.fragment_offset or header.flags_offset & ip.FLAG_MF
        if is_fragment or header.total_len < start + 8:
            return None
        source_port, destination_port = _PORTS.unpack_from(packet, start)
        if destination_port != port:
            return None
        payload = packet[start + 8 : header.total_len]
        return cls(header.source, source_port, header.destination, payload)


def inner_of_link(captured: CapturedPacket) -> tuple[bytearray | None, str]:
    """The IP packet without its link header, as long as it was; None, and why there is none.

    What a snapshot length has cut off is filled with zeros: no rule reads it.
    """
    data, start, kind = captured.data, 0, _ETHERTYPE_IPV4
    if captured.linktype == _ETHERNET:
        start, kind = _ethernet(data)
    elif captured.linktype == _SLL:
        start, kind = 16, int.from_bytes(data[14:16], "big")
    elif captured.linktype == _SLL2:
        start, kind = 20, int.from_bytes(data[0:2], "big")
    elif captured.linktype not in _BARE:
        return None, f"link type {captured.linktype} is not known"
    if kind != _ETHERTYPE_IPV4:
        return None, f"not IPv4 (EtherType {kind:#06x})"
    if start > len(data):
        return None, "cut within its link header"
    packet = bytearray(data[start:])
    packet += bytes(max(0, min(captured.original_len - start, 0xFFFF) - len(packet)))
    return packet, ""


def _ethernet(data: bytes) -> tuple[int, int]:
    """Where what an Ethernet frame carries begins, and its type; tags of VLANs are passed over."""
    at = 12
    while int.from_bytes(data[at : at + 2], "big") in _TAGS:
        at += 4
    return at + 2, int.from_bytes(data[at : at + 2], "big")


def _first_of(packet: bytearray, mtu: int) -> bytearray:
    """The first `mtu` bytes of a super-packet as a packet."""
    cut = packet[:mtu]
    cut[2:4] = mtu.to_bytes(2, "big")
    ip.store_checksum(cut, (cut[0] & 0x0F) * 4)
    return cut


def replay(packets: Iterable[CapturedPacket], rules: Rules) -> Iterator[Decision]:
    """A decision for each packet, in order, one at a time."""
    return map(rules.decide, packets)


def summed(decisions: Iterable[Decision]) -> dict[str, int]:
    """How many of each kind, the most frequent first."""
    return dict(Counter(map(kind_of, decisions)).most_common())


def kind_of(decision: Decision) -> str:
    """What it is counted as in a summary."""
    if decision.verdict == "skip":
        return "skip"
    words = (decision.direction, decision.verdict, decision.reason, *decision.notes)
    return " ".join(filter(None, words))


def differences(expected: Sequence[Decision], found: Sequence[Decision]) -> Iterator[str]:
    """In words, each packet that is judged otherwise than expected."""
    by_number = {each.number: each for each in found}
    for each in expected:
        other = by_number.pop(each.number, None)
        if other is None:
            yield f"packet {each.number}: not in the file, {described(each)} expected"
        elif other != each:
            yield f"packet {each.number}: {described(other)}; expected {described(each)}"
    for each in by_number.values():
        yield f"packet {each.number}: {described(each)}; nothing expected"


def described(decision: Decision) -> str:
    """A decision in one line."""
    words = [decision.direction, decision.verdict, decision.reason]
    if decision.source:
        words.append(
            f"{decision.source} > {decision.destination} {decision.proto} {decision.length}"
        )
    if decision.hop:
        words.append(f"{'to' if decision.direction == 'encap' else 'from'} {decision.hop}")
    if decision.packets > 1:
        words.append(f"in {decision.packets} fragments")
    if decision.notes:
        words.append(f"({', '.join(decision.notes)})")
    if decision.answer:
        words.append(f"ICMP {decision.answer}")
    return " ".join(filter(None, words))
