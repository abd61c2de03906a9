"""Traces: which records belong together, and what people read of them."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from tests.packets import udp
from tundp.observe.events import Event, PeerName
from tundp.observe.stories import HOLD_NS, WAITING_MAX, Stories, Story, document
from tundp.observe.trace import OPEN_MAX, Trace, Tracer, lines
from tundp.wire.drop import DropReason
from tundp.wire.event import Record, Stage

PEER = PeerName(IPv4Address("192.0.2.2"), 8285, (IPv4Network("10.5.2.0/24"),))


def packet(port: int = 7000) -> bytes:
    return udp(b"x", source="10.5.1.2", destination="10.5.2.3", sport=port)


def event(
    stage: Stage,
    packet_id: int,
    time_ns: int,
    *,
    reason: DropReason | None = None,
    peer: PeerName | None = PEER,
    port: int = 7000,
    worker: int = 0,
    **values: Any,
) -> Event:
    data = packet(port)
    record = Record(
        stage=stage,
        packet_id=packet_id,
        is_dropped=reason is not None,
        reason=0 if reason is None else reason,
        hop=2 if peer else 0,
        length=values.pop("length", len(data)),
        packet=data,
        **values,
    )
    return Event(
        worker=worker,
        record=record,
        time_ns=time_ns,
        reason=None if reason is None else reason.label,
        peer=peer,
    )


def traces(events: Iterable[Event], *, rest: bool = False) -> list[Trace]:
    tracer = Tracer()
    found = [trace for each in events for trace in tracer.add(each)]
    return found + (list(tracer.stale(0)) if rest else [])


def test_a_read_and_its_send_are_one_trace() -> None:
    (trace,) = traces([event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)])
    assert trace.is_complete and not trace.is_dropped
    assert list(lines(trace, 3, "n1")) == [
        "#3 10.5.1.2:7000 > 10.5.2.3:443 UDP, 29 B",
        "  n1      +0us  tun.read",
        "  n1            lookup       10.5.2.0/24 -> 192.0.2.2:8285, FIB 0",
        "  n1     +19us  udp.send     29 B to 192.0.2.2:8285",
    ]


@pytest.mark.parametrize(
    ("wait_ns", "shown"),
    [
        (0, ""),
        (1, ", socket wait 0us"),
        (31_400, ", socket wait 31us"),
        (52_300_000, ", socket wait 52.3ms"),
        (2**32 - 1, ", socket wait 4.3s or more"),
    ],
)
def test_a_receive_says_how_long_it_waited(wait_ns: int, shown: str) -> None:
    (trace,) = traces([event(Stage.UDP_RECEIVE, 1, 7, wait_ns=wait_ns)], rest=True)
    assert list(lines(trace, 1, "n1"))[1] == (
        "  n1      +0us  udp.receive  from 192.0.2.2:8285,"
        f" whose subnet the source is not in{shown}"
    )
    assert document(Story(trace), 1)["events"][0]["wait_ns"] == (wait_ns or None)


def test_a_super_packet_waits_for_all_its_packets() -> None:
    read = event(Stage.TUN_READ, 7, 0, peer=None, packets=3, gso_size=10, length=49)
    sends = [event(Stage.UDP_SEND, 7, 5000, together=3) for _ in range(2)]
    last = event(Stage.UDP_SEND, 7, 9000, reason=DropReason.SEND_FORBIDDEN, error=1)
    assert traces([read, *sends]) == []
    (trace,) = traces([read, *sends, last])
    assert trace.is_dropped
    assert list(lines(trace, 1, "n1"))[3:] == [
        "  n1      +5us  udp.send     29 B to 192.0.2.2:8285, 2 packets, 3 datagrams in one send",
        "  n1      +9us  udp.send     DROP send_forbidden (EPERM):"
        f" {DropReason.SEND_FORBIDDEN.means}",
        f"    next step: {DropReason.SEND_FORBIDDEN.next_step}",
    ]


def test_workers_and_directions_do_not_mix() -> None:
    found = traces(
        [
            event(Stage.TUN_READ, 1, 0, peer=None),
            event(Stage.TUN_READ, 1, 1, peer=None, worker=1),
            event(Stage.UDP_RECEIVE, 1, 2),
            event(Stage.UDP_SEND, 1, 3, worker=1),
            event(Stage.UDP_SEND, 1, 4),
            event(Stage.TUN_WRITE, 1, 5),
        ]
    )
    assert [(trace.first.worker, trace.first.stage, trace.rest[0].time_ns) for trace in found] == [
        (1, Stage.TUN_READ, 3),
        (0, Stage.TUN_READ, 4),
        (0, Stage.UDP_RECEIVE, 5),
    ]


def test_a_coalesced_write_ends_the_traces_of_its_flow() -> None:
    """Receives 1 to 4 of two flows; each flow is written once, of several receives."""
    received = [
        event(Stage.UDP_RECEIVE, number, number, port=7000 + number % 2) for number in range(1, 5)
    ]
    even = event(Stage.TUN_WRITE, 2, 10, port=7000, more_ids=2, packets=2)
    odd = event(Stage.TUN_WRITE, 1, 11, port=7001, more_ids=2, packets=2)
    found = traces([*received, even, odd])
    assert [trace.first.record.packet_id for trace in found] == [2, 4, 1, 3]
    assert {len(trace.rest) for trace in found} == {1}
    assert "written as one super-packet of 2" in list(lines(found[0], 1, "n1"))[-1]


def test_what_nobody_saw_read_is_shown_all_the_same() -> None:
    (trace,) = traces([event(Stage.UDP_SEND, 9, 5, reason=DropReason.NO_ROUTE, peer=None)])
    assert list(lines(trace, 1, "n1")) == [
        "#1 10.5.1.2:7000 > 10.5.2.3:443 UDP, 29 B",
        f"  n1      +0us  udp.send     DROP no_route: {DropReason.NO_ROUTE.means}",
        f"    next step: {DropReason.NO_ROUTE.next_step}",
    ]
    (written,) = traces([event(Stage.TUN_WRITE, 9, 5)])
    assert written.is_complete


def test_what_never_ends_is_shown_after_a_while() -> None:
    tracer = Tracer()
    assert list(tracer.add(event(Stage.TUN_READ, 1, 0, peer=None))) == []
    assert list(tracer.add(event(Stage.UDP_RECEIVE, 1, 0))) == []
    assert list(tracer.stale(100, now_ns=99)) == []
    found = list(tracer.stale(100, now_ns=100))
    assert [trace.left for trace in found] == [1, 1]
    assert list(tracer.stale(0)) == []
    assert list(lines(found[0], 1, "n1"))[-1] == (
        "    1 of its packets: nothing more was seen of them"
    )


def test_memory_is_bounded() -> None:
    tracer = Tracer()
    shown = [
        trace
        for number in range(3 * OPEN_MAX)
        for trace in tracer.add(event(Stage.TUN_READ, number, number, peer=None))
    ]
    assert len(shown) >= 2 * OPEN_MAX


def test_a_document_holds_every_record() -> None:
    (trace,) = traces(
        [event(Stage.UDP_RECEIVE, 1, 7), event(Stage.TUN_WRITE, 1, 9, reason=DropReason.TUN_DOWN)]
    )
    found = document(Story(trace), 4)
    assert (found["number"], found["is_complete"], found["is_dropped"]) == (4, True, True)
    assert [
        (each["stage"], each["verdict"], each["reason"], each["unix_ns"])
        for each in found["events"]
    ] == [("udp.receive", "pass", None, 7), ("tun.write", "drop", "tun_down", 9)]
    assert found["events"][0]["peer"] == {
        "address": "192.0.2.2",
        "port": 8285,
        "subnets": ["10.5.2.0/24"],
    }
    assert bytes.fromhex(found["events"][0]["packet"]) == packet()


def test_stories_wait_in_bounded_numbers_and_meet_by_packet() -> None:
    """As many as bulk traffic makes: the oldest are shown before their time, none is lost."""
    stories = Stories(has_paths=True)
    count = WAITING_MAX + 500
    made = [
        Trace(event(Stage.TUN_READ, number, 0, port=number), last_ns=0) for number in range(count)
    ]
    for each in made:
        stories.add_trace(each, 0)
    shown = list(stories.due(0))
    assert [each.trace for each in shown] == made[:500]
    assert len(stories) == WAITING_MAX
    assert [each.trace for each in stories.due(HOLD_NS)] == made[500:]
    assert len(stories) == 0
