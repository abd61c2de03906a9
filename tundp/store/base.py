"""What the daemon asks of a lease store. Every store obeys this one contract.

Reads are linearizable; every write is guarded and says so when it lost, so no store can
be made to steal a subnet. Writes that may or may not have happened raise
StoreUnavailable: the caller looks again before it does anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tundp.lease.model import Events, Lease, LeaseAttributes, LeaseKey, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreWarning:
    """Something about the store that an operator should change; leases are served all the same."""

    id: str
    """Names the kind, for machines: `two-configs`."""
    evidence: str
    next_step: str


class Store(Protocol):
    """A lease store. Methods may be called one at a time, `wait` beside the others.

    Every method may raise StoreUnavailable (nobody answered) or AccessDenied.
    """

    @property
    def description(self) -> str:
        """Where the leases live, for people: `etcd v2 at http://192.0.2.9:2379`."""
        ...

    @property
    def api(self) -> str:
        """The one API of etcd that has the leases, `v2` or `v3`.

        Empty as long as it is not known, and for a store that is not one API of etcd.
        """
        ...

    @property
    def warnings(self) -> tuple[StoreWarning, ...]:
        """What was found so far."""
        ...

    @property
    def round_s(self) -> float:
        """Limit of one read, in seconds: every endpoint is tried once.

        Whoever waits for an answer waits at least so long: a shorter deadline could end before
        the endpoint that answers has its turn.
        """
        ...

    async def choose_api(self, api: str) -> None:
        """Go on with this API without asking which one it is: it was this one before.

        No effect once it is known, and on a store that does not have to find out.
        """
        ...

    async def network_config(self) -> str:
        """The network config's text; ConfigNotFound if there is none."""
        ...

    async def snapshot(self) -> Snapshot:
        """All leases, and the revision they are the state of."""
        ...

    async def wait(self, after: int) -> Events | Snapshot:
        """The next events after revision `after`; waits until there are some.

        A store without a history gives a snapshot instead, as soon as anything changed.
        An empty batch is allowed, and may move the revision. Compacted when events
        between `after` and now are no longer known. Cancelling ends the wait at once.
        """
        ...

    async def create(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None
    ) -> Lease:
        """Create the lease if its key is absent, else Conflict."""
        ...

    async def update(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        *,
        revision: int,
    ) -> Lease:
        """Overwrite the lease if it is still at `revision`, else Conflict. None: no expiry."""
        ...

    async def delete(self, key: LeaseKey, *, revision: int) -> None:
        """Delete the lease if it is still at `revision`, else Conflict."""
        ...

    def reconnect(self) -> None:
        """Our own address changed: connections from the old one are dead, and do not know it."""
        ...

    async def close(self) -> None:
        """End waits and connections. Leases stay."""
        ...
