"""Our own lease: acquire it, keep it, and get it back. Never by taking it from somebody else.

    HELD      ours; renewed `margin` before it expires
    LOST      expired or deleted: the same subnet is created again as soon as possible
    CONFLICT  another node holds our subnet: said loudly, looked at again every minute

In every state the dataplane goes on with the peers it knows; pods keep their addresses.
A lease that another node with our PublicIP may hold is challenged before it is taken
(lease/identity.py), and such challenges are answered here while we hold ours.

flannel writes renewals without looking (so a node back from suspend takes its subnet
from whoever got it since) and exits with code 0 when its lease is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from ipaddress import IPv4Address
from typing import Final

from tundp.backoff import Backoff, Outage
from tundp.errors import Conflict, DuplicateNode, LeaseError, LeaseLost, StoreError
from tundp.lease.allocate import Keep, Take, overlap, plan_claim
from tundp.lease.identity import (
    Identity,
    challenge_in,
    challenged,
    identity_of,
    signed,
)
from tundp.lease.model import TTL_UNKNOWN, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.network import NetworkConfig
from tundp.lease.table import keys_of
from tundp.store.base import Store

_log = logging.getLogger(__name__)

ATTEMPTS: Final = 10
"""Lost races after which flannel, too, gives up."""
RACE_PAUSE_S: Final = 0.2
RETRY_S: Final = 60.0
"""Longest wait between tries to renew, and between looks at a conflict."""
CHALLENGE_S: Final = 8.0
"""How long the holder of a lease has to answer a challenge. Its watch shows it in
milliseconds, but one that waits for a store to come back looks only every 5 s. A node
that is cut off from the store for longer answers nothing, and loses the lease."""
CHALLENGE_LOOKS: Final = 32


class LeaseState(Enum):
    """Whether the subnet is ours."""

    HELD = "held"
    LOST = "lost"
    CONFLICT = "conflict"


class _Seen(Enum):
    """What the watch has shown of our key during a write, if it is neither lease nor None."""

    NOTHING = "nothing"


class Claim:
    """This node's claim on one subnet. Call `acquire` once, then run `keep`."""

    def __init__(
        self,
        store: Store,
        *,
        config: NetworkConfig,
        attributes: LeaseAttributes,
        previous: LeaseKey | None,
        lease_ttl_s: int,
        margin_s: int,
        rng: random.Random,
        identity: Identity | None = None,
        is_forced: bool = False,
        exits_when_lost: bool = False,
    ) -> None:
        """is_forced: take a lease over even from a live node. exits_when_lost: `keep` raises."""
        self._store = store
        self._config = config
        self._attributes = attributes
        self._previous = previous
        self._lease_ttl_s = lease_ttl_s
        self._margin_s = margin_s
        self._rng = rng
        self._identity = identity
        self._is_forced = is_forced
        self._exits_when_lost = exits_when_lost
        self._challenge = f"{rng.getrandbits(64):016x}"
        self._former_ips: set[IPv4Address] = set()
        self._is_renewal_due = False
        self._conflict = ""
        self.origin = "remembered"
        """How we came by the lease, for the log."""
        self._outage = Outage(_log, "lease")
        self._backoff = Backoff(1.0, RETRY_S, rng.random)
        self._wake = asyncio.Event()
        self._lease: Lease | None = None
        self._expires_at: float | None = None
        self._state = LeaseState.LOST
        self._is_writing = False
        self._seen_meanwhile: Lease | Enum | None = _Seen.NOTHING
        self._is_look_due = False
        self._warned_at = -RETRY_S

    @property
    def lease(self) -> Lease:
        """The lease as last written or seen; it stays, to be regained, when lost."""
        if self._lease is None:
            raise LeaseError("no lease yet: acquire() has not returned")
        return self._lease

    @property
    def state(self) -> LeaseState:
        """Whether the subnet is ours right now."""
        return self._state

    @property
    def conflict(self) -> str:
        """Who has our subnet, in CONFLICT; else empty."""
        return self._conflict if self._state is LeaseState.CONFLICT else ""

    def move_to(self, public_ip: IPv4Address) -> None:
        """Our address changed: the lease stays, and tells the new one as soon as possible."""
        if public_ip != self._attributes.public_ip:
            self._former_ips.add(self._attributes.public_ip)
            self._attributes = replace(self._attributes, public_ip=public_ip)
            self._is_renewal_due = True
            self._wake.set()

    def resume(self, key: LeaseKey, public_ip: IPv4Address) -> None:
        """Go on with a subnet remembered from before, though the store cannot be asked.

        public_ip: what our lease said then. It is LOST until the store says more: created
        again, found to be ours, or CONFLICT.
        """
        self._former_ips.add(public_ip)
        self._lease = Lease(
            key=key,
            attributes=signed(self._attributes, self._identity, self._attributes),
            revision=0,
            lease_ttl_s=TTL_UNKNOWN,
        )

    @property
    def expires_in_s(self) -> float | None:
        """Seconds until the lease expires, negative once it has; None for a reservation."""
        return None if self._expires_at is None else self._expires_at - self._now()

    async def acquire(self) -> Lease:
        """Get a lease; waits for the store as long as it takes.

        OutOfSubnets when none is free, LeaseError after ten lost races in a row.
        """
        races = 0
        while True:
            try:
                self._hold(await self._try_acquire())
            except Conflict as error:
                races += 1
                if races == ATTEMPTS:
                    raise LeaseError(
                        f"max retries reached trying to acquire a subnet: {ATTEMPTS} times"
                        f" another node was faster, last: {error}"
                    ) from None
                await asyncio.sleep(RACE_PAUSE_S * (races + self._rng.random()))
            except StoreError as error:
                self._outage.failed(error, now=self._now())
                await asyncio.sleep(self._backoff.next_s())
            else:
                self._outage.ended(now=self._now())
                self._backoff.reset()
                return self.lease

    def observe(self, lease: Lease | None) -> None:
        """Take in what the watch saw of our key: its lease, or None when it is gone.

        What it saw may be older than what we wrote since; then it is no news. During a
        write it waits for the write's answer, which tells.
        """
        if self._is_writing:
            self._seen_meanwhile = lease
            return
        if lease is None:
            self._set_state(LeaseState.LOST, "it was deleted or has expired")
        elif (holder := self._other_holder(lease)) is not None:
            if lease.revision < self.lease.revision and self._state is LeaseState.HELD:
                # Older than what we wrote, or of a store that was restored: only looking tells.
                self._is_look_due = True
            else:
                self._set_state(LeaseState.CONFLICT, holder)
        elif lease.revision > self.lease.revision:
            challenge = challenge_in(lease)
            if challenge not in (None, self._challenge):
                _log.warning(
                    "lease %s: another node with our PublicIP or node id asks whether we are"
                    " alive; answering",
                    lease.key,
                )
                self._is_renewal_due = True
            else:
                self._warn_of_a_double()
                # Ours, but it may not say so: until it does, another could take it for his.
                # One that does is not written again: its writer may be a clone that would
                # write it again, too, and so for ever.
                is_signed = self._identity is None or identity_of(lease) == self._identity
                self._is_renewal_due = self._is_renewal_due or not is_signed
            self._hold(lease)
        elif lease.revision < self.lease.revision:
            # The store was restored, or this is an echo from before our write.
            self._is_look_due = True
        self._wake.set()

    def observe_unreadable(self, why: str) -> None:
        """Our key now has a value nobody can read: whose it is cannot be told."""
        if self._state is not LeaseState.CONFLICT:
            self._set_state(LeaseState.CONFLICT, f"its value cannot be read ({why})")
            self._wake.set()

    def look_again(self) -> None:
        """A lease went away: perhaps that ends a conflict."""
        if self._state is LeaseState.CONFLICT:
            self._wake.set()

    async def keep(self) -> None:
        """Renew for ever; get the lease back when it is lost. Ends only by cancellation."""
        while True:
            self._wake.clear()
            left_s = self.expires_in_s
            if self._state is LeaseState.HELD and left_s is not None and left_s <= 0:
                self._set_state(LeaseState.LOST, "it expired before it could be renewed")
            if self._state is LeaseState.HELD:
                is_due = self._is_renewal_due or self._is_look_due
                delay_s = 0.0 if is_due else self._renew_in_s()
                if delay_s is None or delay_s > 0:
                    await self._sleep(delay_s)
                    continue
            is_renewal = self._state is LeaseState.HELD and not self._is_look_due
            try:
                if self._exits_when_lost and self._state is not LeaseState.HELD:
                    await self._exit_if_lost()
                else:
                    await (self._renew() if is_renewal else self._regain())
            except StoreError as error:
                self._outage.failed(error, now=self._now())
                await self._sleep(self._backoff.next_s())
                continue
            self._outage.ended(now=self._now())
            self._backoff.reset()
            if self._state is LeaseState.CONFLICT:
                await self._sleep(RETRY_S)

    async def _try_acquire(self) -> Lease:
        snapshot = await self._store.snapshot()
        plan = plan_claim(
            snapshot.leases,
            unreadable=keys_of(snapshot.bad),
            config=self._config,
            public_ip=self._attributes.public_ip,
            node_id="" if self._identity is None else self._identity.node_id,
            previous=self._previous,
            rng=self._rng,
        )
        await self._outlive_twins(snapshot, plan)
        match plan:
            case Keep(lease):
                self.origin = _origin(lease, self._identity)
                return await self._write_over(await self._unless_alive(lease))
            case Take(key, stale):
                for lease in stale:
                    _log.info("lease %s no longer fits the network config: deleting it", lease.key)
                    await self._store.delete(lease.key, revision=lease.revision)
                self.origin = "the subnet of last time" if key == self._previous else "new"
                lease = await self._create(key, self._signed())
                if key.v6 is not None:
                    await self._yield_to_earlier(lease)
                return lease

    async def _yield_to_earlier(self, lease: Lease) -> None:
        """Give a new dual-stack lease up if an earlier one shares either of its subnets.

        Creating is exclusive by key, and two keys may name one IPv4 subnet with two IPv6
        ones: both nodes would have it. The lower revision was there first.
        """
        for other in (await self._store.snapshot()).leases:
            if (
                other.key != lease.key
                and other.revision < lease.revision
                and overlap(other.key, lease.key)
            ):
                await self._store.delete(lease.key, revision=lease.revision)
                raise Conflict(f"{other.key} was there before {lease.key}")

    async def _write_over(self, lease: Lease) -> Lease:
        """Renew a lease of ours; what other programs keep in its value stays."""
        self._is_renewal_due = False
        try:
            with self._writing():
                return await self._store.update(
                    lease.key,
                    self._signed(lease.attributes),
                    None if lease.is_reservation else self._lease_ttl_s,
                    revision=lease.revision,
                )
        except StoreError:
            self._is_renewal_due = True
            raise

    async def _create(self, key: LeaseKey, attributes: LeaseAttributes) -> Lease:
        with self._writing():
            return await self._store.create(key, attributes, self._lease_ttl_s)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A write of ours is under way: what the watch sees of it is no news."""
        self._is_writing = True
        self._seen_meanwhile = _Seen.NOTHING
        try:
            yield
        finally:
            self._is_writing = False

    def _signed(self, kept: LeaseAttributes | None = None) -> LeaseAttributes:
        """What our lease shall say, with whatever others keep in it."""
        return signed(self._attributes, self._identity, kept or self._attributes)

    def _other_holder(self, lease: Lease) -> str | None:
        """Who else than us holds `lease`, in words; None if it is ours."""
        public_ip = lease.attributes.public_ip
        holder = identity_of(lease)
        has_our_id = False
        if self._identity is not None and holder is not None:
            if holder.node_id != self._identity.node_id:
                return f"node {holder} at {public_ip} holds it now"
            has_our_id = True
        if public_ip == self._attributes.public_ip:
            return None
        if has_our_id and public_ip in self._former_ips:
            return None
        return f"{public_ip} holds it now"

    async def _outlive_twins(self, snapshot: Snapshot, plan: Keep | Take) -> None:
        """Ask the holders of other leases with our PublicIP; those of the dead go.

        We are about to tell everybody that this address is ours: two nodes that do leave
        one of them without packets. DuplicateNode if one is alive.
        """
        kept = plan.lease.key if isinstance(plan, Keep) else None
        for lease in snapshot.leases:
            if lease.key == kept or lease.attributes.public_ip != self._attributes.public_ip:
                continue
            holder = identity_of(lease)
            if self._identity is None or holder is None or self._is_forced:
                continue
            if holder.node_id == self._identity.node_id:
                continue
            asked = await self._unless_alive(lease)
            if lease.is_reservation:
                continue  # made by hand: not ours to delete
            _log.warning("lease %s of a node that is no more: deleting it", lease.key)
            await self._store.delete(lease.key, revision=asked.revision)

    async def _unless_alive(self, lease: Lease) -> Lease:
        """`lease` as it may be written over. DuplicateNode if a live twin of ours holds it.

        A lease with our PublicIP and our node id, or with none, is ours. Any other is
        challenged first.
        """
        holder = identity_of(lease)
        if self._identity is None or holder is None:
            return lease
        has_our_id = holder.node_id == self._identity.node_id
        if has_our_id and lease.attributes.public_ip == self._attributes.public_ip:
            return lease
        if self._is_forced:
            if not has_our_id:
                _log.warning("lease %s taken over from node %s, as told", lease.key, holder)
            return lease
        if has_our_id:
            _log.info(
                "lease %s is ours by node id, at %s until now: asking whether a clone is alive",
                lease.key,
                lease.attributes.public_ip,
            )
        else:
            _log.info(
                "lease %s was written by node %s: asking whether it is alive", lease.key, holder
            )
        asked = await self._store.update(
            lease.key,
            challenged(lease.attributes, self._challenge),
            None if lease.is_reservation else self._lease_ttl_s,
            revision=lease.revision,
        )
        for _ in range(CHALLENGE_LOOKS):
            await asyncio.sleep(CHALLENGE_S / CHALLENGE_LOOKS)
            snapshot = await self._store.snapshot()
            now = next((each for each in snapshot.leases if each.key == lease.key), None)
            if now is None:
                raise Conflict(f"lease {lease.key} went away")
            other = challenge_in(now)
            if other not in (None, self._challenge):
                # Two who ask at once would interrupt each other for ever: one lets the other end.
                if str(other) < self._challenge:
                    await asyncio.sleep(CHALLENGE_S + 1)
                raise Conflict(f"somebody else asks after lease {lease.key}, too")
            if now.revision != asked.revision:
                raise DuplicateNode(self._double(now, holder, has_our_id=has_our_id))
        if not has_our_id:
            _log.warning("lease %s: node %s does not answer", lease.key, holder)
        return asked

    def _double(self, lease: Lease, holder: Identity, *, has_our_id: bool) -> str:
        where = f"lease {lease.key}, PublicIP {lease.attributes.public_ip}"
        if has_our_id:
            return (
                f"another node has our node id {holder.node_id} and is alive ({where}, host"
                f" {holder.host}): is this machine a clone of it? Delete node-id in --state-dir"
                " here, or use --force-takeover if that node must go"
            )
        return (
            f"PublicIP {self._attributes.public_ip} belongs to node {holder}, which is alive"
            f" ({where}); this is node {self._identity}. Two nodes cannot share an address:"
            " give one of them another --iface, --iface-can-reach or --public-ip, or use"
            " --force-takeover if that node must go"
        )

    def _warn_of_a_double(self) -> None:
        now = self._now()
        if now < self._warned_at + RETRY_S:
            return
        self._warned_at = now
        _log.warning(
            "lease %s was written by somebody else with our PublicIP %s: if another node"
            " advertises this address too, give one of them another --iface or --public-ip",
            self.lease.key,
            self._attributes.public_ip,
        )

    async def _renew(self) -> None:
        try:
            self._hold(await self._write_over(self.lease))
        except Conflict:
            # Renewed by hand, gone, or somebody else's: looking tells.
            await self._regain()
            return
        _log.debug("lease %s renewed", self.lease.key)

    async def _exit_if_lost(self) -> None:
        """LeaseLost, unless the store says what the watch told was old news."""
        snapshot = await self._store.snapshot()
        found = next((each for each in snapshot.leases if each.key == self.lease.key), None)
        if found is None or self._other_holder(found) is not None:
            raise LeaseLost(f"lease {self.lease.key} is {self._state.value}")
        self._hold(found)

    async def _regain(self) -> None:
        key = self.lease.key
        snapshot = await self._store.snapshot()
        self._is_look_due = False
        if key in keys_of(snapshot.bad):
            why = next(entry.why for entry in snapshot.bad if entry.name == str(key))
            self._set_state(LeaseState.CONFLICT, f"its value cannot be read ({why})")
            return
        found = next((lease for lease in snapshot.leases if lease.key == key), None)
        try:
            if found is None:
                if (other := _overlapping(snapshot, key)) is not None:
                    self._set_state(LeaseState.CONFLICT, f"lease {other} has addresses of it now")
                    return
                self._hold(await self._create(key, self._signed(self.lease.attributes)))
            elif (holder := self._other_holder(found)) is None:
                self._hold(await self._write_over(found))
            else:
                self._set_state(LeaseState.CONFLICT, holder)
        except Conflict as error:
            raise StoreError(
                f"lease {key} changes faster than it can be regained: {error}"
            ) from None

    def _hold(self, lease: Lease) -> None:
        self._lease = lease
        if lease.lease_ttl_s is None:
            self._expires_at = None
        elif lease.is_ttl_known:
            self._expires_at = self._now() + lease.lease_ttl_s
        elif self._expires_at is None or self._expires_at <= self._now():
            # Nobody told when it expires: renewing it does.
            self._is_renewal_due = True
        self._set_state(LeaseState.HELD, "")
        seen, self._seen_meanwhile = self._seen_meanwhile, _Seen.NOTHING
        if seen is None:
            # Deleted before our write, or after it? Only looking tells.
            self._is_look_due = True
            self._wake.set()
        elif isinstance(seen, Lease) and seen.revision > lease.revision:
            self.observe(seen)

    def _set_state(self, state: LeaseState, why: str) -> None:
        if state is LeaseState.CONFLICT:
            self._conflict = why
        if state is self._state:
            return
        before, self._state = self._state, state
        key = self.lease.key
        if state is LeaseState.LOST:
            _log.warning("lease %s lost: %s; trying to get the same subnet again", key, why)
        elif state is LeaseState.CONFLICT:
            _log.error(
                "lease %s CONFLICT: %s. Packets to known peers still flow, but two nodes may now"
                " use this subnet: stop one, or delete that entry to give it back to this one",
                key,
                why,
            )
        elif before is not LeaseState.HELD:
            _log.info("lease %s held", key)

    def _renew_in_s(self) -> float | None:
        left_s = self.expires_in_s
        if left_s is None:
            return None
        # A margin as long as the lease itself (short leases in tests) leaves a third.
        margin_s = min(self._margin_s, self._lease_ttl_s * 2 / 3)
        return left_s - margin_s

    async def _sleep(self, delay_s: float | None) -> None:
        """Until something was observed, or so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _origin(lease: Lease, identity: Identity | None) -> str:
    """Where a lease that is kept comes from, for the log."""
    holder = identity_of(lease)
    public_ip = lease.attributes.public_ip
    if holder is None:
        return f"taken over from a flannel with PublicIP {public_ip}, or a reservation"
    if identity is not None and holder.node_id == identity.node_id:
        return "ours from before"
    return f"taken over from node {holder}"


def _overlapping(snapshot: Snapshot, key: LeaseKey) -> LeaseKey | None:
    """Another key, of another length or with another IPv6 part, that shares addresses with ours."""
    others = [*(lease.key for lease in snapshot.leases), *keys_of(snapshot.bad)]
    return next((other for other in others if other != key and overlap(other, key)), None)
