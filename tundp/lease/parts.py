"""A large update of the leases as several small ones, which together say the same.

Between two of them others have their turn: whoever applies an update holds the event loop, and a
snapshot may have a hundred thousand entries, most of them anybody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from tundp.lease.model import (
    BadEntry,
    BadEntryGone,
    Events,
    Gone,
    Lease,
    LeaseEvent,
    LeaseKey,
    Put,
    Snapshot,
)
from tundp.lease.table import keys_of

PART_LEN: Final = 250
"""Entries applied at once: a few milliseconds."""


def in_parts(
    update: Snapshot | Events,
    *,
    leases: Mapping[LeaseKey, Lease],
    bad: Mapping[str, BadEntry],
    own_key: LeaseKey,
    revision: int,
) -> Iterator[Events]:
    """What `update` changes, given the table it will be applied to; at least one part.

    leases, bad, revision: of that table, which must not change before the parts are applied.
    Leases that come or move precede those that go, so that no subnet is without a peer in between;
    what concerns `own_key` is all in the last part, which alone has the update's revision.
    """
    is_whole = isinstance(update, Snapshot)
    events = _changes(update, leases, bad) if isinstance(update, Snapshot) else update.events
    own, others = _split(events, own_key)
    last = len(others) - len(others) % PART_LEN
    for begin in range(0, last, PART_LEN):
        yield Events(tuple(others[begin : begin + PART_LEN]), revision)
    yield Events((*others[last:], *own), update.revision, is_whole=is_whole)


def _changes(
    snapshot: Snapshot, leases: Mapping[LeaseKey, Lease], bad: Mapping[str, BadEntry]
) -> Iterator[LeaseEvent]:
    new = {lease.key: lease for lease in snapshot.leases}
    new_bad = {entry.name: entry for entry in snapshot.bad}
    # A known lease whose value became unreadable is still somebody's subnet.
    kept = set(keys_of(snapshot.bad))
    yield from (Put(lease) for key, lease in new.items() if leases.get(key) != lease)
    yield from (entry for name, entry in new_bad.items() if bad.get(name) != entry)
    yield from (Gone(key) for key in leases if key not in new and key not in kept)
    yield from (BadEntryGone(name) for name in bad if name not in new_bad)


def _split(
    events: Iterable[LeaseEvent], own_key: LeaseKey
) -> tuple[list[LeaseEvent], list[LeaseEvent]]:
    """Those of our own key, and the others; each in order."""
    own: list[LeaseEvent] = []
    others: list[LeaseEvent] = []
    name = str(own_key)
    for event in events:
        match event:
            case Put(lease):
                is_own = lease.key == own_key
            case Gone(key):
                is_own = key == own_key
            case BadEntry(entry) | BadEntryGone(entry):
                is_own = entry == name
        (own if is_own else others).append(event)
    return own, others
