"""Who counts as silent, and how it is told."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import IPv4Address

import numpy as np
import pytest

from tundp.backend.udp.usage import AGAIN_S, USE_S, Usage
from tundp.engine.base import HopActivity
from tundp.engine.reach import Reach, Standing, Unanswered, Unreachable, Way
from tundp.errors import PlatformError
from tundp.linux import icmp_errors

PEER = "192.0.2.2"
NOW = 1000.0
SILENT = Reach(standing=Standing.SILENT, since=NOW - 9, sent=21, asked=4, missed=3)


def activity(out: list[int], into: list[int], refused: list[int] | None = None) -> HopActivity:
    """Of hops 0, 1, ...: packets sent and received, and times of refused sends."""
    nothing = np.zeros(len(out), np.uint64)
    return HopActivity(
        packets_out=np.array(out, np.uint64),
        bytes_out=np.array(out, np.uint64) * np.uint64(100),
        packets_in=np.array(into, np.uint64),
        bytes_in=nothing,
        drops=nothing,
        last_refused_ns=np.array(refused or nothing, np.uint64),
    )


class World:
    """`look` after `look`, a second apart; replies are those of echo requests of ours."""

    def __init__(self) -> None:
        self.table = Unanswered()
        self.now = 100.0

    def look(
        self,
        out: list[int],
        into: list[int],
        *,
        replies: list[int] | None = None,
        refused: list[int] | None = None,
    ) -> list[int]:
        self.now += 1
        counted = np.array(replies or [0] * len(out), np.int64)
        found = self.table.look(activity(out, into, refused), counted, self.now)
        return [int(each) for each in found]


def test_a_hop_is_waited_for_from_its_first_unanswered_packet() -> None:
    world = World()
    assert world.look([0, 5], [0, 5]) == []
    assert world.look([0, 7], [0, 5]) == [1]
    assert world.table.since[1] == world.now
    began = world.now
    assert world.look([0, 9], [0, 5]) == [1]
    assert world.look([0, 9], [0, 5]) == [1]
    assert (world.table.since[1], world.table.tried_at[1]) == (began, began + 1)
    assert world.table.sent(1) == 4
    assert world.look([0, 9], [0, 6]) == []
    assert not world.table.is_waiting(1)


def test_replies_to_echo_requests_are_no_answer_of_anybody() -> None:
    world = World()
    world.look([0, 1], [0, 0])
    assert world.look([0, 2], [0, 1], replies=[0, 1]) == [1]
    # A reply is read before the engine has counted it, and is counted later.
    assert world.look([0, 3], [0, 1], replies=[0, 2]) == [1]
    assert world.look([0, 4], [0, 2], replies=[0, 2]) == [1]
    assert world.look([0, 5], [0, 3], replies=[0, 2]) == []


def test_refused_sends_are_unanswered_packets_too() -> None:
    world = World()
    world.look([0, 3], [0, 3])
    assert world.look([0, 3], [0, 3], refused=[0, 77]) == [1]
    assert world.table.sent(1) == 0
    assert world.table.is_refused(1)
    world.look([0, 5], [0, 4], refused=[0, 77])
    assert world.look([0, 6], [0, 4], refused=[0, 77]) == [1]
    assert not world.table.is_refused(1), "that was before the answer"


def test_a_hop_that_stands_for_another_endpoint_begins_anew() -> None:
    world = World()
    world.look([0, 9], [0, 9])
    world.look([0, 10], [0, 9])
    world.table.restart(1)
    assert world.look([0, 0], [0, 0]) == []
    assert world.look([0, 1], [0, 0]) == [1]
    assert world.table.sent(1) == 1
    assert world.look([0, 1], [0, 1]) == []


def test_hops_come_and_go() -> None:
    world = World()
    world.look([0, 1], [0, 0])
    assert world.look([0, 1, 4], [0, 0, 0]) == [1, 2]
    assert world.look([0], [0]) == []
    assert world.look([0, 1, 5], [0, 0, 0]) == [1, 2]
    assert not world.table.is_waiting(99)


@pytest.mark.parametrize(
    ("changes", "evidence", "step"),
    [
        ({}, "21 packets sent in 9 s, nothing came back, 3 echo requests unanswered", "a firewall"),
        (
            {
                "unreachable": Unreachable(
                    text="port unreachable", said_by=IPv4Address(PEER), count=5, last=NOW - 1
                )
            },
            "; port unreachable, says 192.0.2.2, 5 times, the last 1 s ago",
            "no daemon listens there",
        ),
        (
            {
                "unreachable": Unreachable(
                    text="port unreachable",
                    said_by=IPv4Address("203.0.113.9"),
                    count=1,
                    last=NOW,
                )
            },
            "; port unreachable, says 203.0.113.9, once, the last 0 s ago",
            "a firewall",
        ),
        (
            {"way": Way(device="eth0", neighbour="failed")},
            "; by eth0, neighbour FAILED",
            "no such host on eth0: is 192.0.2.2 up? If it is gone for good, delete its lease",
        ),
        (
            {"way": Way(device="eth0", gateway=IPv4Address("192.0.2.254"), neighbour="failed")},
            "; by 192.0.2.254 on eth0, neighbour FAILED",
            "the gateway 192.0.2.254 does not answer ARP on eth0",
        ),
        (
            {"way": Way(device="eth0", gateway=IPv4Address("192.0.2.254"), is_default=True)},
            "; by 192.0.2.254 on eth0 (default route)",
            "is 192.0.2.2 an address that nodes can reach",
        ),
        ({"way": Way(trouble="no route")}, "; no route", "there is no route: ip route get"),
        (
            {"standing": Standing.REFUSED, "last_errno": "EPERM"},
            "sends are refused for 9 s (EPERM)",
            "a firewall of this node",
        ),
        (
            {"standing": Standing.ONE_WAY, "rtt_s": 0.00042},
            "none came back, but it answers echo requests within 0.42 ms",
            "traffic in one direction only, or",
        ),
        ({"standing": Standing.UNHEARD, "missed": 0}, "nothing came back", "nobody can ask it"),
        ({"standing": Standing.WAITING, "missed": 0}, "nothing came back", ""),
        ({"standing": Standing.ANSWERS}, "", ""),
    ],
)
def test_what_is_said_of_a_peer(changes: dict[str, object], evidence: str, step: str) -> None:
    reach = replace(SILENT, **changes)  # type: ignore[arg-type]
    assert evidence in reach.evidence(NOW)
    assert bool(evidence) is bool(reach.evidence(NOW))
    said = reach.next_step(PEER, 8285)
    assert said.startswith(step) or step in said
    assert bool(step) is bool(said)


def test_only_peers_in_use_for_a_while_are_asked_for_the_time() -> None:
    usage = Usage()
    idle = np.zeros(3)

    def due(out: list[int], now: float, unanswered: object = idle) -> list[int]:
        return usage.due(activity(out, [0] * 3), unanswered, now)  # type: ignore[arg-type]

    assert due([0, 1, 1], 1) == []
    assert due([0, 2, 1], 1 + USE_S / 2) == []
    assert due([0, 3, 1], 1 + USE_S) == [1]
    assert due([0, 4, 2], 2 + USE_S, np.array([0, 9.0, 0])) == [2], "one is asked already"
    usage.asked(1, 2 + USE_S)
    assert due([0, 5, 2], 3 + USE_S) == []
    assert due([0, 6, 2], 2 + USE_S + AGAIN_S) == [1]
    assert due([0, 6, 2], 3 + USE_S + AGAIN_S) == [], "not in use now"


# ICMP errors, as linux/errqueue.h lays them out


def queued(
    origin: int = 2, kind: int = 3, code: int = 3, *, family: int = 2, cut: int = 0
) -> tuple[int, int, bytes]:
    """A control message of an error queue: SOL_IP, IP_RECVERR, what 192.0.2.7 said."""
    data = struct.pack("=IBBBxII", 111, origin, kind, code, 0, 0)
    data += struct.pack("=HH", family, 0) + bytes((192, 0, 2, 7)) + bytes(8)
    return 0, 11, data[: len(data) - cut]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (queued(), "port unreachable"),
        (queued(code=1), "host unreachable"),
        (queued(code=13), "prohibited by a filter"),
        (queued(code=4), None),
        (queued(code=200), None),
        (queued(kind=11), None),
        (queued(origin=1), None),
        (queued(family=10), None),
        (queued(cut=20), None),
        ((0, 8, queued()[2]), None),
    ],
)
def test_an_icmp_error_is_read(message: tuple[int, int, bytes], text: str | None) -> None:
    found = icmp_errors.decode([message], "192.0.2.2")
    if text is None:
        assert found is None
    else:
        assert found == (text, IPv4Address("192.0.2.7"), IPv4Address("192.0.2.2"))


def test_who_cannot_open_a_socket_hears_nothing() -> None:
    errors = icmp_errors.IcmpErrors()
    errors.provoke(IPv4Address(PEER), 8285)
    assert errors.receive() == []
    with pytest.raises(PlatformError):
        errors.open(IPv4Address("198.51.100.99"))
    errors.close()
