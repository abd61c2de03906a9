"""Peer tools: this node asks other nodes, and answers their questions, over the overlay itself.

    engine -> linux/hand_over.py -> PeerTools -> PeerAnswers (their questions) -> a datagram
                                              -> PeerAsks (their answers)      -> who waits

Messages are inner packets between TUN addresses (wire/peer_message.py). They leave by sockets of
their own, from the backend's port, as the echo requests that measure paths do, and are received
as any packet is. Off (--peer-tools=off): nothing is received, answered or asked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from ipaddress import IPv4Network
from typing import Final, TypeVar

from tundp.backend.base import PathMeasuring
from tundp.backend.peers import Asked, Outcome, TraceEnded, TracePart
from tundp.backend.udp.echoes import ProberSettings
from tundp.backend.udp.peer_answers import Knowledge, PeerAnswers
from tundp.backend.udp.peer_asks import PeerAsks
from tundp.backend.udp.peer_table import PeerTable
from tundp.backend.udp.peer_traces import PeerTrace
from tundp.backend.udp.trace_sessions import TraceSessions
from tundp.backoff import Ration
from tundp.engine.base import Dataplane
from tundp.engine.reach import Reach
from tundp.errors import PlatformError, TooBusy
from tundp.lease.fib import Fib
from tundp.lease.model import Peer
from tundp.lease.routing import RoutingDelta
from tundp.linux.hand_over import HandOver
from tundp.linux.udp import open_sender, source_control
from tundp.wire import peer_bodies, peer_message
from tundp.wire.peer_bodies import Hello, Reaches
from tundp.wire.peer_message import Kind, Malformed, Message

_log = logging.getLogger(__name__)

OFF: Final = "peer tools are off on this node (--peer-tools=off): it neither asks nor answers"
TRACES_MAX: Final = 16
"""Traces on other nodes at once, that this node asks for; one of each."""
_MTU_LEAST: Final = 736
"""Bytes of the smallest TUN MTU with which an answer can hold one record."""
_SEND_BUFFER_LEN: Final = 96 << 10

T = TypeVar("T")


class UdpPeerTools:
    """See the module, and backend.peers.PeerTools. A FIB sink. Lives on the event loop's thread."""

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._pair: HandOver | None = None
        self._error = "" if is_on else OFF
        """Why nothing is asked or answered; empty if it is."""
        self._settings: ProberSettings | None = None
        self._table: PeerTable | None = None
        self._sessions: TraceSessions | None = None
        self._answers: PeerAnswers | None = None
        self._asks = PeerAsks(self._send)
        self._traced: set[int] = set()
        """Hop ids of the nodes on which this one traces."""
        self._bug_lines = Ration(1)
        self.sent = 0
        """Messages sent so far: no engine counts them."""
        if is_on:
            try:
                self._pair = HandOver("messages of other nodes", peer_message.PACKET_MAX)
            except PlatformError as error:
                self._error = str(error)

    @property
    def peer_fd(self) -> int:
        """EngineContext.peer_fd."""
        return -1 if self._pair is None else self._pair.engine_fd

    def start(
        self,
        engine: Dataplane,
        settings: ProberSettings,
        *,
        fib: Fib,
        peers: Mapping[IPv4Network, Peer],
        own_subnet: IPv4Network,
        reaches: Callable[[Collection[int]], Mapping[int, Reach]],
        measurings: Callable[[], Mapping[int, PathMeasuring]],
    ) -> None:
        """Ask and answer from now on. reaches, measurings: what is known of the peers."""
        self._settings = settings
        self._table = table = PeerTable(fib, peers)
        if self._pair is None:
            return
        self._sessions = TraceSessions(engine, own_subnet, table)
        self._answers = PeerAnswers(
            Knowledge(
                engine=engine,
                table=table,
                sessions=self._sessions,
                reaches=reaches,
                measurings=measurings,
                mtu=lambda: self._of().full,
                port=settings.port,
            )
        )
        self._pair.follow(self._take)

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        """See FibSink."""
        assert self._table is not None
        self._table.install(fib, delta)
        if self._answers is not None:
            for hop_id in delta.hops_assigned:
                self._answers.forget(hop_id)
            for peer in (*delta.gone, *(old for old, _ in delta.moved)):
                self._answers.forget(peer.hop_id)

    def seen(self) -> int:
        """See FibSink."""
        assert self._table is not None
        return self._table.generation

    def reset(self, settings: ProberSettings) -> None:
        """The underlay's address or the MTU is another."""
        self._settings = settings

    def stop(self) -> None:
        """End all, while the engine is there yet. Harmless when repeated."""
        if self._sessions is not None:
            self._sessions.close()
        if self._pair is not None and self._answers is not None:
            self._pair.unfollow()
            self._answers = None

    def close(self) -> None:
        """Close what messages come by: the engine is stopped. Harmless when repeated."""
        if self._pair is not None:
            self._pair.close()

    def find(self, subnet: IPv4Network) -> Peer | None:
        """See PeerTools."""
        return None if self._table is None else self._table.covering(subnet)

    async def hello(self, peer: Peer) -> Asked[Hello]:
        """See PeerTools."""
        return await self._ask(peer, Kind.HELLO, b"", peer_bodies.parse_hello)

    async def reach(self, peer: Peer, start: int) -> Asked[Reaches]:
        """See PeerTools."""
        body = peer_bodies.pack_reach(start)
        return await self._ask(peer, Kind.REACH, body, peer_bodies.parse_reaches)

    async def trace(
        self, peer: Peer, packets: str, seconds: float | None
    ) -> AsyncGenerator[TracePart, None]:
        """See PeerTools. One on each node, TRACES_MAX together."""
        if self._error:
            yield TraceEnded(self._why_not(), self._error)
            return
        if self._of().full < _MTU_LEAST:
            words = f"the MTU of {self._of().full} bytes leaves no room for records: {_MTU_LEAST}"
            yield TraceEnded(Outcome.NOT_SENT, words)
            return
        if peer.hop_id in self._traced:
            raise TooBusy(f"this node traces on {peer.endpoint.address} already: one at a time")
        if len(self._traced) >= TRACES_MAX:
            raise TooBusy(f"this node traces on {TRACES_MAX} other nodes already")
        self._traced.add(peer.hop_id)
        parts = PeerTrace(self._asks, peer, packets).parts(seconds)
        try:
            async for part in parts:
                yield part
        finally:
            self._traced.discard(peer.hop_id)
            await parts.aclose()

    async def _ask(
        self, peer: Peer, kind: Kind, body: bytes, parse: Callable[[bytes], T]
    ) -> Asked[T]:
        if self._error:
            return Asked(outcome=self._why_not(), detail=self._error)
        return await self._asks.ask(peer, kind, body, parse)

    def _why_not(self) -> Outcome:
        return Outcome.NOT_SENT if self._is_on else Outcome.OFF

    def _take(self, packet: bytes) -> None:
        """A packet an engine handed over. A bug costs it, not the daemon."""
        now_ns = time.time_ns()
        try:
            self._arrived(packet, now_ns)
        except Exception:  # noqa: BLE001  (see above)
            if self._bug_lines.take(time.monotonic()):
                _log.exception(
                    "message of another node, %d bytes: not answered%s",
                    len(packet),
                    self._bug_lines.withheld_words(),
                )

    def _arrived(self, packet: bytes, now_ns: int) -> None:
        try:
            arrived = peer_message.read(packet)
        except Malformed:
            return  # counted by the engine, as any packet
        if arrived.destination != int(self._of().tun_address) or self._answers is None:
            return
        if arrived.message is None or arrived.message.is_answer:
            self._asks.arrived(arrived, now_ns)
            return
        if (answer := self._answers.answer(arrived, now_ns)) is not None:
            self._put(*answer, packet_len=0)

    def _send(self, peer: Peer, question: Message) -> str:
        """See PeerAsks: a question, padded so that its answer may be as long as it needs."""
        length = min(peer_message.QUESTION_LEN, self._of().full)
        if peer_message.HEAD_LEN + len(question.body) > length:
            return f"the question is longer than the MTU of {length} bytes"
        return self._put(peer, question, packet_len=length)

    def _put(self, peer: Peer, message: Message, *, packet_len: int) -> str:
        """Send a message to a peer's endpoint; why it could not be sent, empty if it was."""
        settings = self._of()
        packet = peer_message.build(
            message,
            source=int(settings.tun_address),
            destination=int(peer.subnet.network_address),
            packet_len=packet_len,
        )
        address, port = str(peer.endpoint.address), peer.endpoint.port
        try:
            with open_sender(settings.port, _SEND_BUFFER_LEN) as sender:
                sender.sendmsg([packet], source_control(settings.source), 0, (address, port))
        except OSError as error:
            return f"it cannot be sent to {address}:{port}: {error.strerror or error}"
        self.sent += 1
        return ""

    def _of(self) -> ProberSettings:
        assert self._settings is not None, "start() comes first"
        return self._settings
