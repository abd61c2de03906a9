"""Asks other nodes for the admin socket, and makes JSON objects of what they say."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from errno import errorcode
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

from tundp.backend.peers import (
    Asked,
    Clock,
    PeerTools,
    TraceBegun,
    TraceEnded,
    TraceLost,
    TracePart,
    clock_of,
)
from tundp.engine.reach import Standing
from tundp.errors import UnknownPeer, Unsupported
from tundp.lease.model import Peer
from tundp.observe.trace import STAGE_NAMES
from tundp.wire.event import Stage
from tundp.wire.peer_bodies import Hello, PeerRecord, ReachEntry, Reaches

if TYPE_CHECKING:
    from tundp.daemon.node import Node

_STATES = tuple(Standing)
_NS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePeerDesk:
    """See tundp.admin_peers.PeerDesk."""

    node: Callable[[], Node | None]
    """The node, once it has its lease."""

    async def ask(self, subnet: IPv4Network, what: str, start: int) -> Mapping[str, Any]:
        """See PeerDesk."""
        tools, peer = self._find(subnet)
        if what == "hello":
            hello = await tools.hello(peer)
            clock = clock_of(hello)
            return _asked(
                peer, hello, None if hello.answer is None else _hello(hello.answer, clock)
            )
        reach = await tools.reach(peer, start)
        return _asked(peer, reach, None if reach.answer is None else _reaches(reach.answer))

    async def trace(
        self, subnet: IPv4Network, packets: str, seconds: float | None
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        """See PeerDesk."""
        tools, peer = self._find(subnet)
        parts = tools.trace(peer, packets, seconds)
        async with aclosing(parts):
            async for part in parts:
                yield _part(peer, part)

    def _find(self, subnet: IPv4Network) -> tuple[PeerTools, Peer]:
        """Who asks, and whom. Unsupported, UnknownPeer."""
        if (node := self.node()) is None:
            raise Unsupported("the daemon is starting: it has no lease, and knows no peers yet")
        if (tools := node.backend.peer_tools) is None:
            raise Unsupported(
                f"the backend {node.backend.name} leaves packets to the kernel: nodes talk over"
                " the overlay of the udp backend only"
            )
        own = node.acquired.lease.key.subnet
        if subnet.subnet_of(own):
            raise UnknownPeer(f"{subnet} is this node's own subnet: another node's can be asked")
        if (peer := tools.find(subnet)) is None:
            raise UnknownPeer(f"no lease covers {subnet}: tundp leases shows those there are")
        return tools, peer


def _asked(peer: Peer, asked: Asked[Any], answer: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {
        "subnet": str(peer.subnet),
        "address": str(peer.endpoint.address),
        "port": peer.endpoint.port,
        "result": asked.outcome.value,
        "detail": asked.detail,
        "rtt_s": asked.rtt_s,
        "answer": answer,
    }


def _hello(hello: Hello, clock: Clock | None) -> Mapping[str, Any]:
    return {
        "implementation": hello.implementation,
        "version": hello.version,
        "engine": hello.engine,
        "mtu": hello.mtu,
        "port": hello.port,
        "uptime_s": hello.uptime_s,
        "clock_offset_s": None if clock is None else clock.offset_ns / _NS,
        "clock_error_s": None if clock is None else clock.error_ns / _NS,
    }


def _reaches(reaches: Reaches) -> Mapping[str, Any]:
    return {
        "total": reaches.total,
        "start": reaches.start,
        "peers": [_entry(each) for each in reaches.entries],
    }


def _entry(entry: ReachEntry) -> Mapping[str, Any]:
    network = IPv4Network((entry.network, entry.prefix_len), strict=False)
    if entry.state == 0:
        state = None
    elif entry.state <= len(_STATES):
        state = _STATES[entry.state - 1].value
    else:
        state = f"state-{entry.state}"
    return {
        "subnet": str(network),
        "state": state,
        "rtt_s": entry.rtt_us / 1e6 if entry.rtt_us else None,
        "path_mtu": entry.path_mtu or None,
    }


def _part(peer: Peer, part: TracePart) -> Mapping[str, Any]:
    match part:
        case TraceBegun(hello, clock):
            node = {
                "node": str(peer.endpoint.address),
                "subnet": str(peer.subnet),
                "implementation": hello.implementation,
                "version": hello.version,
                "engine": hello.engine,
                "offset_s": clock.offset_ns / _NS,
                "error_s": clock.error_ns / _NS,
            }
            return {"hello": node}
        case TraceLost(count, is_all):
            return {"lost": count, "is_all": is_all}
        case TraceEnded(outcome, text):
            return {"error": text, "result": outcome.value}
        case PeerRecord():
            return {"record": _record(part)}


def _record(record: PeerRecord) -> Mapping[str, Any]:
    return {
        "sequence": record.sequence,
        "unix_ns": record.time_ns,
        "stage": STAGE_NAMES[Stage(record.stage)],
        "verdict": "drop" if record.is_dropped else "pass",
        "reason": record.reason or None,
        "error": errorcode.get(record.error, str(record.error)) if record.error else None,
        "length": record.length,
        "packets": record.packets,
        "together": record.together,
        "gso_size": record.gso_size,
        "packet_id": record.packet_id,
        "last_packet_id": record.packet_id + record.more_ids,
        "worker": record.worker,
        "packet": record.packet.hex(),
    }
