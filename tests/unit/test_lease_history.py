"""What is kept of what happened to leases."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

import pytest

from tests.json_schema import validate
from tundp.backend.choose import parse_network_config
from tundp.daemon.lease_history import EACH_MAX, KEPT, LeaseHistory
from tundp.lease.claim import LeaseState
from tundp.lease.identity import HOST, NODE
from tundp.lease.model import (
    TTL_UNKNOWN,
    BadEntry,
    Events,
    Gone,
    Lease,
    LeaseAttributes,
    LeaseEvent,
    LeaseKey,
    Put,
    Snapshot,
)
from tundp.lease.routing import Routing
from tundp.observe import schema
from tundp.observe.codec import Malformed
from tundp.observe.leases import Leases
from tundp.show_leases import event_line
from tundp.subnet.base import LeaseStatus

CONFIG = parse_network_config('{"Network": "10.5.0.0/16"}', "here")


def key(number: int) -> LeaseKey:
    return LeaseKey(IPv4Interface(f"10.5.{number}.0/24"))


def lease(
    number: int,
    host: int | None = None,
    *,
    node: str = "",
    revision: int = 1,
    ttl_s: float | None = 60.0,
    backend_type: str = "",
) -> Lease:
    return Lease(
        key=key(number),
        attributes=LeaseAttributes(
            public_ip=IPv4Address(f"192.0.2.{number if host is None else host}"),
            backend_type=backend_type,
            extra={NODE: node, HOST: f"host-{node}"} if node else {},
        ),
        revision=revision,
        lease_ttl_s=ttl_s,
    )


OWN = LeaseStatus(
    key=key(1),
    state=LeaseState.HELD,
    conflict="",
    expires_in_s=50.4,
    description="etcd",
    is_answering=True,
    is_synced=True,
    synced_at=None,
    age_s=0,
)


class World:
    """A ledger and its history, fed as daemon/node.py feeds them."""

    def __init__(self) -> None:
        self.now = 1_770_000_000.0
        self.history = LeaseHistory(lambda: self.now, lambda: self.now)
        self.routing = Routing(
            network=CONFIG.network,
            backend=CONFIG.backend,
            own_key=key(1),
            own_addresses=[IPv4Address("192.0.2.1")],
            public_ip=IPv4Address("192.0.2.1"),
        )
        self.apply(Snapshot((lease(1), lease(2, node="two")), 40))

    def apply(self, update: Snapshot | Events) -> None:
        self.history.look(update, self.routing.leases)
        delta = self.routing.apply(update)
        self.history.judged(delta, update.revision)
        self.now += 0.002
        if delta.moves_packets:
            self.history.published()

    def events(self, *events: LeaseEvent, revision: int = 50) -> list[dict[str, Any]]:
        """What is noted of these."""
        number = self.answer().next_number
        self.apply(Events(events, revision))
        answer = self.history.answer(self.routing, OWN, number)()
        return [dict(each) for each in answer.to_json()["events"]]

    def answer(self) -> Leases:
        return self.history.answer(self.routing, OWN, None)()


def about(event: dict[str, Any], *names: str) -> list[Any]:
    return [event[name] for name in names]


def test_the_first_snapshot_is_one_event() -> None:
    (event,) = World().answer().events
    assert (event.kind, event.text, event.revision) == ("snapshot", "2 leases", 40)


def test_a_lease_comes_moves_is_taken_and_goes() -> None:
    world = World()
    (come,) = world.events(Put(lease(3, node="three")))
    assert about(come, "kind", "key", "public_ip", "before", "revision") == [
        *("come", "10.5.3.0-24", "192.0.2.3", None, 50)
    ]
    assert about(come, "node_id", "host", "applied_ms") == ["three", "host-three", 2.0]
    assert world.events(Put(lease(3, node="three", revision=2)), revision=51) == [], "a renewal"
    (moved,) = world.events(Put(lease(3, 9, node="nine", revision=3)), revision=52)
    assert about(moved, "kind", "public_ip", "before", "node_id", "node_before") == [
        *("moved", "192.0.2.9", "192.0.2.3", "nine", "three")
    ]
    assert moved["applied_ms"] == 2.0
    (taken,) = world.events(Put(lease(3, 9, node="other", revision=4)), revision=53)
    assert about(taken, "kind", "node_id", "node_before") == ["taken", "other", "nine"]
    assert taken["applied_ms"] is None, "packets go where they went"
    (gone,) = world.events(Gone(key(3)), revision=54)
    assert about(gone, "kind", "public_ip", "node_id") == ["gone", "192.0.2.9", "other"]
    assert world.events(Gone(key(3))) == [], "it was gone"


def test_events_in_a_row_are_told_by_what_those_before_them_made() -> None:
    found = World().events(Put(lease(3)), Put(lease(3, 4)), Gone(key(3)), Put(lease(3)))
    assert [each["kind"] for each in found] == ["come", "moved", "gone", "come"]
    assert found[1]["before"] == "192.0.2.3"


def test_what_is_refused_or_unreadable_is_told_with_the_reason() -> None:
    found = World().events(
        Put(lease(5, backend_type="vxlan")), BadEntry("rubbish", "no subnet key")
    )
    kinds = {each["kind"]: each for each in found}
    assert "another backend" in kinds["refused"]["text"]
    assert about(kinds["unreadable"], "key", "text") == ["rubbish", "no subnet key"]
    assert kinds["come"]["applied_ms"] is None, "no packet goes there"


def test_what_moves_no_packet_has_no_time_beside_what_does() -> None:
    world = World()
    world.events(Put(lease(3, node="three")), Put(lease(4, 9, node="nine")))
    found = world.events(
        Gone(key(3)),
        Put(lease(5, backend_type="vxlan")),
        Put(lease(4, 9, node="other", revision=3)),
        Put(lease(6)),
    )
    assert [(each["kind"], each["applied_ms"]) for each in found] == [
        ("gone", 2.0),
        ("come", None),
        ("taken", None),
        ("come", 2.0),
        ("refused", None),
    ]


def test_our_own_subnet_taken_by_another_is_in_it() -> None:
    (event,) = World().events(Put(lease(1, 66, node="thief")))
    assert about(event, "kind", "key", "before", "public_ip") == [
        *("moved", "10.5.1.0-24", "192.0.2.1", "192.0.2.66")
    ]


def test_a_later_snapshot_is_told_by_its_differences() -> None:
    world = World()
    number = world.answer().next_number
    world.apply(Snapshot((lease(1), lease(2, 8, node="two"), lease(4)), 60))
    world.apply(Snapshot((lease(1),), 61, bad=(BadEntry("10.5.4.0-24", "no JSON"),)))
    events = world.history.events(number)
    assert [(each.kind, each.key) for each in events] == [
        ("moved", "10.5.2.0-24"),
        ("come", "10.5.4.0-24"),
        ("gone", "10.5.2.0-24"),
        ("unreadable", "10.5.4.0-24"),
    ]


def test_many_at_once_are_counted_and_the_ring_is_bounded() -> None:
    world = World()
    puts = [
        Put(replace(lease(2), key=LeaseKey(IPv4Interface((f"10.5.{n // 16}.{n % 16 * 16}", 28)))))
        for n in range(1000, 1000 + EACH_MAX + 7)
    ]
    found = world.events(*puts)
    assert [each["text"] for each in found if each["kind"] == "more"] == ["7 more"]
    for number in range(KEPT):
        world.events(Put(lease(9, number % 2 + 20, revision=number)))
    answer = world.answer()
    assert len(answer.events) == KEPT
    assert answer.forgotten == answer.next_number - KEPT > 0
    assert answer.events[0].number == answer.forgotten


def test_what_waits_for_a_publication_gets_its_time_then() -> None:
    world = World()
    number = world.answer().next_number
    for each in (3, 4):
        update = Events((Put(lease(each)),), 50)
        world.history.look(update, world.routing.leases)
        world.history.judged(world.routing.apply(update), 50)
        world.now += 0.010
    assert [each.applied_ms for each in world.history.events(number)] == [None, None]
    world.history.published()
    assert [each.applied_ms for each in world.history.events(number)] == [20.0, 10.0]


def test_the_leases_by_subnet_with_what_comes_of_them() -> None:
    world = World()
    world.events(
        Put(lease(10, ttl_s=None)),
        Put(lease(3, ttl_s=TTL_UNKNOWN)),
        Put(lease(6, backend_type="x")),
    )
    found = world.answer()
    assert [(each.key, each.state, each.ttl_s, each.is_reservation) for each in found.leases] == [
        ("10.5.1.0-24", "own", 50, False),
        ("10.5.2.0-24", "peer", 60, False),
        ("10.5.3.0-24", "peer", None, False),
        ("10.5.6.0-24", "refused", 60, False),
        ("10.5.10.0-24", "peer", None, True),
    ]
    assert "another backend" in found.leases[3].reason
    assert (found.leases[1].node_id, found.leases[1].host) == ("two", "host-two")


def test_the_answer_is_read_back_and_fits_its_schema() -> None:
    world = World()
    world.events(Put(lease(3)), BadEntry("rubbish", "no key"))
    document = json.loads(json.dumps(world.answer().to_json()))
    assert Leases.from_json(document) == Leases.from_json(document)
    assert Leases.from_json(document).to_json() == document
    rules = json.loads(schema.LEASES_PATH.read_text(encoding="utf-8"))
    validate(document, rules, root=rules)
    assert schema.LEASES_PATH.read_text(encoding="utf-8") == schema.leases_text()


@pytest.mark.parametrize("document", [[], {}, {"schema": 99}, {"schema": 1}])
def test_what_is_no_answer_is_refused(document: Any) -> None:
    with pytest.raises(Malformed):
        Leases.from_json(document)


def test_an_event_is_a_line() -> None:
    world = World()
    world.events(Put(lease(3, node="three")))
    world.events(Put(lease(3, 9, node="nine", revision=2)), revision=52)
    assert event_line(world.answer().events[-1]) == (
        "2026-02-02T02:40:00.004Z rev 52 moved 10.5.3.0-24: 192.0.2.9, node nine (host-nine),"
        " before 192.0.2.3, before node three, in 2.0 ms"
    )
