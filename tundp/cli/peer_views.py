"""The other nodes' halves of a trace: which nodes are asked, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

from tundp.admin import fetch_document, open_peer_trace
from tundp.errors import FilterError, PlatformError
from tundp.observe.events import BadQuery, PeerName
from tundp.observe.peer_trace import PeerState, PeerView, peer_of
from tundp.observe.stories import Story
from tundp.printable import SENTENCE_MAX, printable
from tundp.wire.facts import QUOTED, Field
from tundp.wire.filter import Filter, parse
from tundp.wire.filter_program import Op, OpKind

PEERS_MAX: Final = 4
"""Other nodes that are asked."""
NOT_OURS: Final = "not proto 253 and not quoted proto 253"
"""Messages between nodes: each record of another node would make more of them."""
_BEGIN_S: Final = 8.0
"""Hellos and the start of a trace, each sent twice at most."""
_ADDRESSES: Final = (Field.SOURCE, Field.DESTINATION)
_OF_ONE_NODE: Final = (
    *(Field.OUTER, Field.DIRECTION, Field.REASON),
    *(Field.LENGTH, Field.FRAGMENT),
)
"""What means something else, or something more, on another node: fragments and segments of a packet
that matches here need not match there."""
_FLAGS_OF_ONE: Final = 0x01 | 0x08 | 0x80
"""FIN, PSH and CWR: of a super-packet one segment has them."""
_PORTS: Final = (Field.SOURCE_PORT, Field.DESTINATION_PORT)
"""What only the first fragment has."""


@dataclass(frozen=True, slots=True)
class _Peer:
    address: IPv4Address
    subnet: IPv4Network


class PeerViews:
    """Traces on other nodes while this one traces. Close it."""

    def __init__(self, path: Path, packets: Filter) -> None:
        """path: of the daemon's admin socket, which asks them."""
        self._path = path
        self._packets = packets
        self._own: PeerName | None = None
        self._subnet: IPv4Network | None = None
        self._late_ns: dict[IPv4Address, int] = {}
        """By how much chaos of this node makes packets to a peer late, at most."""
        self._views: dict[IPv4Address, PeerView] = {}
        self._tasks: dict[IPv4Address, asyncio.Task[None]] = {}
        self._begun: dict[IPv4Address, asyncio.Event] = {}
        """Set once it is known whether a node is willing."""
        self._told: set[tuple[str, PeerState]] = set()

    async def open(self) -> None:
        """Ask the nodes that the filter names, or all if there are few, and wait for them."""
        document = await fetch_document(self._path)
        backend = document.get("backend") or {}
        if not document.get("public_ip"):
            return  # it is starting: whoever opens its events says so
        self._own = PeerName(IPv4Address(document["public_ip"]), backend.get("port") or 0)
        self._subnet = IPv4Network(document["subnet"]) if document.get("subnet") else None
        self._late_ns = _late_by_chaos(document)
        for peer in _named(self._packets, _peers_of(document)):
            self._begin(peer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BEGIN_S):
                for begun in list(self._begun.values()):
                    await begun.wait()

    def view_of(self, story: Story) -> PeerView | None:
        """The other node a story is about; asked from now on if it was not. None: nobody."""
        peer = peer_of(story)
        if peer is None or self._own is None:
            return None
        view = self._views.get(peer.address)
        if view is None:
            view = self._begin(_Peer(peer.address, peer.subnets[0]))
        return view

    def look(self, now_ns: int) -> None:
        """See PeerView.look."""
        for view in self._views.values():
            view.look(now_ns)

    def news(self) -> Iterable[str]:
        """What an operator must know of the other nodes; each once."""
        for view in self._views.values():
            if view.state is PeerState.WAITING or (view.node, view.state) in self._told:
                continue
            self._told.add((view.node, view.state))
            if view.state is PeerState.TRACING:
                version, engine = (
                    printable(str(view.hello.get(name))) for name in ("version", "engine")
                )
                yield (
                    f"on {view.node}, too: tundp {version}, engine {engine}, clock within"
                    f" \N{PLUS-MINUS SIGN}{view.error_ns / 1000:.0f}us; not its netfilter"
                )
            else:
                yield f"on {view.node}: {printable(view.text, 2 * SENTENCE_MAX)}"

    async def close(self) -> None:
        """End the traces on the other nodes."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _begin(self, peer: _Peer) -> PeerView:
        assert self._own is not None, "open() comes first"
        view = self._views[peer.address] = PeerView(
            str(peer.address),
            self._own,
            own_subnet=self._subnet,
            late_ns=self._late_ns.get(peer.address, 0),
        )
        if len(self._tasks) >= PEERS_MAX:
            view.end(f"not asked: at most {PEERS_MAX} nodes are; a filter with host chooses them")
        else:
            self._begun[peer.address] = begun = asyncio.Event()
            self._tasks[peer.address] = asyncio.ensure_future(
                self._follow(view, peer.subnet, begun)
            )
        return view

    async def _follow(self, view: PeerView, subnet: IPv4Network, begun: asyncio.Event) -> None:
        try:
            async with open_peer_trace(self._path, subnet, self._filter_there()) as parts:
                async for part in parts:
                    view.take(part, time.time_ns())
                    begun.set()
        except (BadQuery, PlatformError) as error:
            view.end(str(error))
        except (KeyError, ValueError, TypeError) as error:
            view.end(f"what the daemon says of it cannot be read: {error!r}")
        finally:
            view.end("it was told of no more")
            begun.set()

    def _filter_there(self) -> str:
        """The filter for the other nodes: all packets where it speaks of what this one knows."""
        tests = _tests(self._packets)
        text = self._packets.text
        if any(_is_of_one_node(op) for op in tests):
            return ""
        if any(op.field in _PORTS for op in tests):
            with contextlib.suppress(FilterError):
                return parse(f"({text}) or fragment").text
        return text


def without_own_messages(packets: Filter) -> Filter:
    """A filter that leaves the messages between nodes out; the same if it would be too long."""
    try:
        return parse(f"({packets.text}) and {NOT_OURS}" if packets.text else NOT_OURS)
    except FilterError:
        return packets


def _is_of_one_node(op: Op) -> bool:
    has_flag = op.field is Field.TCP_FLAGS and op.mask & _FLAGS_OF_ONE
    return bool(has_flag) or op.field in _OF_ONE_NODE


def _tests(packets: Filter) -> list[Op]:
    return [op for op in packets.ops if op.kind is OpKind.TEST]


def _peers_of(document: Mapping[str, Any]) -> list[_Peer]:
    found: dict[IPv4Address, _Peer] = {}
    for each in document.get("peers", ()):
        address = IPv4Address(each["public_ip"])
        found.setdefault(address, _Peer(address, IPv4Network(each["subnet"])))
    return list(found.values())


def _late_by_chaos(document: Mapping[str, Any]) -> dict[IPv4Address, int]:
    """Nanoseconds by peer, of a status document; of chaos that lasts."""
    found: dict[IPv4Address, int] = {}
    for each in document.get("chaos", ()):
        if each.get("ended_at") is None:
            address = IPv4Address(each["public_ip"])
            late_ns = round(float(each.get("slowest_s") or 0) * 1e9)
            found[address] = max(late_ns, found.get(address, 0))
    return found


def _named(packets: Filter, peers: list[_Peer]) -> list[_Peer]:
    """Those whose addresses the filter names; all if it names none and they are few."""
    named = [peer for peer in peers if any(_names(op, peer) for op in _tests(packets))]
    if not named and len(peers) <= PEERS_MAX:
        return peers
    return named


def _names(op: Op, peer: _Peer) -> bool:
    if op.field is Field.OUTER:
        return op.low <= int(peer.address) & op.mask <= op.high
    if op.field not in (*_ADDRESSES, *(field + QUOTED for field in _ADDRESSES)):
        return False
    subnet = peer.subnet
    mask = op.mask & int(subnet.netmask)
    return op.low & mask == int(subnet.network_address) & mask
