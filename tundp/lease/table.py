"""The lease table: snapshots and events in, changes out. A pure state machine.

Where flannel's sharp edges were, this differs on purpose: a snapshot is compared by
value, so a peer whose PublicIP changed while we were not watching is seen; an entry
that cannot be read changes nothing, neither itself nor others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tundp.errors import LeaseFormatError
from tundp.lease.codec import parse_key
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


@dataclass(frozen=True, slots=True)
class Change:
    """One lease before and after; None where it was not there."""

    key: LeaseKey
    old: Lease | None
    new: Lease | None

    @property
    def moves_packets(self) -> bool:
        """False for a mere renewal: same attributes, new revision and expiry."""
        if self.old is None or self.new is None:
            return True
        return self.old.attributes != self.new.attributes


class LeaseTable:
    """All leases of the network, our own among them, and unreadable entries, as of `revision`."""

    def __init__(self) -> None:
        self._leases: dict[LeaseKey, Lease] = {}
        self._bad: dict[str, BadEntry] = {}
        self.revision = 0
        self.newly_bad: tuple[BadEntry, ...] = ()
        """Entries that the last update showed unreadable, and were not, or not so, before."""

    @property
    def leases(self) -> Mapping[LeaseKey, Lease]:
        """Read-only view of the current leases."""
        return MappingProxyType(self._leases)

    @property
    def bad_entries(self) -> Mapping[str, BadEntry]:
        """Read-only view of the entries that cannot be read, by name."""
        return MappingProxyType(self._bad)

    def apply(self, update: Snapshot | Events) -> tuple[Change, ...]:
        """Apply one update; the changes it made, in the update's order."""
        self.revision = update.revision
        if isinstance(update, Snapshot):
            return self._replace_all(update)
        newly_bad: dict[str, BadEntry] = {}
        changes = [self._apply_event(event, newly_bad) for event in update.events]
        self.newly_bad = tuple(newly_bad.values())
        return tuple(change for change in changes if change is not None)

    def _apply_event(self, event: LeaseEvent, newly_bad: dict[str, BadEntry]) -> Change | None:
        match event:
            case Put(lease):
                self._bad.pop(str(lease.key), None)
                old = self._leases.get(lease.key)
                self._leases[lease.key] = lease
                return Change(lease.key, old, lease) if old != lease else None
            case Gone(key):
                self._bad.pop(str(key), None)
                old = self._leases.pop(key, None)
                return Change(key, old, None) if old is not None else None
            case BadEntry(name):
                if self._bad.get(name) != event:
                    newly_bad[name] = event
                self._bad[name] = event
            case BadEntryGone(name):
                self._bad.pop(name, None)
        return None

    def _replace_all(self, snapshot: Snapshot) -> tuple[Change, ...]:
        bad = {entry.name: entry for entry in snapshot.bad}
        self.newly_bad = tuple(e for name, e in bad.items() if self._bad.get(name) != e)
        self._bad = bad
        old = self._leases
        new = {lease.key: lease for lease in snapshot.leases}
        # A known lease whose value became unreadable is still somebody's subnet.
        for key in keys_of(snapshot.bad):
            if key in old:
                new.setdefault(key, old[key])
        self._leases = new
        gone = [Change(key, lease, None) for key, lease in old.items() if key not in new]
        put = [
            Change(key, old.get(key), lease) for key, lease in new.items() if old.get(key) != lease
        ]
        return (*gone, *put)


def keys_of(entries: tuple[BadEntry, ...]) -> list[LeaseKey]:
    """The keys among the names of bad entries: subnets whose value cannot be read."""
    keys = []
    for entry in entries:
        if entry.is_name_bad:
            continue
        try:
            keys.append(parse_key(entry.name))
        except LeaseFormatError:
            continue
    return keys
