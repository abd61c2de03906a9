"""The lease plane of one node, without packets: what tests of stores and claims run.

The product's own parts, fed as daemon/node.py feeds them: subnet manager and routing ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address

from tundp.backend.choose import parse_network_config
from tundp.lease.identity import Identity
from tundp.lease.model import Events, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.network import NetworkConfig
from tundp.lease.routing import Routing
from tundp.store.base import Store
from tundp.subnet.claim_driver import Claim
from tundp.subnet.manager import LeaseSettings, StoreSubnetManager


class Silent:
    """Progress nobody watches."""

    def waits_for(self, what: str, why: Callable[[], str] | None = None) -> None:
        pass

    def waiting_failed(self, why: str) -> None:
        pass


class LeasePlane:
    """A node's lease and ledger over `store`; `up` runs it."""

    def __init__(
        self,
        store: Store,
        public_ip: str | IPv4Address,
        *,
        network_config: NetworkConfig,
        previous: LeaseKey | None = None,
        identity: Identity | None = None,
        rng: random.Random | None = None,
        lease_ttl_s: int = 86400,
        margin_s: float = 3600,
        retry_s: float = 60.0,
        exits_when_lost: bool = False,
        is_forced: bool = False,
    ) -> None:
        self.store = store
        self.network_config = network_config
        self.offer = LeaseAttributes(public_ip=IPv4Address(public_ip))
        self.previous = previous
        self.manager = StoreSubnetManager(
            store,
            identity=identity,
            lease=LeaseSettings(
                lease_ttl_s=lease_ttl_s,
                margin_s=margin_s,
                exits_when_lost=exits_when_lost,
                is_forced=is_forced,
                retry_s=retry_s,
            ),
            parse=parse_network_config,
            rng=rng or random.Random(),
        )
        self.updates: list[Snapshot | Events] = []
        """Every update since the lease was acquired, oldest first."""
        self._routing: Routing | None = None

    @property
    def claim(self) -> Claim:
        return self.manager.claim

    @property
    def key(self) -> str:
        return str(self.claim.lease.key)

    @property
    def routing(self) -> Routing:
        assert self._routing is not None, "no lease yet"
        return self._routing

    def known(self) -> dict[str, str]:
        """PublicIP of every lease in the ledger, by key."""
        return {
            str(lease.key): str(lease.attributes.public_ip)
            for lease in self.routing.leases.values()
        }

    async def acquire(self) -> Lease:
        acquired = await self.manager.acquire(
            self.network_config, self.offer, previous=self.previous, progress=Silent()
        )
        self._routing = Routing(
            network=self.network_config.network,
            backend=self.network_config.backend,
            own_key=acquired.lease.key,
            own_addresses=[self.offer.public_ip],
            public_ip=self.offer.public_ip,
            identity=self.manager.identity,
        )
        self._apply(acquired.snapshot)
        return acquired.lease

    async def follow(self) -> None:
        """Apply every update, until cancelled."""
        async for update in self.manager.updates():
            self._apply(update)
            self.updates.append(update)

    async def run(self) -> None:
        """Acquire a lease, keep it, follow the others', until cancelled."""
        await self.acquire()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.manager.keep())
            group.create_task(self.follow())

    @contextlib.asynccontextmanager
    async def up(self, *, is_watching: bool = True) -> AsyncIterator[Lease]:
        """The node with its lease, and the first update of the watch; is_watching: or without."""
        lease = await self.acquire()
        tasks = [asyncio.ensure_future(self.manager.keep())]
        if is_watching:
            tasks.append(asyncio.ensure_future(self.follow()))
        try:
            async with asyncio.timeout(20):
                while is_watching and not self.updates:
                    _raise_failure(tasks)
                    await asyncio.sleep(0.01)
            yield lease
            _raise_failure(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _apply(self, update: Snapshot | Events) -> None:
        self.manager.observe(self.routing.apply(update), self.routing)


def _raise_failure(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()
