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
    """All leases of the network, our own among them, as of `revision`."""

    def __init__(self) -> None:
        self._leases: dict[LeaseKey, Lease] = {}
        self.revision = 0

    @property
    def leases(self) -> Mapping[LeaseKey, Lease]:
        """Read-only view of the current leases."""
        return MappingProxyType(self._leases)

    def apply(self, update: Snapshot | Events) -> tuple[Change, ...]:
        """Take in one update; the changes it made, in the update's order."""
        self.revision = update.revision
        if isinstance(update, Snapshot):
            return self._replace_all(update)
        changes = (self._apply_event(event) for event in update.events)
        return tuple(change for change in changes if change is not None)

    def _apply_event(self, event: LeaseEvent) -> Change | None:
        match event:
            case Put(lease):
                old = self._leases.get(lease.key)
                self._leases[lease.key] = lease
                return Change(lease.key, old, lease) if old != lease else None
            case Gone(key):
                old = self._leases.pop(key, None)
                return Change(key, old, None) if old is not None else None
            case BadEntry() | BadEntryGone():
                return None

    def _replace_all(self, snapshot: Snapshot) -> tuple[Change, ...]:
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
        try:
            keys.append(parse_key(entry.name))
        except LeaseFormatError:
            continue
    return keys
