"""How much a node answers: never longer than the question, so often and no more, and to whom."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any, cast

import pytest

from tests.packets import ROUTER_ALERT, ipv4, udp
from tests.peer_packets import PROTO_TALK
from tests.routes import peers_of
from tundp.backend.udp.peer_answers import PEER_RATE_PER_S, Knowledge, PeerAnswers
from tundp.backend.udp.peer_table import PeerTable
from tundp.backend.udp.trace_sessions import BUFFER_RECORDS, TraceSessions
from tundp.engine.base import Dataplane
from tundp.engine.reach import Reach, Standing
from tundp.engine.taps import TapRequest
from tundp.lease.fib import build_fib
from tundp.wire import peer_bodies, peer_message
from tundp.wire.event import Record, Stage
from tundp.wire.peer_bodies import TraceStart
from tundp.wire.peer_message import Kind, Message

OWN = IPv4Network("10.5.1.0/24")
PEERS = peers_of((f"10.{number}.2.0/24", f"192.0.2.{number}") for number in range(6, 106))
ONE, OTHER = PEERS[0], PEERS[1]
KERNEL_MAX, OUTER_LEN = 576, 28


class StubTap:
    """A tap whose records are put into it."""

    def __init__(self, request: TapRequest) -> None:
        self.request = request
        self.records: list[bytes] = []
        self.is_open = True

    def put(self, count: int, packet: bytes) -> None:
        for number in range(count):
            record = Record(
                stage=Stage.UDP_RECEIVE, packet_id=number, length=len(packet), packet=packet[:64]
            )
            self.records.append(record.pack())

    def read(self) -> Sequence[tuple[int, bytes]]:
        data = b"".join(self.records)
        self.records.clear()
        return [(0, data)] if data else []

    def lost(self) -> Sequence[int]:
        return [0]

    def close(self) -> None:
        self.is_open = False


class StubEngine:
    """An engine that knows of no paths, and hands out taps."""

    name = "gso"

    def __init__(self) -> None:
        self.taps: list[StubTap] = []

    def path_states(self) -> dict[int, Any]:
        return {}

    def open_tap(self, request: TapRequest) -> StubTap:
        self.taps.append(StubTap(request))
        return self.taps[-1]


class Node:
    """What answers, and its engine."""

    def __init__(self) -> None:
        self.engine = StubEngine()
        engine = cast("Dataplane", self.engine)
        table = PeerTable(
            build_fib(PEERS, own_subnet=OWN, generation=1), {peer.subnet: peer for peer in PEERS}
        )
        self.sessions = TraceSessions(engine, OWN, table)
        self.answers = PeerAnswers(
            Knowledge(
                engine=engine,
                table=table,
                sessions=self.sessions,
                reaches=lambda hop_ids: {
                    hop_id: Reach(standing=Standing.ANSWERS, since=1.0, rtt_s=0.001)
                    for hop_id in hop_ids
                },
                measurings=dict,
                mtu=lambda: 1472,
                port=8285,
            )
        )

    def ask(
        self,
        kind: int,
        body: bytes = b"",
        *,
        length: int = 1200,
        source: IPv4Address | None = None,
        options: bytes = b"",
        version: int = 1,
    ) -> Message | None:
        """Ask by the bytes of a packet; the answer, after its length was compared."""
        message = Message(7, version, kind, False, body)
        payload = peer_message.build(message, source=0, destination=0)[20:]
        payload = payload.ljust(length - 20 - len(options), b"\0")
        packet = ipv4(
            payload,
            PROTO_TALK,
            source=str(source or ONE.subnet.network_address),
            destination="10.5.1.0",
            ip_options=options,
        )
        found = self.answers.answer(peer_message.read(packet), time.time_ns())
        if found is None:
            return None
        peer, answer = found
        assert peer.subnet.network_address == (source or ONE.subnet.network_address)
        whole = peer_message.build(answer, source=0, destination=1)
        error_len = min(20 + len(options) + 8 + len(packet), KERNEL_MAX)
        assert (len(whole) + OUTER_LEN) + (error_len + OUTER_LEN) <= len(packet) + OUTER_LEN
        assert (answer.nonce, answer.is_answer) == (7, True)
        return answer


async def test_no_answer_is_longer_than_its_question_allows() -> None:
    rng = random.Random(5)
    node = Node()
    answered = 0
    for _ in range(3000):
        node.answers.forget(ONE.hop_id)  # and with it what it has used of its rate
        kind = rng.choice((*Kind, rng.randrange(128)))
        start = peer_bodies.pack_trace_start(TraceStart(60, rng.choice(("", "icmp", "host", "("))))
        body = rng.choice((b"", bytes(4), bytes(12), start, rng.randbytes(rng.randrange(60))))
        length = rng.choice((36 + len(body), 600, 660, 700, 740, 1200, 1500))
        options = rng.choice((b"", ROUTER_ALERT * 10))
        length = max(length, 96 + len(body))
        version = rng.choice((1, 1, 1, 2))
        answered += (
            node.ask(kind, body, length=length, options=options, version=version) is not None
        )
    assert answered > 100


async def test_a_full_table_and_full_buffers_fit() -> None:
    node = Node()
    answer = node.ask(Kind.REACH, bytes(4))
    assert answer is not None
    table = peer_bodies.parse_reaches(answer.body)
    assert (table.total, table.start) == (100, 0)
    assert len(answer.body) > 1200 - KERNEL_MAX - 2 * OUTER_LEN - 36 - 12
    assert table.entries[0][2:] == (1, 1000, 0)
    rest = node.ask(Kind.REACH, (99).to_bytes(4, "big"))
    assert rest is not None
    assert len(peer_bodies.parse_reaches(rest.body).entries) == 1


async def test_records_come_in_parts_until_they_are_confirmed() -> None:
    node = Node()
    started = node.ask(Kind.TRACE_START, peer_bodies.pack_trace_start(TraceStart(60, "udp")))
    assert started is not None
    session = peer_bodies.parse_session(started.body)
    (tap,) = node.engine.taps
    assert tap.request.filter.text.startswith("udp and net 10.5.1.0/24 and ")
    mine = udp(bytes(100), source="10.6.2.9", destination="10.5.1.9")
    others = udp(bytes(100), source="10.7.2.9", destination="10.5.1.9")
    tap.put(3, others)  # as of a subnet inside another one's
    tap.put(20, mine)
    await asyncio.sleep(0.06)
    seen: list[int] = []
    while len(seen) < 20:
        after = seen[-1] if seen else 0
        answer = node.ask(Kind.TRACE_NEXT, peer_bodies.pack_trace_next(session, after))
        assert answer is not None
        again = node.ask(Kind.TRACE_NEXT, peer_bodies.pack_trace_next(session, after))
        assert again == answer
        found = peer_bodies.parse_records(answer.body)
        assert found.lost == 0
        assert found.records
        assert found.more == (len(seen) + len(found.records) < 20)
        seen += [record.sequence for record in found.records]
    assert seen == list(range(1, 21))
    # With less room a record has fewer bytes of its packet, and there still are some.
    tap.put(1, mine)
    await asyncio.sleep(0.06)
    answer = node.ask(Kind.TRACE_NEXT, peer_bodies.pack_trace_next(session, 20), length=736)
    assert answer is not None
    (record,) = peer_bodies.parse_records(answer.body).records
    assert 28 <= len(record.packet) < 64
    for number in (session ^ 1, 0):
        answer = node.ask(Kind.TRACE_NEXT, peer_bodies.pack_trace_next(number, 0))
        assert answer is not None
        assert answer.kind == Kind.REFUSED
    node.sessions.stop(ONE, session)
    assert not tap.is_open


async def test_what_has_no_room_is_counted_the_oldest_first() -> None:
    node = Node()
    started = node.ask(Kind.TRACE_START, peer_bodies.pack_trace_start(TraceStart(60, "")))
    assert started is not None
    session = peer_bodies.parse_session(started.body)
    mine = udp(bytes(100), source="10.6.2.9", destination="10.5.1.9")
    put = 0
    while put <= BUFFER_RECORDS:
        node.engine.taps[0].put(400, mine)
        put += 400
        await asyncio.sleep(0.12)
    answer = node.ask(Kind.TRACE_NEXT, peer_bodies.pack_trace_next(session, 0))
    assert answer is not None
    found = peer_bodies.parse_records(answer.body)
    assert found.lost >= 150 * (put // 400)
    assert found.more
    node.sessions.close()


async def test_each_peer_has_a_rate_of_its_own() -> None:
    node = Node()
    answered = sum(node.ask(Kind.HELLO) is not None for _ in range(1000))
    # As many as at once, and what a busy machine lets grow meanwhile.
    assert PEER_RATE_PER_S <= answered < 900
    assert node.answers.unanswered == 1000 - answered
    assert node.ask(Kind.HELLO, source=OTHER.subnet.network_address) is not None


async def test_nobody_else_is_answered_and_no_answer_is() -> None:
    node = Node()
    for source in ("10.6.2.1", "10.5.1.0", "192.0.2.6", "224.0.0.1", "10.200.0.0"):
        assert node.ask(Kind.HELLO, source=IPv4Address(source)) is None, source
    packet = peer_message.build(
        Message(7, 1, Kind.HELLO, True, b""),
        source=int(ONE.subnet.network_address),
        destination=int(OWN.network_address),
        packet_len=1200,
    )
    assert node.answers.answer(peer_message.read(packet), 0) is None


async def test_another_version_and_an_unknown_question_get_our_own_version() -> None:
    node = Node()
    for kind, version in ((Kind.HELLO, 2), (99, 1)):
        answer = node.ask(kind, version=version)
        assert answer is not None
        assert (answer.kind, answer.version) == (Kind.REFUSED, 1)
        assert peer_bodies.parse_refusal(answer.body).why == 1


async def test_traces_of_a_node_are_few_and_one_a_peer() -> None:
    node = Node()
    start = peer_bodies.pack_trace_start(TraceStart(60, ""))
    for peer in PEERS[:4]:
        answer = node.ask(Kind.TRACE_START, start, source=peer.subnet.network_address)
        assert answer is not None
        assert answer.kind == Kind.TRACE_START
    answer = node.ask(Kind.TRACE_START, start, source=PEERS[4].subnet.network_address)
    assert answer is not None
    assert peer_bodies.parse_refusal(answer.body).text.startswith("4 traces of other nodes")
    # One of a peer that has one takes its place.
    again = node.ask(Kind.TRACE_START, start)
    assert again is not None
    assert again.kind == Kind.TRACE_START
    assert [tap.is_open for tap in node.engine.taps] == [False, True, True, True, True]
    # Nobody ends another's.
    node.sessions.stop(OTHER, peer_bodies.parse_session(again.body))
    assert len(node.sessions) == 4
    node.answers.forget(ONE.hop_id)
    assert len(node.sessions) == 3
    node.sessions.close()
    assert not any(tap.is_open for tap in node.engine.taps)


@pytest.mark.parametrize(("seconds", "is_asked"), [(1, True), (60, False)])
async def test_a_trace_ends_by_itself(seconds: int, is_asked: bool) -> None:
    """After its time, though it is asked for; and when nobody asks for it."""
    node = Node()
    started = node.ask(Kind.TRACE_START, peer_bodies.pack_trace_start(TraceStart(seconds, "")))
    assert started is not None
    question = peer_bodies.pack_trace_next(peer_bodies.parse_session(started.body), 0)
    (tap,) = node.engine.taps
    async with asyncio.timeout(30):
        while tap.is_open:
            await asyncio.sleep(0.2)
            if is_asked:
                node.ask(Kind.TRACE_NEXT, question)
    assert len(node.sessions) == 0
