"""The lease table: snapshots and events in, changes out."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from tundp.lease.codec import parse_key
from tundp.lease.model import (
    BadEntry,
    BadEntryGone,
    Events,
    Gone,
    Lease,
    LeaseAttributes,
    Put,
    Snapshot,
)
from tundp.lease.table import Change, LeaseTable, keys_of


def lease(key: str, ip: str = "192.0.2.1", revision: int = 1, ttl: float | None = 86400.0) -> Lease:
    return Lease(
        key=parse_key(key),
        attributes=LeaseAttributes(public_ip=IPv4Address(ip)),
        revision=revision,
        lease_ttl_s=ttl,
    )


A = lease("10.5.1.0-24", "192.0.2.1", 1)
B = lease("10.5.2.0-24", "192.0.2.2", 2)
C = lease("10.5.3.0-24", "192.0.2.3", 3)


def table(*leases: Lease) -> LeaseTable:
    made = LeaseTable()
    made.apply(Snapshot(leases, 10))
    return made


def test_starts_empty() -> None:
    made = LeaseTable()
    assert dict(made.leases) == {}
    assert made.revision == 0


def test_first_snapshot() -> None:
    made = LeaseTable()
    changes = made.apply(Snapshot((A, B), 7))
    assert changes == (Change(A.key, None, A), Change(B.key, None, B))
    assert dict(made.leases) == {A.key: A, B.key: B}
    assert made.revision == 7


def test_second_snapshot_is_diffed() -> None:
    made = table(A, B)
    changes = made.apply(Snapshot((B, C), 20))
    assert changes == (Change(A.key, A, None), Change(C.key, None, C))
    assert set(made.leases) == {B.key, C.key}
    assert made.revision == 20


def test_the_same_snapshot_again_changes_nothing() -> None:
    made = table(A, B)
    assert made.apply(Snapshot((B, A), 11)) == ()
    assert made.revision == 11


def test_empty_snapshot_removes_all() -> None:
    made = table(A, B)
    assert made.apply(Snapshot((), 11)) == (Change(A.key, A, None), Change(B.key, B, None))
    assert dict(made.leases) == {}


def test_a_changed_public_ip_is_seen_after_a_resync() -> None:
    # flannel compares snapshots by subnet only, and keeps sending to the old address.
    moved = lease("10.5.1.0-24", "198.51.100.1", 9)
    (change,) = table(A, B).apply(Snapshot((moved, B), 11))
    assert change == Change(A.key, A, moved)
    assert change.moves_packets


def test_events_in_order() -> None:
    made = table(A)
    moved = lease("10.5.1.0-24", "198.51.100.1", 12)
    changes = made.apply(Events((Put(B), Gone(A.key), Put(moved), Gone(B.key)), 14))
    assert changes == (
        Change(B.key, None, B),
        Change(A.key, A, None),
        Change(A.key, None, moved),
        Change(B.key, B, None),
    )
    assert dict(made.leases) == {A.key: moved}
    assert made.revision == 14


@pytest.mark.parametrize(
    ("event", "breaks"),
    [
        (Gone(C.key), "an expiry of what we never saw"),
        (Put(A), "the very same lease again"),
        (BadEntry("10.5.1.0-24", "PublicIP is null"), "an unreadable value of a known key"),
        (BadEntry("rubbish", "is not a subnet key"), "an unreadable key"),
        (BadEntryGone("rubbish"), "and its end"),
    ],
)
def test_events_that_change_nothing(
    event: BadEntry | BadEntryGone | Gone | Put, breaks: str
) -> None:
    made = table(A, B)
    assert made.apply(Events((event,), 30)) == (), breaks
    assert dict(made.leases) == {A.key: A, B.key: B}
    assert made.revision == 30, "but the revision moves on"


def test_an_event_batch_is_not_a_snapshot() -> None:
    # In flannel an empty result empties the table.
    made = table(A, B)
    assert made.apply(Events((), 12)) == ()
    assert set(made.leases) == {A.key, B.key}
    assert made.revision == 12


@pytest.mark.parametrize(
    ("after", "moves", "breaks"),
    [
        (replace(A, revision=9), False, "a renewal is a new revision and nothing else"),
        (replace(A, lease_ttl_s=5.0), False, "expiry alone"),
        (replace(A, lease_ttl_s=None), False, "turned into a reservation"),
        (lease("10.5.1.0-24", "192.0.2.9"), True, "another address"),
        (
            replace(A, attributes=replace(A.attributes, backend_type="vxlan")),
            True,
            "another backend",
        ),
    ],
)
@pytest.mark.parametrize("how", ["event", "snapshot"])
def test_renewals_do_not_move_packets(after: Lease, moves: bool, breaks: str, how: str) -> None:
    made = table(A)
    update = Events((Put(after),), 11) if how == "event" else Snapshot((after,), 11)
    (change,) = made.apply(update)
    assert change == Change(A.key, A, after)
    assert change.moves_packets is moves, breaks
    assert made.leases[A.key] == after, "the table has the new expiry either way"


def test_coming_and_going_moves_packets() -> None:
    made = LeaseTable()
    (came,) = made.apply(Snapshot((A,), 1))
    (went,) = made.apply(Snapshot((), 2))
    assert came.moves_packets
    assert went.moves_packets


def test_bad_entry_in_a_snapshot_keeps_the_known_lease() -> None:
    made = table(A, B)
    bad = (BadEntry("10.5.1.0-24", "not JSON"), BadEntry("10.5.9.0-24", "not JSON"))
    assert made.apply(Snapshot((B,), 11, bad)) == ()
    assert dict(made.leases) == {B.key: B, A.key: A}


def test_bad_entry_with_an_unreadable_key_keeps_nothing_alive() -> None:
    made = table(A, B)
    assert made.apply(Snapshot((B,), 11, (BadEntry("10.5.1.0-24hi", "no key"),))) == (
        Change(A.key, A, None),
    )


def test_a_readable_entry_beats_a_bad_one_of_the_same_key() -> None:
    moved = lease("10.5.1.0-24", "198.51.100.1", 9)
    made = table(A)
    made.apply(Snapshot((moved,), 11, (BadEntry("10.5.1.0-24", "not JSON"),)))
    assert made.leases[A.key] == moved


def test_a_kept_lease_goes_once_its_entry_is_gone() -> None:
    made = table(A)
    made.apply(Snapshot((), 11, (BadEntry("10.5.1.0-24", "not JSON"),)))
    assert made.apply(Snapshot((), 12)) == (Change(A.key, A, None),)


def test_dual_stack_key_is_a_key_of_its_own() -> None:
    dual = lease("10.5.1.0-24&fd00:5:1::-64", "192.0.2.1")
    made = table(A, dual)
    assert set(made.leases) == {A.key, dual.key}
    assert made.apply(Events((Gone(dual.key),), 11)) == (Change(dual.key, dual, None),)
    assert set(made.leases) == {A.key}


def test_leases_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        table(A).leases[B.key] = B


@pytest.mark.parametrize(("ttl", "expected"), [(None, True), (0.0, False), (86400.0, False)])
def test_reservations(ttl: float | None, expected: bool) -> None:
    assert lease("10.5.1.0-24", ttl=ttl).is_reservation is expected


def test_keys_of_bad_entries() -> None:
    entries = (BadEntry("10.5.1.0-24", "x"), BadEntry("rubbish", "x"), BadEntry("10.5.2.0-24", "x"))
    assert keys_of(entries) == [A.key, B.key]
