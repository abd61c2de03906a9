"""The subnet manager over a lease store: etcd v2, v3, both, or a file.

Why one room: one class, the order of whose steps matters.

store.network_config -> NetworkConfig              or the lease cache, if nobody answers
Claim.acquire        -> lease and snapshot
follow(store)        -> updates                    and a grace for a store that lost its data
Claim.keep           <- observe(delta)
LeaseCache           <- observe(delta)             for a start without the store
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from tundp.backoff import Backoff, Outage
from tundp.blocking import off_loop
from tundp.errors import (
    AccessDenied,
    CloneAlive,
    ConfigError,
    DuplicateNode,
    StoreError,
    StoreUnavailable,
)
from tundp.lease.claim import RETRY_S
from tundp.lease.identity import Identity
from tundp.lease.model import Events, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.network import NetworkConfig
from tundp.lease.routing import OwnGone, OwnSeen, OwnUnreadable, Routing, RoutingDelta
from tundp.store.base import Store, StoreWarning
from tundp.store.follow import follow
from tundp.subnet.base import Acquired, Held, LeaseStatus, Progress
from tundp.subnet.claim_driver import Claim, ClaimSettings
from tundp.subnet.lease_cache import CachedLeases, LeaseCache
from tundp.subnet.refusals import Refusals

_log = logging.getLogger(__name__)

ParseNetworkConfig = Callable[[str, str], NetworkConfig]
STALE_AFTER_S: Final = 3.0
"""How long a start waits for the store, at least, before it goes on with the lease cache."""
WIPED_S: Final = 2.0
"""Grace period for peers after the store lost our lease (data wiped or restored): every node
registers again within milliseconds."""
SAVE_PAUSE_S: Final = 10.0
"""At least so long between two writes of the lease cache."""
SAVE_RETRY_S: Final = 2.0
"""At least so long before a failed write is tried again; up to CONFIRM_S while it fails."""
REFUSED_S: Final = 30.0
"""A lease that was held for so long is refused by nobody."""
CONFIRM_S: Final = 60.0
"""Between two confirmations that the cached leases are still the store's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseSettings:
    """How our lease is claimed, whatever the network config says."""

    lease_ttl_s: int
    margin_s: float
    """Seconds before its expiry at which the lease is renewed."""
    is_forced: bool = False
    """Take a lease over even from a live node."""
    exits_when_lost: bool = False
    """`keep` raises LeaseLost instead of creating a lost lease again."""
    retry_s: float = RETRY_S
    """Longest wait between two tries to write, and between two checks of a conflict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Which lease cache, and how it is labelled."""

    cache: LeaseCache
    store_name: str
    """The store's name, whatever endpoint answers: another store's leases are none of ours."""
    is_start_allowed: bool
    """Whether a start may go on with cached leases while the store does not answer."""


