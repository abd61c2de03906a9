"""Answers the questions of other nodes: who, and how much.

A question counts if it came from a peer's TUN address, by the peer's endpoint (the engine has
checked that), to ours. The answer goes to the endpoint in our lease table. It is never longer than
the question, less what our kernel may add: wire/peer_message.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

import tundp
from tundp.backend.base import PathMeasuring
from tundp.backend.udp.peer_table import PeerTable
from tundp.backend.udp.trace_sessions import TraceSessions
from tundp.choices import Measuring
from tundp.engine.base import Dataplane
from tundp.engine.reach import Reach, Standing
from tundp.lease.model import Peer
from tundp.wire import peer_bodies, peer_message
from tundp.wire.peer_bodies import Hello, ReachEntry, Reaches, Refusal, Refused
from tundp.wire.peer_message import Arrived, Kind, Malformed, Message
from tundp.wire.ratelimit import TokenBucket

PEER_RATE_PER_S: Final = 50
"""Answers to one peer; as many at once."""
RATE_PER_S: Final = 500
"""Answers to all peers together; as many at once."""
STATES: Final = tuple(Standing)
"""By the number of a REACH entry, from 1 on."""
_PATHS_AGE_S: Final = 1.0
"""So long the table of path MTUs is used again: making it takes a pass over all hops."""
_WORD: Final = 0xFFFFFFFF
_HALF: Final = 0xFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What this node knows that others may ask for."""

    engine: Dataplane
    table: PeerTable
    sessions: TraceSessions
    reaches: Callable[[Collection[int]], Mapping[int, Reach]]
    measurings: Callable[[], Mapping[int, PathMeasuring]]
    mtu: Callable[[], int]
    port: int


class PeerAnswers:
    """See the module. Reads clocks; sends nothing."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._knows = knowledge
        self._started_at = time.monotonic()
        self._budget = TokenBucket(rate_per_s=RATE_PER_S, burst=RATE_PER_S)
        self._budgets: dict[int, TokenBucket] = {}
        """By hop id."""
        self._paths: Mapping[int, int] = {}
        self._paths_at = -_PATHS_AGE_S
        self.unanswered = 0
        """Questions of peers that were over the rate, or left no room for an answer."""

    def answer(self, arrived: Arrived, received_ns: int) -> tuple[Peer, Message] | None:
        """Whom to send which answer; None: nobody, nothing.

        received_ns: Unix time the question was read.
        """
        question = arrived.message
        if question is None or question.is_answer:
            return None
        peer = self._knows.table.of_tun_address(arrived.source)
        if peer is None:
            return None
        room = peer_message.answer_max(arrived.length, arrived.header_len) - peer_message.HEAD_LEN
        if room <= 0 or not self._may_answer(peer.hop_id):
            self.unanswered += 1
            return None
        if question.version != peer_message.VERSION:
            speaks = f"this node speaks version {peer_message.VERSION}"
            return self._refuse(peer, question, Refusal(Refused.UNSUPPORTED, speaks), room)
        try:
            body = self._body(peer, question, room, received_ns)
        except Malformed as error:
            body = Refusal(Refused.BAD_QUESTION, str(error))
        if body is None:
            return None
        if isinstance(body, Refusal):
            return self._refuse(peer, question, body, room)
        if len(body) > room:
            self.unanswered += 1
            return None
        return peer, Message(question.nonce, peer_message.VERSION, question.kind, True, body)

    def forget(self, hop_id: int) -> None:
        """The hop is gone, or stands for another node."""
        self._budgets.pop(hop_id, None)
        self._knows.sessions.forget(hop_id)

    def _may_answer(self, hop_id: int) -> bool:
        """Whether the rates leave room: first the peer's own, so that it takes no other's."""
        now_ns = time.monotonic_ns()
        budget = self._budgets.get(hop_id)
        if budget is None:
            budget = TokenBucket(rate_per_s=PEER_RATE_PER_S, burst=PEER_RATE_PER_S)
            self._budgets[hop_id] = budget
        return budget.take(now_ns) and self._budget.take(now_ns)

    def _refuse(
        self, peer: Peer, question: Message, refusal: Refusal, room: int
    ) -> tuple[Peer, Message] | None:
        body = peer_bodies.pack_refusal(refusal, room)
        if len(body) > room:
            self.unanswered += 1
            return None
        return peer, Message(question.nonce, peer_message.VERSION, Kind.REFUSED, True, body)

    def _body(
        self, peer: Peer, question: Message, room: int, received_ns: int
    ) -> bytes | Refusal | None:
        """The answer's body; None: the question has none. Malformed."""
        sessions = self._knows.sessions
        match question.kind:
            case Kind.HELLO:
                return self._hello(received_ns)
            case Kind.REACH:
                return self._reach(peer_bodies.parse_reach(question.body), room)
            case Kind.TRACE_START:
                started = sessions.start(peer, peer_bodies.parse_trace_start(question.body))
                return started if isinstance(started, Refusal) else _session(started)
            case Kind.TRACE_NEXT:
                number, after = peer_bodies.parse_trace_next(question.body)
                return sessions.next(peer, number, after, room)
            case Kind.TRACE_STOP:
                sessions.stop(peer, peer_bodies.parse_session(question.body))
                return None
        return Refusal(Refused.UNSUPPORTED, f"this node knows no question {question.kind}")

    def _hello(self, received_ns: int) -> bytes:
        knows = self._knows
        return peer_bodies.pack_hello(
            Hello(
                received_ns=received_ns,
                sent_ns=time.time_ns(),
                uptime_s=min(_WORD, int(time.monotonic() - self._started_at)),
                mtu=min(_HALF, knows.mtu()),
                port=knows.port,
                implementation=peer_bodies.IMPLEMENTATION,
                version=tundp.__version__,
                engine=knows.engine.name,
            )
        )

    def _reach(self, start: int, room: int) -> bytes:
        table = self._knows.table
        chosen = table.page(start, peer_bodies.reach_room(room))
        reaches = self._knows.reaches([peer.hop_id for peer in chosen])
        paths = self._path_mtus()
        entries = []
        for peer in chosen:
            reach = reaches.get(peer.hop_id)
            rtt_s = None if reach is None else reach.rtt_s
            entries.append(
                ReachEntry(
                    int(peer.subnet.network_address),
                    peer.subnet.prefixlen,
                    0 if reach is None else 1 + STATES.index(reach.standing),
                    0 if rtt_s is None else max(1, min(_WORD, round(rtt_s * 1e6))),
                    paths.get(peer.hop_id, 0),
                )
            )
        return peer_bodies.pack_reaches(Reaches(len(table), start, tuple(entries)))

    def _path_mtus(self) -> Mapping[int, int]:
        """Bytes of the largest inner packet, by hop id, of paths of which something is known."""
        now = time.monotonic()
        if now - self._paths_at >= _PATHS_AGE_S:
            self._paths_at = now
            full = self._knows.mtu()
            found = {
                hop_id: full
                for hop_id, each in self._knows.measurings().items()
                if each.state is Measuring.MEASURED
            }
            for hop_id, state in self._knows.engine.path_states().items():
                if state.inner_mtu is not None:
                    found[hop_id] = min(full, state.inner_mtu)
            self._paths = found
        return self._paths


def _session(number: int) -> bytes:
    return peer_bodies.pack_session(number)
