"""What happened to leases since the daemon started: a bounded ring in memory, and a look at now.

look(update)    before the ledger has it: what it changes
judged(delta)   after: what was refused
published()     packets go by it from here on
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Final

from tundp.lease.identity import Identity, identity_of
from tundp.lease.model import Events, Gone, Lease, LeaseKey, Put, Snapshot
from tundp.lease.routing import Routing, RoutingDelta
from tundp.observe.leases import LeaseEvent, LeaseRecord, Leases
from tundp.subnet.base import LeaseStatus

KEPT: Final = 2000
"""Events; the oldest are forgotten."""
EACH_MAX: Final = 200
"""Of one update, that are kept one by one; the rest is counted."""
_MOVES: Final = frozenset({"come", "moved", "gone"})


class LeaseHistory:
    """See the module. clock: Unix time, and one that only grows."""

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._events: deque[LeaseEvent] = deque(maxlen=KEPT)
        self._next = 0
        self._unpublished: dict[int, float] = {}
        """Numbers of events that packets do not go by yet, and when they came."""
        self._update_began_at = 0
        """Number of the first event of the update that is being applied."""

    def look(self, update: Snapshot | Events, known: Mapping[LeaseKey, Lease]) -> None:
        """An update that is about to be applied to a ledger with the leases `known`."""
        self._update_began_at = self._next
        if isinstance(update, Snapshot):
            changes = list(_compare(known, update))
            if not known:
                text = f"{len(update.leases)} leases"
                self._note("snapshot", update.revision, text=text)
                return
        else:
            changes = list(_changes(known, update))
        for number, (kind, key, old, new) in enumerate(changes):
            if number == EACH_MAX:
                self._note("more", update.revision, text=f"{len(changes) - EACH_MAX} more")
                break
            self._note_change(update.revision, kind, key, old, new)

    def judged(self, delta: RoutingDelta, revision: int) -> None:
        """What the ledger made of it."""
        # Beside others in one update: what comes and is refused, and another owner at the same
        # address, move no packet.
        refused_keys = {str(each.lease.key) for each in delta.newly_refused}
        first = self._next - len(self._events)
        for number in range(max(first, self._update_began_at), self._next):
            event = self._events[number - first]
            if event.kind == "taken" or (event.kind == "come" and event.key in refused_keys):
                self._unpublished.pop(number, None)
        for refused in delta.newly_refused[:EACH_MAX]:
            lease, who = refused.lease, identity_of(refused.lease)
            self._note(
                "refused",
                revision,
                key=str(lease.key),
                public_ip=lease.attributes.public_ip,
                text=refused.refusal.value,
                who=who,
            )
        for bad in delta.newly_bad[:EACH_MAX]:
            self._note("unreadable", revision, key=bad.name, text=bad.why)
        if not delta.moves_packets:
            for number in range(self._update_began_at, self._next):
                self._unpublished.pop(number, None)

    def published(self) -> None:
        """Packets go by a table with all that came so far."""
        if not self._unpublished:
            return
        now = self._monotonic()
        first = self._next - len(self._events)
        for number, began in self._unpublished.items():
            if number >= first:
                event = self._events[number - first]
                ms = round((now - began) * 1000, 3)
                self._events[number - first] = replace(event, applied_ms=ms)
        self._unpublished.clear()

    def events(self, since: int = 0) -> tuple[LeaseEvent, ...]:
        """Those from this number on that are kept, oldest first."""
        return tuple(each for each in self._events if each.number >= since)

    def answer(self, routing: Routing, own: LeaseStatus, since: int | None) -> Callable[[], Leases]:
        """What makes the answer, in any thread. since: events from there on, and no leases."""
        leases = tuple(routing.leases.values()) if since is None else ()
        refused = {
            key: each.refusal.value for key, each in routing.refused.items() if since is None
        }
        events, revision = self.events(since or 0), routing.revision
        last, kept = self._next, len(self._events)

        def make() -> Leases:
            ordered = sorted(
                leases, key=lambda each: (int(each.key.v4.ip), each.key.v4.network.prefixlen)
            )
            return Leases(
                revision=revision,
                own_key=str(own.key),
                leases=tuple(_record(each, own, refused) for each in ordered),
                events=events,
                next_number=last,
                forgotten=last - kept,
            )

        return make

    def _note_change(
        self, revision: int, kind: str, key: LeaseKey, old: Lease | None, new: Lease | None
    ) -> None:
        lease = new or old
        assert lease is not None
        was = None if old is None else identity_of(old)
        self._note(
            kind,
            revision,
            key=str(key),
            public_ip=lease.attributes.public_ip,
            before=None if old is None or new is None else old.attributes.public_ip,
            node_before="" if was is None or new is None else was.node_id,
            who=identity_of(lease),
        )

    def _note(
        self,
        kind: str,
        revision: int,
        *,
        key: str = "",
        public_ip: IPv4Address | None = None,
        before: IPv4Address | None = None,
        who: Identity | None = None,
        node_before: str = "",
        text: str = "",
    ) -> None:
        event = LeaseEvent(
            number=self._next,
            at=self._clock(),
            revision=revision,
            kind=kind,
            key=key,
            public_ip=public_ip,
            before=before,
            node_id="" if who is None else who.node_id,
            host="" if who is None else who.host,
            node_before=node_before,
            text=text,
        )
        self._events.append(event)
        if kind in _MOVES:
            self._unpublished[self._next] = self._monotonic()
        self._next += 1


_Change = tuple[str, LeaseKey, Lease | None, Lease | None]
"""What happened to which lease, as it was and as it is."""


def _changes(known: Mapping[LeaseKey, Lease], update: Events) -> Iterator[_Change]:
    """In order, each event by what those before it made of the table."""
    fresh: dict[LeaseKey, Lease | None] = {}
    for event in update.events:
        if isinstance(event, Put):
            key, new = event.lease.key, event.lease
            old = fresh.get(key, known.get(key))
            if kind := _kind(old, new):
                yield kind, key, old, new
            fresh[key] = new
        elif isinstance(event, Gone):
            old = fresh.get(event.key, known.get(event.key))
            if old is not None:
                yield "gone", event.key, old, None
            fresh[event.key] = None


def _compare(known: Mapping[LeaseKey, Lease], snapshot: Snapshot) -> Iterator[_Change]:
    now = {lease.key: lease for lease in snapshot.leases}
    unreadable = {bad.name for bad in snapshot.bad}
    for key, old in known.items():
        if key not in now and str(key) not in unreadable:
            yield "gone", key, old, None
    for key, new in now.items():
        old_one = known.get(key)
        if kind := _kind(old_one, new):
            yield kind, key, old_one, new


def _kind(old: Lease | None, new: Lease) -> str:
    """What a written lease is; empty for a renewal."""
    if old is None:
        return "come"
    before, now = old.attributes, new.attributes
    if (before.public_ip, before.backend_type) != (now.public_ip, now.backend_type):
        return "moved"
    was, who = identity_of(old), identity_of(new)
    return "taken" if (was and was.node_id) != (who and who.node_id) else ""


def _who(identity: Identity | None) -> dict[str, str]:
    return {} if identity is None else {"node_id": identity.node_id, "host": identity.host}


def _record(lease: Lease, own: LeaseStatus, refused: Mapping[LeaseKey, str]) -> LeaseRecord:
    reason = refused.get(lease.key, "")
    is_own = lease.key == own.key
    state = "own" if is_own else "refused" if reason else "peer"
    ttl_s = lease.lease_ttl_s if lease.is_ttl_known else None
    if is_own and own.expires_in_s is not None:
        ttl_s = own.expires_in_s
    return LeaseRecord(
        key=str(lease.key),
        subnet=lease.key.subnet,
        public_ip=lease.attributes.public_ip,
        state=state,
        reason=reason,
        backend_type=lease.attributes.backend_type,
        revision=lease.revision,
        is_reservation=lease.is_reservation,
        ttl_s=None if ttl_s is None else round(ttl_s),
        **_who(identity_of(lease)),
    )