class StoreSubnetManager:
    """See the module, and subnet.base.SubnetManager for the contract."""

    def __init__(
        self,
        store: Store,
        *,
        identity: Identity | None,
        lease: LeaseSettings,
        parse: ParseNetworkConfig,
        rng: random.Random,
        cache: CacheSettings | None = None,
    ) -> None:
        """parse: text and origin of a network config to what it says; ConfigError.

        cache: None keeps nothing on disk. rng: subnets, pauses and challenges are drawn.
        """
        self._store = store
        self._parse = parse
        self._identity = identity
        self._lease_settings = lease
        self._rng = rng
        self._cache = cache
        self._outage = Outage(_log, store.description)
        self._network_text = ""
        self._network_config: NetworkConfig | None = None
        self._cached: CachedLeases | None = None
        self._claim: Claim | None = None
        self._leases: Mapping[LeaseKey, Lease] = {}
        self._revision = 0
        self._has_own_lease = False
        self._is_synced = False
        self._synced_at: float | None = None
        self._is_unsaved = asyncio.Event()
        self._is_others = False
        """Whether lease and cache are still another process's."""

    @property
    def description(self) -> str:
        """See SubnetManager."""
        return self._store.description

    @property
    def identity(self) -> Identity | None:
        """This node: another one after `acquire` if a live node was found to have our id."""
        return self._identity

    @property
    def claim(self) -> Claim:
        """The claim on our lease; after `acquire` began."""
        assert self._claim is not None, "acquire() comes first"
        return self._claim

    @property
    def warnings(self) -> tuple[StoreWarning, ...]:
        """See SubnetManager."""
        return self._store.warnings

    async def network_config(self, progress: Progress) -> NetworkConfig:
        """See SubnetManager.

        With a lease cache, a store that does not answer is waited for STALE_AFTER_S, and until
        each of its endpoints has been tried once.
        """
        progress.waits_for("the network config")
        entries = 0 if self._cache is None else self._cache.cache.entries_about
        cached = await off_loop(self._usable_cache, entries)
        outage = Outage(_log, f"waiting for the network config from {self.description}")
        backoff = Backoff(0.5, 5.0, self._rng.random)
        clock = asyncio.get_running_loop().time
        began = clock()
        limit_s = max(STALE_AFTER_S, self._store.round_s)
        while True:
            try:
                async with asyncio.timeout(None if cached is None else limit_s):
                    text = await self._store.network_config()
                config = self._parse(text, self.description)
            except (StoreUnavailable, AccessDenied, TimeoutError) as error:
                why = str(error) or "timed out"
                progress.waiting_failed(why)
                outage.failed(why, now=clock())
                left_s = began + STALE_AFTER_S - clock() if cached is not None else math.inf
                await asyncio.sleep(max(0.0, min(backoff.next_s(), left_s)))
                if cached is not None and clock() - began >= STALE_AFTER_S:
                    return self._use_cache(cached)
            except (StoreError, ConfigError) as error:
                progress.waiting_failed(str(error))
                outage.failed(error, now=clock())
                await asyncio.sleep(backoff.next_s())
            else:
                outage.ended(now=clock())
                self._network_text = text
                return config

    async def acquire(
        self,
        network_config: NetworkConfig,
        offer: LeaseAttributes,
        *,
        previous: LeaseKey | None,
        progress: Progress,
    ) -> Acquired:
        """See SubnetManager."""
        self._network_config = network_config
        claim = self._make_claim(network_config, offer, previous)
        if self._cached is not None:
            return await self._resume(self._cached, offer)
        refusals = None if self._cache is None else self._cache.cache.refusals
        if refusals is not None and not self._lease_settings.is_forced:
            await self._wait_after_refusals(refusals, offer, progress)
        while True:
            progress.waits_for("a lease", partial(getattr, claim, "waiting_for"))
            try:
                lease, snapshot = await claim.acquire()
            except CloneAlive as error:
                self._identity = self._new_identity(error)
                _log.warning("%s Going on as node %s", error, self._identity.node_id)
                claim = self._make_claim(network_config, offer, previous)
            except DuplicateNode as error:
                if refusals is not None:
                    refusals.note(self._who(offer), str(error))
                raise
            else:
                break
        self._has_own_lease = True
        # The store itself has answered, though its watch has not begun.
        self._is_synced, self._synced_at = True, time.time()
        return Acquired(lease=lease, snapshot=snapshot, origin=claim.origin)

    async def take_over(
        self, network_config: NetworkConfig, offer: LeaseAttributes, held: Held
    ) -> Acquired:
        """See SubnetManager."""
        self._network_config = network_config
        self._is_others = True
        claim = self._make_claim(network_config, offer, None)
        cached = self._cached
        if cached is None:
            snapshot = await self._store.snapshot()
            self._is_synced, self._synced_at = True, time.time()
        else:
            await self._store.choose_api(cached.api)
            snapshot = Snapshot(cached.leases, cached.revision)
            self._synced_at = time.time() - cached.age_s
        self.taken_over(held)
        self._has_own_lease = held.is_held
        return Acquired(lease=held.lease, snapshot=snapshot, origin=claim.origin)

    def taken_over(self, held: Held) -> None:
        """See SubnetManager."""
        self.claim.take_over(held.lease, is_held=held.is_held, expires_in_s=held.expires_in_s)

    @property
    def network_text(self) -> str:
        """See SubnetManager."""
        return self._network_text

    def own_lease(self) -> Lease:
        """See SubnetManager."""
        return self.claim.lease

    async def updates(self) -> AsyncGenerator[Snapshot | Events, None]:
        """See SubnetManager.

        A snapshot from which our own lease is gone comes late: the store may have lost all of
        them, and the other nodes get time to register again.
        """
        backoff = Backoff(0.2, min(5.0, self._lease_settings.retry_s), self._rng.random)
        async with contextlib.aclosing(follow(self._store, self._outage, backoff)) as updates:
            async for update in updates:
                self._synced_at = time.time()
                if not self._is_synced:
                    self._is_synced = True
                    if self._cached is not None:
                        await self._compare_network_config()
                if isinstance(update, Snapshot) and self._looks_wiped(update):
                    yield await self._after_grace(update)
                else:
                    yield update

    async def keep(self) -> None:
        """See SubnetManager: renews the claim."""
        await self._keep_claim(self.claim)

    async def keep_cache(self) -> None:
        """See SubnetManager: writes the lease cache."""
        self._is_others = False
        if self._cache is not None:
            await self._keep_cache(self._cache)

    async def _keep_claim(self, claim: Claim) -> None:
        """Keep the lease; a refusal is remembered, and forgotten once the lease has lasted."""
        if self._cache is None:
            return await claim.keep()
        refusals = self._cache.cache.refusals
        timer = asyncio.get_running_loop().call_later(REFUSED_S, refusals.clear)
        try:
            await claim.keep()
        except CloneAlive as error:
            # The subnet is the live node's: another one, with another id, needs another start.
            new = self._new_identity(error)
            _log.warning("%s The next start is one of node %s", error, new.node_id)
            raise
        except DuplicateNode as error:
            refusals.note(self._who(claim.lease.attributes), str(error))
            raise
        finally:
            timer.cancel()

    def observe(self, delta: RoutingDelta, routing: Routing) -> None:
        """See SubnetManager."""
        self._leases, self._revision = routing.leases, routing.revision
        # Until the store itself has answered, the leases are cached ones: no news of ours.
        for own in delta.own if self._is_synced else ():
            match own:
                case OwnSeen(lease):
                    self.claim.observe(lease)
                case OwnGone():
                    self.claim.observe(None)
                case OwnUnreadable(why):
                    self.claim.observe_unreadable(why)
        self._has_own_lease = self.claim.lease.key in routing.leases
        if delta.has_overlap_gone:
            self.claim.observe_gone_elsewhere()
        if delta.changed_leases:
            self._is_unsaved.set()

    def offer(self, offer: LeaseAttributes) -> None:
        """See SubnetManager."""
        self.claim.offer(offer)

    def reconnect(self) -> None:
        """See SubnetManager."""
        self._store.reconnect()

    def state(self) -> LeaseStatus:
        """See SubnetManager."""
        claim = self.claim
        return LeaseStatus(
            key=claim.lease.key,
            state=claim.state,
            conflict=claim.conflict,
            expires_in_s=claim.expires_in_s,
            description=self.description,
            is_answering=self._is_synced and not self._outage.is_on,
            is_synced=self._is_synced,
            synced_at=self._synced_at,
            age_s=self._age_s(),
            cache_error="" if self._cache is None else self._cache.cache.error,
            cached_at=None if self._cache is None else self._cache.cache.saved_at,
            is_cached=self._cache is not None and self._cache.cache.is_kept,
        )

    async def close(self) -> None:
        """See SubnetManager. Leases not yet on disk are written, if `keep_cache` was begun."""
        self.flush()
        await self._store.close()

    def flush(self) -> None:
        """See SubnetManager."""
        if self._cache is None or self._is_others:
            return
        if self._is_unsaved.is_set() and self._is_synced:
            self._is_unsaved.clear()
            self._save(self._cache, tuple(self._leases.values()))

    def _make_claim(
        self,
        network_config: NetworkConfig,
        offer: LeaseAttributes,
        previous: LeaseKey | None,
    ) -> Claim:
        """A claim under our identity of now, which becomes ours."""
        self._claim = Claim(
            self._store,
            ClaimSettings(
                network_config=network_config,
                attributes=offer,
                previous=previous,
                identity=self._identity,
                lease_ttl_s=self._lease_settings.lease_ttl_s,
                margin_s=self._lease_settings.margin_s,
                is_forced=self._lease_settings.is_forced,
                exits_when_lost=self._lease_settings.exits_when_lost,
                retry_s=self._lease_settings.retry_s,
            ),
            rng=self._rng,
        )
        return self._claim

    async def _wait_after_refusals(
        self, refusals: Refusals, offer: LeaseAttributes, progress: Progress
    ) -> None:
        """Pause before a start that a live node has refused several times already."""
        pause_s, why = refusals.pause(self._who(offer))
        if pause_s:
            progress.waits_for("a lease", lambda: why)
            _log.warning("%s; asking again in %.0f s", why, pause_s)
            await asyncio.sleep(pause_s)

    def _who(self, offer: LeaseAttributes) -> str:
        node_id = "" if self._identity is None else self._identity.node_id
        return f"{node_id} {offer.public_ip}"

    def _new_identity(self, error: CloneAlive) -> Identity:
        """Another id for this machine, a clone of a live one. The error, if none can be made."""
        if self._cache is None or self._identity is None:
            raise error
        return self._cache.cache.renewed_identity(self._identity)

    def _age_s(self) -> int | None:
        if self._is_synced and not self._outage.is_on:
            return 0
        return None if self._synced_at is None else round(time.time() - self._synced_at)

    def _usable_cache(self) -> CachedLeases | None:
        settings = self._cache
        if settings is None or not settings.is_start_allowed or self._identity is None:
            return None
        cached = settings.cache.load(settings.store_name, self._identity.node_id)
        if cached is not None:
            try:
                self._parse(cached.network_config, "the lease cache")
            except ConfigError as error:
                _log.warning("the lease cache cannot be used: %s", error)
                return None
        return cached

    def _use_cache(self, cached: CachedLeases) -> NetworkConfig:
        self._cached = cached
        self._network_text = cached.network_config
        return self._parse(cached.network_config, f"the lease cache of {self.description}")

    async def _resume(self, cached: CachedLeases, offer: LeaseAttributes) -> Acquired:
        """Go on with the cached leases: ours is LOST until the store answers."""
        await self._store.choose_api(cached.api)
        own = [lease for lease in cached.leases if lease.key == cached.own_key]
        self.claim.resume(cached.own_key, own[0].attributes.public_ip if own else offer.public_ip)
        self._synced_at = time.time() - cached.age_s
        _log.error(
            "%s does not answer: going on with the leases of %d s ago, subnet %s",
            self.description,
            cached.age_s,
            cached.own_key.subnet,
        )
        return Acquired(
            lease=self.claim.lease,
            snapshot=Snapshot(cached.leases, cached.revision),
            origin=self.claim.origin,
            cache_age_s=cached.age_s,
        )

    def _looks_wiped(self, snapshot: Snapshot) -> bool:
        """Our own lease is gone, as all are when the store's data was lost or restored."""
        if not self._has_own_lease:
            return False
        own = self.claim.lease.key
        if any(lease.key == own for lease in snapshot.leases):
            return False
        name = str(own)
        return all(entry.name != name for entry in snapshot.bad)

    async def _after_grace(self, snapshot: Snapshot) -> Snapshot:
        """The state once every node had time to notice and to register again."""
        _log.warning(
            "%s has lost our lease, and perhaps all: known peers stay for %.0f s to come back",
            self.description,
            WIPED_S,
        )
        self.claim.observe(None)
        await asyncio.sleep(WIPED_S)
        try:
            return await self._store.snapshot()
        except StoreError:
            return snapshot

    async def _compare_network_config(self) -> None:
        """Log an error if the network config is not the one from the lease cache."""
        assert self._network_config is not None
        try:
            text = await self._store.network_config()
            config = self._parse(text, self.description)
        except (StoreError, ConfigError) as error:
            _log.warning("network config: %s; going on with the one in use", error)
            return
        if config != self._network_config:
            _log.error(
                "the network config in %s is not the one this node started with (%s): restart it",
                self.description,
                self._network_config.network,
            )

    async def _keep_cache(self, cache: CacheSettings) -> None:
        """Write the leases to disk, at most every SAVE_PAUSE_S; confirm them between.

        What failed is tried again while it fails: room on a disk is made without a word.
        """
        backoff = Backoff(SAVE_RETRY_S, CONFIRM_S, self._rng.random)
        while True:
            if cache.cache.error:
                await asyncio.sleep(backoff.next_s())
                await asyncio.to_thread(cache.cache.pay)
            else:
                backoff.reset()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CONFIRM_S):
                        await self._is_unsaved.wait()
            # A store that never answered confirms nothing, though nothing has failed yet.
            if not self._is_synced:
                await asyncio.sleep(SAVE_PAUSE_S)
            elif self._is_unsaved.is_set():
                await self._save_soon(cache)
            elif not self._outage.is_on and not await asyncio.to_thread(cache.cache.confirm):
                self._is_unsaved.set()

    async def _save_soon(self, cache: CacheSettings) -> None:
        """Save what there is now; it stays unsaved until that went well."""
        self._is_unsaved.clear()
        is_saved = False
        try:
            is_saved = await asyncio.to_thread(self._save, cache, tuple(self._leases.values()))
        finally:
            if not is_saved:
                self._is_unsaved.set()
        await asyncio.sleep(SAVE_PAUSE_S if is_saved else SAVE_RETRY_S)

    def _save(self, cache: CacheSettings, leases: tuple[Lease, ...]) -> bool:
        return cache.cache.save(
            store=cache.store_name,
            node_id="" if self._identity is None else self._identity.node_id,
            api=self._store.api,
            network_config=self._network_text,
            own_key=self.claim.lease.key,
            leases=leases,
            revision=self._revision,
            # Written while the store is away they are as old as its last answer.
            synced_at=self._synced_at if self._outage.is_on else None,
        )
