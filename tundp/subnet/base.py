"""Where leases come from and who keeps ours: flannel's subnet manager, as the daemon sees it.

network_config()   the network config, as soon as there is a valid one
acquire(...)       our lease, and every lease there is: enough for a first full FIB
updates()          what changes from then on
keep()             renew our lease, for as long as this runs
keep_cache()       keep the leases on disk
observe(delta)     what an update said of our own lease, once it is applied
offer(...)         another address or other backend data for our lease
state()            how all of that is
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from tundp.lease.claim import LeaseState
from tundp.lease.model import Events, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.network import NetworkConfig
from tundp.lease.routing import Routing, RoutingDelta
from tundp.store.base import StoreWarning


class Progress(Protocol):
    """Told what a start is blocked on, for status and readyz."""

    def waits_for(self, what: str, why: Callable[[], str] | None = None) -> None:
        """The start waits for `what` now; `why` says, when asked, what it has met so far."""
        ...

    def waiting_failed(self, why: str) -> None:
        """What is waited for did not come this time; it is tried again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquired:
    """What `acquire` brought."""

    lease: Lease
    snapshot: Snapshot
    """Every lease, ours as it is now among them."""
    origin: str
    """How we came by the lease, for the log."""
    cache_age_s: float | None = None
    """How old the leases are if they come from the lease cache, since the store does not
    answer; None if they are the store's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The lease of another process of this node, as that one last knew it."""

    lease: Lease
    is_held: bool
    expires_in_s: float | None
    """None: never, or nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStatus:
    """Our lease and the store of all leases, now."""

    key: LeaseKey
    state: LeaseState
    conflict: str
    """Who has our subnet, in CONFLICT; else empty."""
    expires_in_s: float | None
    """Seconds until the lease expires, negative once it has; None for a reservation."""
    description: str
    """Where the leases live, for people."""
    is_answering: bool
    is_synced: bool
    """Whether the store itself has answered since the start, and not only the lease cache."""
    synced_at: float | None
    """When the leases were last known to be the store's, Unix time."""
    age_s: int | None
    """How old what is known of the leases is: 0 while the store answers, None if unknown."""
    cache_error: str = ""
    """Why the lease cache cannot be kept on disk; empty if it is, or if there is none."""
    is_cached: bool = False
    """Whether there is a lease cache on disk to be kept."""
    cached_at: float | None = None
    """When what it holds was last known to be the store's, Unix time; None for not yet."""


class SubnetManager(Protocol):
    """See the module. Methods are called on the event loop; `updates` and `keep` run beside."""

    @property
    def description(self) -> str:
        """Where the leases live, for people."""
        ...

    @property
    def warnings(self) -> tuple[StoreWarning, ...]:
        """What an operator should change about the store; leases are served all the same."""
        ...

    async def network_config(self, progress: Progress) -> NetworkConfig:
        """The network config; waits for a valid one as long as it takes."""
        ...

    async def acquire(
        self,
        network_config: NetworkConfig,
        offer: LeaseAttributes,
        *,
        previous: LeaseKey | None,
        progress: Progress,
    ) -> Acquired:
        """Get a lease in the network that says `offer`. Waits for the store.

        previous: the subnet of last time, kept if it is free. OutOfSubnets, LeaseError,
        DuplicateNode if there is no lease to be had.
        """
        ...

    async def take_over(
        self,
        network_config: NetworkConfig,
        offer: LeaseAttributes,
        held: Held,
    ) -> Acquired:
        """In place of `acquire`: go on with the lease of the process before us, without a write.

        StoreError if the store does not answer, and there are no leases on disk.
        """
        ...

    def taken_over(self, held: Held) -> None:
        """That process keeps the lease no more, and left it so: `keep` may begin."""
        ...

    @property
    def network_text(self) -> str:
        """The network config in force, as the store has it."""
        ...

    def own_lease(self) -> Lease:
        """Our lease as last written or seen."""
        ...

    def flush(self) -> None:
        """Write the leases to disk now, if they are not there yet. Blocks."""
        ...

    def updates(self) -> AsyncGenerator[Snapshot | Events, None]:
        """Every update of the leases, in order, until cancelled. No error ends it.

        Each call begins with a snapshot.
        """
        ...

    async def keep(self) -> None:
        """Keep our lease until cancelled. LeaseLost if losing it shall end the daemon."""
        ...

    async def keep_cache(self) -> None:
        """Write the leases to disk as they change, until cancelled; returns if none are kept."""
        ...

    def observe(self, delta: RoutingDelta, routing: Routing) -> None:
        """An update was applied: `routing` is the ledger it was applied to."""
        ...

    def offer(self, offer: LeaseAttributes) -> None:
        """Say something else in our lease as soon as possible."""
        ...

    def reconnect(self) -> None:
        """Our own address changed: connections from the old one are void."""
        ...

    def state(self) -> LeaseStatus:
        """How the lease and the store are; after `acquire`."""
        ...

    async def close(self) -> None:
        """End waits and connections. Leases stay."""
        ...
