"""Flows out of event records: how many packets went between which inner addresses and ports.

Records of two stages are added up, what was read from the TUN and what was received: each packet
has one of them, whatever becomes of it. A super-packet counts as the packets it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.observe.top import FlowRate, Flows
from tundp.wire.event import Stage, scan

STAGES: Final = "read,receive"
"""What `stages` of the query must be."""
SNAP: Final = 64
"""Bytes of a packet that are needed: the longest IPv4 header and two ports."""
FLOWS_MAX: Final = 20_000
"""Flows of a direction told apart in one round; packets of further ones are counted together."""
IDLE_ROUNDS: Final = 5
"""Rounds without packets after which a flow is no longer listed."""

_TUN_READ: Final = int(Stage.TUN_READ)
_UDP_RECEIVE: Final = int(Stage.UDP_RECEIVE)
_NOT_IPV4: Final = b""
_NAMES: Final = {1: "ICMP", 2: "IGMP", 6: "TCP", 17: "UDP", 47: "GRE", 50: "ESP", 132: "SCTP"}
_WITH_PORTS: Final = frozenset({6, 17, 132})
_TCP: Final = 6
_TCP_OFFSET: Final = 12
_UDP_LEN: Final = 8
_OFFSET_MASK: Final = 0x1FFF

Key = bytes
"""Protocol, address and port of this side, address and port of the other: 1 + 4 + 4 + 2 + 2."""
PeerOf = Callable[[IPv4Address], str]
"""Underlay address of the node that has an inner address; empty if none has it."""


@dataclass(slots=True)
class _Count:
    packets: int = 0
    length: int = 0


class FlowTable:
    """What was seen of flows since it was last taken."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[Key, _Count]] = {_TUN_READ: {}, _UDP_RECEIVE: {}}
        self._peers: dict[Key, int] = {}
        self._idle: dict[Key, int] = {}
        self.records = 0
        """Event records that were counted."""
        self._unlisted = 0

    def add(self, data: bytes) -> None:
        """Count event records. ValueError for what is none."""
        for stage, is_dropped, outer, length, packets, start, end in scan(data):
            seen = self._seen.get(stage)
            if is_dropped or seen is None:
                continue
            self.records += 1
            key, header_len = _key(data[start:end], is_out=stage == _TUN_READ)
            count = seen.get(key)
            if count is None:
                if len(seen) >= FLOWS_MAX:
                    self._unlisted += packets
                    continue
                count = seen[key] = _Count()
                if outer:
                    self._peers[key] = outer
            count.packets += packets
            # A super-packet has one header; each of its packets gets one of its own.
            count.length += length + header_len * (packets - 1) if stage == _TUN_READ else length

    def take(
        self, *, seconds: float, lost: int, peer_of: PeerOf, text: str = "", error: str = ""
    ) -> Flows:
        """The flows since the last call, and forget them. lost: records lost meanwhile."""
        out, into = self._seen[_TUN_READ], self._seen[_UDP_RECEIVE]
        seen = out.keys() | into.keys()
        self._idle = {
            key: rounds + 1
            for key, rounds in self._idle.items()
            if key not in seen and rounds + 1 < IDLE_ROUNDS
        }
        scale = (self.records + lost) / self.records if self.records else 1.0
        nothing = _Count()
        rows = [
            _rate(
                key,
                out.get(key, nothing),
                into.get(key, nothing),
                factor=scale / seconds if seconds > 0 else 0.0,
                peer=self._peer(key, peer_of),
            )
            for key in (*seen, *self._idle)
        ]
        found = Flows(
            filter=text,
            records=self.records,
            lost=lost,
            unlisted=self._unlisted,
            error=error,
            seconds=round(seconds, 3),
            total=len(seen),
            rows=rows,
        )
        self._idle |= dict.fromkeys(seen if len(seen) < FLOWS_MAX else (), 0)
        self._peers = {key: outer for key, outer in self._peers.items() if key in self._idle}
        self._seen = {_TUN_READ: {}, _UDP_RECEIVE: {}}
        self.records = self._unlisted = 0
        return found

    def clear(self) -> None:
        """Forget all flows, as for another filter."""
        self.take(seconds=0.0, lost=0, peer_of=lambda _: "")
        self._idle.clear()
        self._peers.clear()

    def _peer(self, key: Key, peer_of: PeerOf) -> str:
        outer = self._peers.get(key)
        if outer:
            return str(IPv4Address(outer))
        return peer_of(IPv4Address(key[7:11])) if key else ""


def _key(packet: bytes, *, is_out: bool) -> tuple[Key, int]:
    """The flow of a packet, and the length of its headers. Of a cut or broken one what is there."""
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return _NOT_IPV4, 0
    protocol, at = packet[9], (packet[0] & 0x0F) * 4
    ports, header_len = b"\0\0\0\0", at
    is_later_fragment = (packet[6] << 8 | packet[7]) & _OFFSET_MASK
    if protocol in _WITH_PORTS and at >= 20 and not is_later_fragment and len(packet) >= at + 4:
        ports = packet[at : at + 4]
        if protocol != _TCP:
            header_len += _UDP_LEN
        elif len(packet) > at + _TCP_OFFSET:
            header_len += (packet[at + _TCP_OFFSET] >> 4) * 4
    source, destination = packet[12:16] + ports[:2], packet[16:20] + ports[2:]
    sides = source + destination if is_out else destination + source
    return bytes((protocol,)) + sides, header_len


def _rate(key: Key, out: _Count, into: _Count, *, factor: float, peer: str) -> FlowRate:
    counts: dict[str, float] = {
        "packets_out_s": round(out.packets * factor, 3),
        "packets_in_s": round(into.packets * factor, 3),
        "bits_out_s": round(8 * out.length * factor, 3),
        "bits_in_s": round(8 * into.length * factor, 3),
    }
    has_ports = key != _NOT_IPV4 and any(key[5:7] + key[11:13])
    return FlowRate(
        protocol=_NAMES.get(key[0], str(key[0])) if key else "not IPv4",
        local=str(IPv4Address(key[1:5])) if key else "",
        local_port=int.from_bytes(key[5:7], "big") if has_ports else None,
        remote=str(IPv4Address(key[7:11])) if key else "",
        remote_port=int.from_bytes(key[11:13], "big") if has_ports else None,
        peer=peer,
        packets_out=out.packets,
        packets_in=into.packets,
        bytes_out=out.length,
        bytes_in=into.length,
        **counts,
    )


def peer_finder(peers: Iterable[Mapping[str, object]]) -> PeerOf:
    """Who has an inner address, of the peers of a status document."""
    by_length: dict[int, dict[int, str]] = {}
    for peer in peers:
        network, _, length = str(peer["subnet"]).partition("/")
        subnets = by_length.setdefault(int(length or 32), {})
        subnets[int(IPv4Address(network))] = str(peer["public_ip"])
    masks = [
        (int(IPv4Network((0, length)).netmask), subnets)
        for length, subnets in sorted(by_length.items(), reverse=True)
    ]

    def find(address: IPv4Address) -> str:
        number = int(address)
        return next(
            (subnets[number & mask] for mask, subnets in masks if number & mask in subnets), ""
        )

    return find
